"""Checkpoints that are complete or do not exist: when they are written, how, and how a run goes on from one."""

import hashlib
import io
import json
import logging
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from pickle import PickleError
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from clip4vla import distributed, mirror, selection, universal
from clip4vla.config import RunConfig, TrainConfig, UserError
from clip4vla.files import write_text
from clip4vla.settings import parse_json
from clip4vla.universal import fsync
from clip4vla.watchdog import watch
from clip4vla.weights import save_tensors

# torch and safetensors have their own for a full disk, DeepSpeed has many for what it cannot read, fsspec one for s3fs missing
_FAILURES = (OSError, RuntimeError, ValueError, LookupError, AssertionError, ImportError, PickleError, SafetensorError)
Passed = Callable[[str], None]  # says where a long piece of work is, see by_rank_0


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint of a run: folders get their name step-NNNNNNNN only when all of it is on the disk."""
    return max(_complete(Path(run_dir, "checkpoints")), default=None)


def _complete(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step-*") if mirror.STEP.fullmatch(path.name)]


def saved_as(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's config.json: model, step, ranks, zero_stage, sample order. UserError if it is not this checkpoint's."""
    try:
        meta = parse_json((checkpoint / "config.json").read_bytes())
        step, *layout = (meta[key] for key in ("step", "ranks", "zero_stage"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _spoilt(checkpoint, f"config.json: {_line(error)}") from None
    if step != int(checkpoint.name[5:]) or not all(type(number) is int for number in (step, *layout)):
        raise _spoilt(checkpoint, f"config.json says step {step}, ranks and ZeRO stage {layout}")
    return meta


def _spoilt(checkpoint: Path, why: str) -> UserError:
    return UserError(f"{checkpoint}: cannot be continued from ({why}); remove it to go on from the one before")


def chosen_checkpoint(cfg: RunConfig) -> Path | None:
    """The complete checkpoint to evaluate: the best one by eval.select (UserError if it is not there), else the newest."""
    if not cfg.eval.select:
        return newest_checkpoint(cfg.run_dir)
    best = selection.best(cfg)
    folder = Path(cfg.run_dir, "checkpoints", best)
    if not best or not folder.is_dir():
        missing = f"{folder} is gone" if best else f"{cfg.run_dir}/eval has no evaluation on data.val"
        raise UserError(f"eval.select={cfg.eval.select}: {missing}; eval.select= evaluates the newest checkpoint")
    return folder


def superseded(names: Iterable[str], cfg: RunConfig) -> list[str]:
    """Of some step-NNNNNNNN those that train.keep, train.keep_every and eval.select let go."""
    kept, every = selection.kept(cfg), cfg.train.keep_every
    old = [name for name in sorted(names)[: -cfg.train.keep] if name not in kept]
    return [name for name in old if not every or int(name[5:]) % every]


def checkpoint_to_resume(cfg: RunConfig) -> Path | None:
    """The newest complete checkpoint of this run, the same on all ranks; from train.mirror if the newest is only there.

    Raises UserError if the mirror cannot be asked or does not give what it has.
    """
    found, failed = by_rank_0(lambda passed: _newest_anywhere(cfg, passed))  # one rank's view of the disk
    if failed:
        raise UserError(f"train.mirror={cfg.train.mirror}: {failed}")
    return found


def by_rank_0(work: Callable[[Passed], Any]) -> tuple[Any, str]:
    """Work that only rank 0 does, however long: (what it returns, why it failed or ""), on all ranks.

    It is given a function to call with each place it passes; the other ranks pass the same ones, as the judge wants it, and
    train.timeout counts from the last one for all.
    """

    def passed(place: str) -> None:
        if time.monotonic() - watch.since > 1:  # a collective, which must not slow down the work
            distributed.gather_objects(place)
            watch.at(place)

    answer = None, ""
    if distributed.rank() == 0:
        try:
            answer = work(passed), ""
        except _FAILURES as error:
            answer = None, _line(error)
    while isinstance(said := distributed.gather_objects(answer)[0], str):
        watch.at(said)
    return said


def _newest_anywhere(cfg: RunConfig, passed: Passed) -> Path | None:
    local = newest_checkpoint(cfg.run_dir)
    remote = mirror.newest_upload(cfg.train.mirror, cfg.data) if cfg.train.mirror else None
    name = remote.rsplit("/", 1)[1] if remote else ""
    if remote and name > (local.name if local else ""):
        local = Path(cfg.run_dir, "checkpoints", name)
        mirror.download(remote, local, cfg.data, passed)
    if remote and cfg.eval.select:
        _fetch_best(cfg, passed)
    return local


def _fetch_best(cfg: RunConfig, passed: Passed) -> None:
    """What is known of earlier evaluations, and the best checkpoint by eval.select, from train.mirror."""
    mirror.download_evaluations(cfg.train.mirror, cfg.run_dir, cfg.data)
    best = selection.best(cfg)
    folder = Path(cfg.run_dir, "checkpoints", best)
    if best and not folder.is_dir() and best in mirror.uploads(cfg.train.mirror, cfg.data):
        mirror.download(f"{cfg.train.mirror.rstrip('/')}/{best}", folder, cfg.data, passed)


class Checkpoints:
    """Writes and reads the checkpoints of one run: DeepSpeed's state, model.safetensors in fp32 and config.json.

    Written in the background (train.save_async), a checkpoint is first copied into each rank's memory, as large as the
    rank's files; it counts as complete, gets its name and displaces older ones at the step where all ranks have
    written theirs. One is written at a time: the next save, and the end of the run, wait for the one before.
    """

    def __init__(self, engine: Any, cfg: RunConfig, frozen: dict[str, Tensor], samples: list[list[int]]):
        _check_writer(engine.checkpoint_engine, cfg.train)
        self.engine, self.frozen, self.run, self.cfg = engine, frozen, cfg, cfg.train
        self.write = engine.checkpoint_engine.save
        engine.checkpoint_engine.save = self._take
        engine.checkpoint_engine.load = universal.load_tensors
        engine._copy_recovery_script = lambda _: None  # could fail on rank 0 alone; and model.safetensors is there
        self.folder = Path(cfg.run_dir, "checkpoints")
        zero_stage = int(engine.zero_optimization_stage())
        self.layout: dict[str, Any] = {"ranks": distributed.world(), "zero_stage": zero_stage}
        order = [samples, list(cfg.data.train.values()), cfg.train.batch_size, cfg.seed, cfg.data.window]
        self.layout["sample order"] = hashlib.sha256(json.dumps(order).encode()).hexdigest()[:12]
        self.saved, self.since = 0, time.monotonic()
        self.late = distributed.AnyRank() if cfg.train.save_minutes else None
        self.busy = distributed.AnyRank() if cfg.train.save_async else None
        self.parts: dict[Path, Callable[[Path], Any]] = {}  # this rank's files, and what writes them
        self.failure: Exception | None = None
        self.pool, self.mirror = ThreadPoolExecutor(1), Mirror(cfg, self._prune)
        self.writing: Future | None = None  # on all ranks or on none

    def due(self, step: int) -> bool:
        """Whether to save after this step, the same on all ranks. To be called at every step: it completes what is written."""
        if self.busy and self.writing and not self.busy(not self.writing.done()):
            self.finish()
        by_clock = False
        if self.late:  # agreed on one step late: an answer just after a save is about the time before it
            overdue = distributed.rank() == 0 and time.monotonic() - self.since > 60 * self.cfg.save_minutes
            by_clock = self.late(overdue) and step > self.saved + 1
        return by_clock or step % self.cfg.save_every == 0 or step == self.cfg.max_steps

    def save(self, step: int) -> None:
        """Write this step, unless that has just been done; UserError on every rank if any of them could not."""
        if step == self.saved:
            return
        self.finish()
        self.saved, self.since = step, time.monotonic()
        self._on_all_ranks(self._clear)
        self._on_all_ranks(self._look)
        self._collect()
        self.writing = self.pool.submit(self._flush)
        if self.busy:
            self.busy(True)  # what was agreed on before is not about this one
        else:
            self.finish()

    def finish(self) -> None:
        """Wait until every rank has written what it is writing, then give it its name."""
        if self.writing:
            self._on_all_ranks(self.writing.result)
            self.writing = None
            self._on_all_ranks(self._publish)

    def close(self) -> None:
        """Finish, and wait for the copies on the mirror."""
        self.finish()
        by_rank_0(self.mirror.close)

    def load(self, checkpoint: Path) -> int:
        """Continue from a checkpoint of this run; returns the steps done.

        On the same ranks and ZeRO stage to the last bit, on others to rounding, by way of DeepSpeed's universal checkpoint.
        Raises UserError if the samples would come in another order, for what cannot be read, and from or to ZeRO-0.
        """
        meta = saved_as(checkpoint)
        self.must_fit(meta, checkpoint)
        rates = [{k: v for k, v in group.items() if k != "params"} for group in self.engine.optimizer.param_groups]
        elastic = self.layout["zero_stage"] and any(meta[key] != self.layout[key] for key in ("ranks", "zero_stage"))
        if elastic:
            _, failed = by_rank_0(lambda passed: universal.convert(checkpoint, passed))
            if failed:
                fit = f"{self.layout['ranks']} ranks, ZeRO-{self.layout['zero_stage']}"
                raise UserError(f"{checkpoint}: cannot be made fit for {fit} ({failed}); it is whole as it was")
        try:
            if elastic:
                universal.load(self.engine, checkpoint)
            else:
                self.engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False)
        except Exception as error:  # torch, pickle and DeepSpeed raise many kinds for damaged files
            raise _spoilt(checkpoint, _line(error)) from None
        for group, mine in zip(self.engine.optimizer.param_groups, rates, strict=True):
            group.update(mine)  # the YAML's; and DeepSpeed gives all groups the first one's weight decay
        self.saved = meta["step"]
        return meta["step"]

    def must_fit(self, meta: dict[str, Any], checkpoint: Path) -> None:
        """UserError if this run cannot go on from the checkpoint with this config.json."""
        for key in ("sample order", "zero_stage"):
            theirs, ours = meta.get(key), self.layout[key]
            if theirs != ours and (key == "sample order" or 0 in (theirs, ours)):
                what = "train.batch_size, seed, data.train or data.window" if key == "sample order" else key
                raise UserError(
                    f"{checkpoint}: {what} differs: {key} {theirs} there and {ours} here; resume with the same, "
                    "or start a new run_dir with init_from"
                )

    def _on_all_ranks(self, part: Callable[[], Any]) -> None:
        """Do this rank's part; UserError on every rank if it failed on any, so that none waits for one that has gone."""
        failed = ""
        try:
            part()
        except _FAILURES as error:
            failed = _line(error)
        reasons = [reason for reason in distributed.gather_objects(failed) if reason]
        if reasons:
            what = f"{self.folder}: the checkpoint of step {self.saved} could not be written"
            raise UserError(f"{what} ({reasons[0]}); those already there are whole")

    def _aside(self) -> Path:
        return self.folder / f"partial-{self.saved:08d}"

    def _clear(self) -> None:
        if distributed.rank() == 0:
            for half_written in self.folder.glob("partial-*"):
                shutil.rmtree(half_written, ignore_errors=True)
            self._aside().mkdir(parents=True)

    def _look(self) -> None:
        """UserError if rank 0's folder is not here: what this rank writes would be missing from the checkpoint."""
        if not self._aside().exists():
            raise UserError(f"run_dir must be on a disk that all nodes share: {socket.gethostname()} does not see it")

    def _collect(self) -> None:
        """Have this rank's files: on the disk, not yet synced, or in memory if they are to be written in the background."""
        self.parts, self.failure, aside = {}, None, self._aside()
        self.engine.save_checkpoint(str(self.folder), tag=aside.name, save_latest=False, exclude_frozen_parameters=True)
        weights = self._weights()
        if distributed.rank() == 0:
            meta = self.engine.module.config() | {"step": self.saved, **self.layout}
            self.parts[aside / "model.safetensors"] = lambda path: save_tensors(weights, path)
            self.parts[aside / "config.json"] = lambda path: path.write_text(json.dumps(meta, indent=1))

    def _take(self, state_dict: Any, path: str) -> None:
        """DeepSpeed's save. Nothing is raised here, where the other ranks would wait for this one."""
        memory = io.BytesIO() if self.busy else None
        try:
            self.write(state_dict, memory or path)
        except (OSError, RuntimeError) as error:
            self.failure = error
        self.parts[Path(path)] = lambda path: memory and path.write_bytes(memory.getbuffer())

    def _flush(self) -> None:
        if self.failure:
            raise self.failure
        for path, write in self.parts.items():
            write(path)
            fsync(path)
        self.parts = {}

    def _publish(self) -> None:
        """Rename, then `latest`, then remove older ones."""
        if distributed.rank() == 0:
            final = self.folder / f"step-{self.saved:08d}"
            fsync(self._aside())
            self._aside().rename(final)
            fsync(self.folder)
            write_text(self.folder / "latest", final.name)  # for people and for DeepSpeed's own tools
            self._prune()
            self.mirror.update()

    def _prune(self) -> None:
        """Remove what is neither among the newest nor kept for ever; not what is being copied, which then comes here again."""
        for name in superseded((path.name for path in _complete(self.folder)), self.run):
            if name != self.mirror.reading:
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def _weights(self) -> dict[str, Tensor]:
        """All weights in fp32 on rank 0's CPU: master copies of what is trained, untouched originals of what is frozen."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        weights, masters = dict(self.frozen), _masters_without_zero(self.engine.optimizer)
        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                master = safe_get_full_fp32_param(parameter)  # a collective: every rank takes part
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    full = masters.get(parameter, parameter) if master is None else master
                    full = full.detach().float().cpu()
                if distributed.rank() == 0:
                    weights[name] = full.reshape(getattr(parameter, "ds_shape", parameter.shape)).clone()
        return weights


class Mirror:
    """Copies of the run's checkpoints at train.mirror, made by rank 0 in the background, one at a time.

    The mirror lags behind: what is superseded while another copy is made is left out. After each copy the mirror's own list
    is pruned as the run's folder is, whatever an earlier job left there. What fails is a warning: the next copy makes up for it.
    """

    def __init__(self, cfg: RunConfig, prune: Callable[[], None]):
        self.url, self.cfg, self.prune = cfg.train.mirror.rstrip("/"), cfg, prune
        self.copied, self.reading = "", ""
        self.pool = ThreadPoolExecutor(1)
        self.copying: Future[None] = Future()  # the last one asked for
        self.copying.set_result(None)

    def update(self) -> None:
        """Copy the newest checkpoint, in a while, and remove what is superseded there."""
        if self.url:
            self.copying = self.pool.submit(self._update)

    def close(self, passed: Passed) -> None:
        """Wait for the copies, which have time-outs of their own, the last evaluation's among them."""
        if self.cfg.eval.select:
            self.update()
        while wait([self.copying], 1).not_done:
            passed("the end: copies to train.mirror")
        self.pool.shutdown()

    def _update(self) -> None:
        newest = newest_checkpoint(self.cfg.run_dir)
        assert newest
        try:
            if newest.name != self.copied:
                self.reading = newest.name
                mirror.upload(newest, self.url, self.cfg.data)
                self.copied, self.reading = newest.name, ""
                self.prune()
            if self.cfg.eval.select:
                mirror.upload_evaluations(self.cfg.run_dir, self.url, self.cfg.data)
            there = mirror.uploads(self.url, self.cfg.data)
            for name in superseded((name for name in there if name <= self.copied), self.cfg):
                mirror.remove(f"{self.url}/{name}", self.cfg.data)
        except (OSError, ValueError) as error:
            late = "older ones are still" if self.copied == newest.name else f"{newest.name} is not yet"
            logging.warning(f"train.mirror={self.url}: {late} there ({_line(error)})")
        self.reading = ""


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies, on rank 0, of everything that will not be trained, before DeepSpeed rounds it to the run's precision."""
    if distributed.rank():
        return {}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items() if name not in trained}


def _masters_without_zero(optimizer: Any) -> dict[Tensor, Tensor]:
    """{parameter: its fp32 master copy} of ZeRO-0 in bf16 or fp16, where DeepSpeed does not link the two; else empty."""
    flat = getattr(optimizer, "fp32_groups_flat", None)  # of the fused optimizer; the other has them one by one
    groups = getattr(optimizer, "fp16_groups", [])
    if flat:
        masters = [torch.split(f, [p.numel() for p in group]) for f, group in zip(flat, groups, strict=True)]
    else:
        masters = getattr(optimizer, "fp32_groups", [])
    return {p: m for group, of in zip(groups, masters, strict=False) for p, m in zip(group, of, strict=True)}


def _check_writer(writer: Any, cfg: TrainConfig) -> None:
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

    if writer.is_decoupled() or (cfg.save_async and not isinstance(writer, TorchCheckpointEngine)):
        raise UserError(
            f"ds.json: checkpoint.writer ({writer.name}) contradicts train.save_async; leave checkpoint.writer out"
        )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
