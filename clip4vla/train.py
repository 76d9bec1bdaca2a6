"""The one training loop, for every stage: what differs is which towers train and which losses have a weight."""

import math
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip4vla import distributed, engine, tracking
from clip4vla.config import RunConfig, SpectrogramConfig, UserError, to_dict
from clip4vla.evaluation import check_evaluation, evaluate
from clip4vla.loader import Loader, TrainOrder, check_fingerprint, open_folders
from clip4vla.losses import objective
from clip4vla.model import CLIP4VLA
from clip4vla.towers import describe_clip, tokenizer
from clip4vla.vectors import open_vectors

PREEMPTED = 85  # exit code after SIGTERM or SIGUSR1, once the state is saved


def train(cfg: RunConfig, ds_config: str | None) -> None:
    """Train until max_steps, from wherever this run stands; exit 85 when a signal asked to stop."""
    device = distributed.setup()
    torch.manual_seed(cfg.seed)
    folders = open_folders(cfg.data.train, "data.train")
    ds = engine.merge(*engine.read_ds_config(ds_config), cfg)
    check_evaluation(cfg)
    if not any(to_dict(cfg.loss)[name] for name in ("at", "av", "aa", "tv")):
        raise UserError("loss: every weight is 0: give at, av, aa or tv one")
    resume = distributed.gather_objects(engine.newest_checkpoint(cfg.run_dir))[0]  # one rank's view of the disk
    model, origin = build_model(cfg, folders[0].fingerprint, resume)
    vectors = open_vectors(folders, cfg, model)  # before the engine rounds the weights that they are checked against
    tracking.start_run(cfg, ds)
    frozen = engine.frozen_weights(model)
    run = engine.start(model, ds)
    sizes = [[shard.samples for shard in folder.shards] for folder in folders]
    checkpoints = engine.Checkpoints(run, cfg, frozen, sizes)
    step = checkpoints.load(resume) if resume else 0
    tracker = tracking.Tracker(cfg, step)
    _introduce(cfg, folders, vectors, model, origin, ds, step, tracker)
    loader = train_loader(cfg, folders, vectors, device)
    stop = _Signals()
    meter = Meter(cfg, device)
    for batch in meter.timed(loader.batches(step, cfg.train.max_steps)):
        for group in run.optimizer.param_groups:
            group["lr"] = engine.learning_rate(step, cfg.train)
        batch = batch.to(device)
        losses = objective(run(batch, cfg.loss, cfg.mask), batch, cfg.loss)
        run.backward(losses["loss"])
        run.step()
        step += 1
        meter.add(losses, batch)
        stopped = stop.anywhere()
        saving = step % cfg.train.save_every == 0 or step == cfg.train.max_steps or stopped
        if saving or step % cfg.train.log_every == 0:
            tracker.rows_of(meter.rows(step, run))  # stops if a loss is not finite, so such a state is never saved
        if saving:
            checkpoints.save(step)
        if cfg.eval.every and step % cfg.eval.every == 0:
            with engine.whole_weights(run):
                evaluate(run.module, cfg, cfg.data.val, f"val-{step:08d}", tracker.say)
        if not meter.pending:
            meter.restart()  # the rates are those of training alone
        if stopped:
            break
    tracker.say(f"step {step} of {cfg.train.max_steps}: state saved in {cfg.run_dir}/checkpoints")
    tracker.close()
    distributed.barrier()
    if step < cfg.train.max_steps:
        sys.exit(PREEMPTED)


def train_loader(cfg: RunConfig, folders: list, vectors: list | None, device: torch.device) -> Loader:
    """The endless stream of training batches; spectrograms that no loss needs are not read, nor frames where vectors do."""
    sizes = [[shard.samples for shard in folder.shards] for folder in folders]
    order = TrainOrder(sizes, list(cfg.data.train.values()), cfg.train.batch_size, cfg.seed, cfg.data.window)
    loss = cfg.loss
    needs = ["fbank"] * bool(loss.at or loss.av or loss.aa)
    needs += ["frames"] * bool((loss.av or loss.tv) and not vectors)
    return Loader(
        folders, order, cfg.data, tokenize=tokenizer(cfg.model.clip, cfg.model.max_tokens), mask=cfg.mask, seed=cfg.seed,
        needs=needs, vectors=vectors, device=device, damage_log=Path(cfg.run_dir, f"damaged-{distributed.rank()}.jsonl"),
    )  # fmt: skip


def build_model(cfg: RunConfig, fingerprint: dict[str, Any], resume: Path | None) -> tuple[CLIP4VLA, str]:
    """(model, where its weights come from), the first of:

    1. the newest complete checkpoint of this run; 2. init_from; 3. the CLIP weights that model.clip names; 4. scratch.
    """
    if (cfg.model.fusion, cfg.model.modalities) != ("global_global", "av"):
        raise UserError(
            f"model.fusion={cfg.model.fusion}, model.modalities={cfg.model.modalities}: heads and single modalities belong "
            "to fine-tuning, which is not written yet; take global_global and av"
        )
    spectrogram = SpectrogramConfig(**fingerprint["spectrogram"])
    if resume:
        model = CLIP4VLA.from_checkpoint(resume)
        _must_match(model, cfg, spectrogram, resume)
        cfg.model.train_towers = model.cfg.train_towers  # the optimizer's state is of these
        model.cfg = cfg.model
        model.freeze()
        return model.train(), str(resume)
    model = CLIP4VLA(describe_clip(cfg.model.clip, cfg.model.quick_gelu), cfg.model, spectrogram)
    size = (spectrogram.segment_rows, spectrogram.n_mels)
    if model.vision.image_size != size:
        raise UserError(
            f"model.clip: its pictures are {model.vision.image_size}, segments {size}: take a CLIP of that size"
        )
    source = next((place for place in cfg.init_from if _checkpoint_in(place)), None)
    if cfg.init_from and not source and "scratch" not in cfg.init_from:
        raise UserError(
            f"init_from: no checkpoint in {', '.join(cfg.init_from)}; add `scratch` to the list to start without"
        )
    if source:
        source = str(_load_initial(model, source, cfg, spectrogram))
    elif model.load_clip():
        model.start_audio()
        source = cfg.model.clip
    else:  # nothing to freeze: towers without weights are trained
        model.start_audio()
        wanted = {*cfg.model.train_towers.split("+"), *(["text"] if cfg.loss.at or cfg.loss.tv else [])}
        wanted |= {"vision"} if cfg.loss.av or cfg.loss.tv else set()
        model.cfg.train_towers = "+".join(sorted(wanted))
        source = "scratch"
    model.freeze()
    return model.train(), source


def _checkpoint_in(place: str) -> Path | None:
    """The newest checkpoint of a run folder, or the folder itself if it is one."""
    return engine.newest_checkpoint(place) or (Path(place) if Path(place, "model.safetensors").is_file() else None)


def _load_initial(model: CLIP4VLA, source: str, cfg: RunConfig, spectrogram: SpectrogramConfig) -> Path:
    """Weights of another run or checkpoint; its audio tower only if it was trained there."""
    folder = _checkpoint_in(source)
    other = CLIP4VLA.from_checkpoint(folder)
    heard = "audio" in other.cfg.train_towers
    _must_match(other, cfg, spectrogram if heard else None, folder)
    for name in ("text", "vision", *(["audio"] if heard else [])):
        getattr(model, name).load_state_dict(getattr(other, name).state_dict())
    if cfg.model.learn_temperature:
        model.log_scale.data.copy_(other.log_scale.data)
    if not heard:
        model.start_audio()
    return folder


def _must_match(model: CLIP4VLA, cfg: RunConfig, spectrogram: SpectrogramConfig | None, folder: Path) -> None:
    """UserError if a checkpoint's towers or spectrograms are not those of this run."""
    ours = describe_clip(cfg.model.clip, cfg.model.quick_gelu)
    if model.clip_config != ours:
        key = next(k for k in {**ours, **model.clip_config} if ours.get(k) != model.clip_config.get(k))
        raise UserError(
            f"{folder}: a checkpoint of another model: {key} is {model.clip_config.get(key)} there and {ours.get(key)} "
            f"in model.clip={cfg.model.clip}; change model.clip, or run_dir / init_from"
        )
    if spectrogram:
        theirs = {"spectrogram": to_dict(model.spectrogram)}
        check_fingerprint(theirs, {"spectrogram": to_dict(spectrogram)}, str(folder), "the shards of data.train")


def _introduce(cfg, folders, vectors, model, origin, ds, step, tracker) -> None:
    """One page on what is about to run."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    precision = next((kind for kind in ("bf16", "fp16") if ds[kind]["enabled"]), "fp32")
    stage = ds.get("zero_optimization", {}).get("stage", 0)
    lines = [f"{'data':<10} {folder.url}: {len(folder)} samples in {len(folder.shards)} shards" for folder in folders]
    lines += [
        f"{'vectors':<10} {'of text and frames from embed.py' if vectors else 'not used'}",
        f"{'model':<10} {cfg.model.clip}, weights from {origin}",
        f"{'training':<10} {model.cfg.train_towers}: {trained:.1f}M parameters; losses {to_dict(cfg.loss)}",
        f"{'engine':<10} {distributed.world()} ranks, ZeRO-{stage}, {precision}, global batch {cfg.train.batch_size}",
        f"{'memory':<10} {engine.expected_memory(model, ds):.2f} GiB a rank for weights, gradients and optimizer",
        f"{'steps':<10} {step} done of {cfg.train.max_steps}; run folder {cfg.run_dir}",
    ]
    for line in lines:
        tracker.say(line)


class Meter:
    """Collects what a step gives on the device, and turns it into rows on the logging steps."""

    def __init__(self, cfg: RunConfig, device: torch.device):
        self.cfg, self.device = cfg, device
        self.pending: list[dict[str, Tensor]] = []
        self.waited = 0.0
        self.since = time.perf_counter()

    def timed(self, batches: Iterator) -> Iterator:
        """The same batches; the time spent waiting for them is counted."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, losses: dict[str, Tensor], batch: Any) -> None:
        """Note the losses of one step, without waiting for them."""
        named = {name if name == "loss" else f"loss/{name}": value.detach() for name, value in losses.items()}
        counts = {"hidden": batch.hidden_rows.sum().float(), "heard": batch.segment_rows.sum().float()}
        self.pending.append(named | counts)

    def rows(self, step: int, run: Any) -> list[dict[str, Any]]:
        """Rows of the steps since the last call; stops the run if a loss is not finite."""
        if not self.pending:
            return []
        names = list(self.pending[0])
        table = distributed.mean(torch.stack([torch.stack([row[n].float() for n in names]) for row in self.pending]))
        first, seconds = step - len(table), time.perf_counter() - self.since
        rows = [
            {
                "step": first + i + 1,
                "samples": (first + i + 1) * self.cfg.train.batch_size,
                "lr": engine.learning_rate(first + i, self.cfg.train),
            }
            | dict(zip(names, values, strict=True))
            for i, values in enumerate(table.tolist())
        ]
        for row in rows:
            hidden, heard = row.pop("hidden"), row.pop("heard")
            row |= {"hidden_rows": hidden / heard} if heard else {}
        _must_be_finite(rows, self.cfg.run_dir)
        rows[-1] |= {
            "grad_norm": float(run.get_global_grad_norm() or 0.0),
            "clips_per_s": len(table) * self.cfg.train.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "memory_gib": _peak_memory(self.device),
            "time": time.time(),
        }
        self.pending = []
        return rows

    def restart(self) -> None:
        """Start the clock of the next rows."""
        self.waited, self.since = 0.0, time.perf_counter()


def _must_be_finite(rows: list[dict[str, Any]], run_dir: str) -> None:
    """UserError naming the first step whose loss is not finite; the value is the same on all ranks, so all stop."""
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"the loss of step {row['step']} is {row['loss']}: lower train.lr, or take bf16 or fp32 in train.precision; "
                f"the last checkpoint in {run_dir}/checkpoints is good"
            )


class _Signals:
    """SIGTERM and SIGUSR1 ask for a stop; all ranks agree on the step."""

    def __init__(self) -> None:
        self.asked, self.agree = False, distributed.AnyRank()
        for name in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(name, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def anywhere(self) -> bool:
        """Whether any rank was asked to stop, as of the last call."""
        return self.agree(self.asked)


def _peak_memory(device: torch.device) -> float:
    """GiB: the allocator's peak on a GPU, the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / engine.GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / engine.GIB
