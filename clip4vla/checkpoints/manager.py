"""Write a run's checkpoints, each complete or absent, decide when to, and continue a run from one."""

import contextlib
import hashlib
import io
import json
import shutil
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip4vla.checkpoints import best, remote, universal
from clip4vla.checkpoints.lookup import complete_checkpoints, corrupt_error, expired, newest_checkpoint, read_metadata
from clip4vla.config import RunConfig, TrainConfig
from clip4vla.distributed import collectives
from clip4vla.distributed.rank_0 import FAILURES, ProgressCallback, run_on_rank_0
from clip4vla.errors import UserError, one_line
from clip4vla.io.atomic import fsync, write_text
from clip4vla.io.safe_load import save_tensors


def checkpoint_to_resume(cfg: RunConfig) -> Path | None:
    """Find the newest complete checkpoint of this run, the same on all ranks; download it if only train.mirror has it.

    Raises UserError if the mirror cannot be read.
    """
    newest, failed = run_on_rank_0(lambda passed: _newest_anywhere(cfg, passed))  # one rank's view of the disk
    if failed:
        raise UserError(f"train.mirror={cfg.train.mirror}: {failed}")
    return newest


def _newest_anywhere(cfg: RunConfig, passed: ProgressCallback) -> Path | None:
    local = newest_checkpoint(cfg.run_dir)
    newest = remote.newest_upload(cfg.train.mirror, cfg.data) if cfg.train.mirror else None
    name = newest.rsplit("/", 1)[1] if newest else ""
    if newest and name > (local.name if local else ""):
        local = Path(cfg.run_dir, "checkpoints", name)
        remote.download(newest, local, cfg.data, passed)
    if newest and cfg.eval.best_metric:
        _fetch_best(cfg, passed)
    return local


def _fetch_best(cfg: RunConfig, passed: ProgressCallback) -> None:
    """Download the metrics of earlier evaluations, and the best checkpoint by eval.best_metric, from train.mirror."""
    remote.download_evaluations(cfg.train.mirror, cfg.run_dir, cfg.data)
    name = best.best(cfg)
    folder = Path(cfg.run_dir, "checkpoints", name)
    if name and not folder.is_dir() and name in remote.uploads(cfg.train.mirror, cfg.data):
        remote.download(f"{cfg.train.mirror.rstrip('/')}/{name}", folder, cfg.data, passed)


class CheckpointManager:
    """Writes and reads the checkpoints of one run: DeepSpeed's state, model.safetensors in fp32 and config.json.

    Written in the background (train.save_async), a checkpoint is first copied into each rank's memory, as large as the
    rank's files; it counts as complete, gets its name and displaces older ones at the step where all ranks have
    written theirs. One is written at a time: the next save, and the end of the run, wait for the one before.
    """

    def __init__(self, engine: Any, cfg: RunConfig, frozen: dict[str, Tensor], samples: list[list[int]]):
        _check_writer(engine.checkpoint_engine, cfg.train)
        self.engine = engine
        self.cfg = cfg
        self.frozen = frozen  # weights that are not trained, on rank 0
        self.folder = Path(cfg.run_dir, "checkpoints")
        self.layout = _layout(engine, cfg, samples)
        self.last_step = 0  # of the last checkpoint, written or being written
        self.last_time = time.monotonic()  # when that was begun
        self.any_overdue = collectives.AsyncAnyFlag() if cfg.train.save_every_minutes else None
        self.any_writing = collectives.AsyncAnyFlag() if cfg.train.save_async else None
        self.files: dict[Path, Callable[[Path], object]] = {}  # this rank's files of a checkpoint, and what writes each
        self.failure: Exception | None = None  # of DeepSpeed's save on this rank
        self.thread = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None  # set on all ranks or on none
        self.uploader = remote.CheckpointUploader(cfg, self._prune)
        self._take_over_files()

    def _take_over_files(self) -> None:
        """Route the files that DeepSpeed writes and reads through this object."""
        files = self.engine.checkpoint_engine
        self.deepspeed_save = files.save
        files.save = self._intercept_save
        files.load = universal.load_tensors
        self.engine._copy_recovery_script = lambda _: None  # could fail on rank 0 alone; and model.safetensors is there

    def should_save(self, step: int) -> bool:
        """Decide, the same on all ranks, whether to save after this step.

        To be called at every step: it also names the checkpoint that was written in the background, once all ranks are done.
        """
        if self.any_writing and self.writing and not self.any_writing(not self.writing.done()):
            self.finish()
        train = self.cfg.train
        return self._due_by_clock(step) or step % train.save_every == 0 or step == train.max_steps

    def _due_by_clock(self, step: int) -> bool:
        if not self.any_overdue:
            return False
        overdue = time.monotonic() - self.last_time > 60 * self.cfg.train.save_every_minutes
        agreed = self.any_overdue(collectives.rank() == 0 and overdue)
        return agreed and step > self.last_step + 1  # the flag comes one step late: just after a save it is an old one

    def save(self, step: int) -> None:
        """Write this step, unless that has just been done; UserError on every rank if any of them could not."""
        if step == self.last_step:
            return
        self.finish()
        self.last_step, self.last_time = step, time.monotonic()
        self._on_all_ranks(self._clear)
        self._on_all_ranks(self._check_shared_filesystem)
        self._snapshot()
        self.writing = self.thread.submit(self._flush)
        if self.any_writing:
            self.any_writing(True)  # replaces the flag that was posted for the checkpoint before
        else:
            self.finish()

    def finish(self) -> None:
        """Wait until every rank has written its files, then give the checkpoint its name."""
        if self.writing:
            self._on_all_ranks(self.writing.result)
            self.writing = None
            self._on_all_ranks(self._publish)

    def close(self) -> None:
        """Finish, and wait for the copies on the mirror."""
        self.finish()
        run_on_rank_0(self.uploader.close)

    def load(self, checkpoint: Path) -> int:
        """Continue from a checkpoint of this run; returns the steps done.

        On the same ranks and ZeRO stage to the last bit, on others to rounding, by way of DeepSpeed's universal checkpoint.
        Raises UserError if the samples would come in another order, for what cannot be read, and from or to ZeRO-0.
        """
        meta = read_metadata(checkpoint)
        self.must_fit(meta, checkpoint)
        rates = [{k: v for k, v in group.items() if k != "params"} for group in self.engine.optimizer.param_groups]
        elastic = self.layout["zero_stage"] and any(meta[key] != self.layout[key] for key in ("ranks", "zero_stage"))
        if elastic:
            _, failed = run_on_rank_0(lambda passed: universal.convert(checkpoint, passed))
            if failed:
                fit = f"{self.layout['ranks']} ranks, ZeRO-{self.layout['zero_stage']}"
                raise UserError(f"{checkpoint}: cannot be made fit for {fit} ({failed}); it is whole as it was")
        try:
            if elastic:
                universal.load(self.engine, checkpoint)
            else:
                with contextlib.redirect_stdout(None):  # DeepSpeed's BF16_Optimizer prints a line
                    self.engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name, load_module_strict=False)
        except Exception as error:  # torch, pickle and DeepSpeed raise many kinds for corrupt files
            raise corrupt_error(checkpoint, one_line(error)) from None
        for group, mine in zip(self.engine.optimizer.param_groups, rates, strict=True):
            group.update(mine)  # the YAML's; and DeepSpeed gives all groups the first one's weight decay
        self.last_step = meta["step"]
        return meta["step"]

    def must_fit(self, meta: dict[str, Any], checkpoint: Path) -> None:
        """Raise UserError if this run cannot continue from the checkpoint with this config.json."""
        for key in ("sample order", "zero_stage"):
            theirs, ours = meta.get(key), self.layout[key]
            if theirs != ours and (key == "sample order" or 0 in (theirs, ours)):
                what = "train.batch_size, seed, data.train or data.shuffle_window" if key == "sample order" else key
                raise UserError(
                    f"{checkpoint}: {what} differs: {key} {theirs} there and {ours} here; resume with the same, "
                    "or start a new run_dir with init_from"
                )

    def _on_all_ranks(self, work: Callable[[], object]) -> None:
        """Do this rank's work; UserError on every rank if it failed on any, so that none waits for one that has gone."""
        failed = ""
        try:
            work()
        except FAILURES as error:
            failed = one_line(error)
        reasons = [reason for reason in collectives.all_gather_objects(failed) if reason]
        if reasons:
            what = f"{self.folder}: the checkpoint of step {self.last_step} could not be written"
            raise UserError(f"{what} ({reasons[0]}); those already there are whole")

    def _staging_dir(self) -> Path:
        return self.folder / f"partial-{self.last_step:08d}"

    def _clear(self) -> None:
        """Remove what a killed run left half written, and make the staging folder."""
        if collectives.rank() == 0:
            for half_written in self.folder.glob("partial-*"):
                shutil.rmtree(half_written, ignore_errors=True)
            self._staging_dir().mkdir(parents=True)

    def _check_shared_filesystem(self) -> None:
        """Raise UserError if rank 0's folder is not here: what this rank writes would be missing from the checkpoint."""
        if not self._staging_dir().exists():
            raise UserError(f"run_dir must be on a disk that all nodes share: {socket.gethostname()} does not see it")

    def _snapshot(self) -> None:
        """Collect this rank's files: on the disk, not yet synced, or in memory if they are written in the background."""
        self.files, self.failure, aside = {}, None, self._staging_dir()
        self.engine.save_checkpoint(str(self.folder), tag=aside.name, save_latest=False, exclude_frozen_parameters=True)
        weights = self._weights()
        if collectives.rank() == 0:
            meta = self.engine.module.config() | {"step": self.last_step, **self.layout}
            self.files[aside / "model.safetensors"] = lambda path: save_tensors(weights, path)
            self.files[aside / "config.json"] = lambda path: path.write_text(json.dumps(meta, indent=1))

    def _intercept_save(self, state_dict: Any, path: str) -> None:
        """Write a file in DeepSpeed's place, to memory with train.save_async.

        Errors are kept for _flush: raised here, they would leave the other ranks waiting for this one.
        """
        memory = io.BytesIO() if self.any_writing else None
        try:
            self.deepspeed_save(state_dict, memory or path)
        except (OSError, RuntimeError) as error:
            self.failure = error
        self.files[Path(path)] = _written_already if memory is None else partial(_write_buffer, memory)

    def _flush(self) -> None:
        """Write this rank's files and sync them; raises what DeepSpeed's save raised."""
        if self.failure:
            raise self.failure
        for path, write in self.files.items():
            write(path)
            fsync(path)
        self.files = {}

    def _publish(self) -> None:
        """Rename the staging folder, then write `latest`, then remove older checkpoints.

        All ranks have written and synced their own files there, which io.atomic, made for one process, does not do.
        """
        if collectives.rank() == 0:
            final = self.folder / f"step-{self.last_step:08d}"
            fsync(self._staging_dir())
            self._staging_dir().rename(final)
            fsync(self.folder)
            write_text(self.folder / "latest", final.name)  # for people and for DeepSpeed's own tools
            self._prune()
            self.uploader.update()

    def _prune(self) -> None:
        """Remove expired checkpoints, except the one that is being uploaded: the uploader calls this again after it."""
        for name in expired((path.name for path in complete_checkpoints(self.folder)), self.cfg):
            if name != self.uploader.reading:
                shutil.rmtree(self.folder / name, ignore_errors=True)

    def _weights(self) -> dict[str, Tensor]:
        """Gather all weights in fp32 on rank 0's CPU: master copies of the trained ones, untouched originals of the frozen."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        weights, masters = dict(self.frozen), _masters_without_zero(self.engine.optimizer)
        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                master = safe_get_full_fp32_param(parameter)  # a collective: every rank takes part
                with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                    if collectives.rank() == 0:
                        full = masters.get(parameter, parameter) if master is None else master
                        full = full.detach().float().cpu()
                        weights[name] = full.reshape(getattr(parameter, "ds_shape", parameter.shape)).clone()
        return weights


def frozen_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copy the weights that are not trained, on rank 0, before DeepSpeed rounds them to the run's precision."""
    if collectives.rank():
        return {}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items() if name not in trained}


def _layout(engine: Any, cfg: RunConfig, samples: list[list[int]]) -> dict[str, Any]:
    """Describe what a checkpoint fits: ranks, ZeRO stage, and a hash of all that decides the order of the samples."""
    order = [samples, list(cfg.data.train.values()), cfg.train.batch_size, cfg.seed, cfg.data.shuffle_window]
    return {
        "ranks": collectives.world_size(),
        "zero_stage": int(engine.zero_optimization_stage()),
        "sample order": hashlib.sha256(json.dumps(order).encode()).hexdigest()[:12],
    }


def _written_already(path: Path) -> None:
    """Write nothing: DeepSpeed has put the file there."""


def _write_buffer(memory: io.BytesIO, path: Path) -> None:
    path.write_bytes(memory.getbuffer())


def _masters_without_zero(optimizer: Any) -> dict[Tensor, Tensor]:
    """Map parameters to fp32 master copies for ZeRO-0 in bf16 or fp16, where DeepSpeed does not link the two; else empty."""
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
