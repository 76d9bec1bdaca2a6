"""Describe in one page what a run is about to do, and check that it can (`--dry-run`), by a real step that writes nothing."""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from clip4vla.checkpoints.lookup import read_metadata
from clip4vla.checkpoints.manager import CheckpointManager
from clip4vla.config import RunConfig
from clip4vla.data.batch import Batch
from clip4vla.data.loader import Loader
from clip4vla.data.precomputed_embeddings import obstacle
from clip4vla.distributed import collectives
from clip4vla.distributed.watchdog import watch
from clip4vla.errors import UserError
from clip4vla.losses.objective import TERMS, required_features
from clip4vla.training import engine, flops, memory, train_step
from clip4vla.training.engine import GIB
from clip4vla.training.meter import peak_memory
from clip4vla.training.run_setup import RunSetup, prepare, train_loader

LOOKED_AT = 4  # batches of which a dry run steps with the largest


def check(cfg: RunConfig, ds_config: str | None) -> None:
    """Do what training would, up to one whole step, and print its measurements; UserError if the run could not go on.

    Writes nothing (but a newer checkpoint of train.mirror into run_dir), and loads no optimizer state. The step is timed
    after one before it, on the batch with the most segments and frames of the first ones.
    """
    setup = prepare(cfg, ds_config)
    meta = read_metadata(setup.resume) if setup.resume else {"step": 0}
    step = meta["step"]
    loader = train_loader(cfg, setup.folders, setup.vectors, setup.device, setup.model.pictures)
    loader.damage_log = Path(os.devnull)
    _say(describe(cfg, setup, loader, step))
    _say([disk(cfg, setup)])
    with enough_memory(cfg):
        run = engine.start(setup.model, setup.ds, cfg.train)
        if setup.resume:
            sizes = [[shard.samples for shard in folder.shards] for folder in setup.folders]
            CheckpointManager(run, cfg, {}, sizes).must_fit(meta, setup.resume)
        trial = _try(cfg, run, loader, step)
    _say(_findings(cfg, setup, trial, max(0, cfg.train.max_steps - step)))
    collectives.barrier()


def describe(cfg: RunConfig, setup: RunSetup, loader: Loader, step: int) -> list[str]:
    """Describe in one page, as lines, what is about to run, from `step` on."""
    model, train = setup.model, cfg.train
    parts = ("text", "vision", "audio", *(["head"] if cfg.model.head != "global_global" else []))
    towers = ", ".join(f"{name} {_millions(getattr(model, name))}" for name in parts)
    losses = ", ".join(f"{name} {getattr(cfg.loss, name):g}" for name in TERMS if getattr(cfg.loss, name))
    negatives = f", negatives {train.negatives}" if required_features(cfg.loss) else ""
    pieces = (
        f" in {train.gradient_accumulation_steps} micro-batches{negatives}"
        if train.gradient_accumulation_steps > 1
        else ""
    )
    unused = "" if setup.vectors else obstacle(setup.folders, cfg, model.cfg.trainable_towers)
    used = f"not used: {unused}" if unused else "of text and frames from embed.py"
    rows = [
        ("data", _source(folder, part, cfg)) for folder, part in zip(setup.folders, loader.order.parts, strict=True)
    ]
    stored = setup.folders[0].fingerprint["frames"]
    pictures = [("pictures", model.pictures.resizing(stored["size"], stored["resize_mode"]))]
    rows += pictures if "frames" in loader.needs else []
    rows += [
        ("vectors", used),
        ("model", f"{cfg.model.clip}, weights from {setup.origin}; parameters: {towers}"),
        ("training", f"{model.cfg.trainable_towers}: {_millions(model, trained=True)} parameters; losses {losses}"),
        (
            "engine",
            f"{collectives.world_size()} ranks, ZeRO-{setup.stage}, {setup.precision}, global batch {train.batch_size}{pieces}",
        ),
        ("memory", f"{memory.state(setup) / GIB:.2f} GiB a rank for weights, gradients and optimizer"),
        (
            "steps",
            f"{step} done of {train.max_steps}, {train.max_steps * train.batch_size:,} samples; run folder {cfg.run_dir}",
        ),
    ]
    return [f"{name:<10} {text}" for name, text in rows]


def _source(folder, part: int, cfg: RunConfig) -> str:
    epochs = part * cfg.train.max_steps / len(folder)
    return (
        f"{folder.url}: {len(folder)} samples in {len(folder.shards)} shards, "
        f"{part} of a batch's {cfg.train.batch_size}, {epochs:.3g} epochs in all"
    )


def _millions(module: torch.nn.Module, trained: bool = False) -> str:
    return f"{flops.elements(module, trained) / 1e6:.1f}M"


def disk(cfg: RunConfig, setup: RunSetup) -> str:
    """Describe the disk space that the checkpoints need, one more than are kept; UserError if there is less."""
    train, weights, trained = cfg.train, flops.elements(setup.model), flops.elements(setup.model, trained=True)
    one = 4 * weights + trained * (setup.width + (12 if setup.width == 2 or setup.stage else 8))
    count = (
        train.keep_last
        + 1
        + bool(cfg.eval.best_metric)
        + (train.max_steps // train.keep_every if train.keep_every else 0)
    )
    place = next(p for p in [Path(cfg.run_dir).absolute(), *Path(cfg.run_dir).absolute().parents] if p.is_dir())
    there = sum(_size(file) for file in Path(cfg.run_dir, "checkpoints").rglob("*"))
    free = there + shutil.disk_usage(place).free if os.access(place, os.W_OK) else 0
    free = collectives.all_gather_objects(free)[0]  # rank 0's disk decides for all
    needs = f"{count} checkpoints of {one / GIB:.2f} GiB need {count * one / GIB:.2f} GiB"
    if free < count * one:
        raise UserError(
            f"run_dir {cfg.run_dir}: {needs}, and {place} has {free / GIB:.2f}: lower train.keep_last or take another disk"
        )
    return f"{'disk':<10} {needs}; {place} has {free / GIB:.2f}"


def _size(file: Path) -> int:
    """Return the bytes of a file; 0 of a folder, and of one that a live run has just removed."""
    try:
        return file.stat().st_size * file.is_file()
    except FileNotFoundError:
        return 0


class TrialStep(NamedTuple):
    """Holds the measurements of one step at full size."""

    batch: list[Batch]
    loss: float
    step: float  # seconds, of the slowest rank
    read: float  # seconds to read a batch
    peak: float  # GiB, of the fullest rank


def _try(cfg: RunConfig, run: Any, loader: Loader, step: int) -> TrialStep:
    batches, read = [], 0.0
    for k in range(step, step + LOOKED_AT):
        start = time.perf_counter()
        batches.append([loader.batch(k, piece) for piece in range(cfg.train.gradient_accumulation_steps)])
        read = time.perf_counter() - start  # the last one's: the first builds the decoder
    largest = max(batches, key=lambda micros: sum(len(m.segments) + len(m.frames) for m in micros))
    values = []
    for i in range(2):
        engine.set_learning_rate(run, engine.learning_rate(step + i, cfg.train))
        start = time.perf_counter()
        losses, _ = train_step.step(run, largest, cfg)
        values.append(float(collectives.all_reduce_mean(losses["loss"])))  # waits for the device
    took = torch.tensor([time.perf_counter() - start, read, peak_memory(loader.device)], device=loader.device)
    return TrialStep(largest, values[0], *collectives.all_reduce_max(took).tolist())


def _findings(cfg: RunConfig, setup: RunSetup, trial: TrialStep, left: int) -> list[str]:
    if not math.isfinite(trial.loss):
        raise UserError(f"the loss of the first step is {trial.loss}: take bf16 or fp32 in train.precision")
    estimate = memory.estimate(cfg, setup, trial.batch)
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in estimate._asdict().items() if name != "moment")
    size = ", ".join(
        f"{sum(len(getattr(m, kind)) for m in trial.batch)} {kind}" for kind in ("ids", "segments", "frames")
    )
    slower = max(trial.step, trial.read)
    clips = cfg.train.batch_size / slower
    return [
        f"{'batch':<10} the largest of {LOOKED_AT}: {size.replace('ids', 'clips')} on a rank; loss {trial.loss:.4g}",
        f"{'estimate':<10} {estimate.total / GIB:.2f} GiB a rank, in the {estimate.moment}: {parts}",
        f"{'measured':<10} {trial.peak:.2f} of {_memory(setup.device):.1f} GiB at the peak of a step{_in_use(setup.device)}",
        f"{'speed':<10} {clips:.3g} clips/s: {trial.step:.3g} s a step, {trial.read:.3g} s to read a batch",
        f"{'time':<10} {_duration(left * slower)} for {left} steps, without evaluations and checkpoints",
        "dry run: everything is in place; nothing was written",
    ]


def _memory(device: torch.device) -> float:
    """Return the memory of the device in GiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def _in_use(device: torch.device) -> str:
    """Say how much of a GPU's memory is in use, runtime and the allocator's reserve included; nothing of a CPU."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f" without runtime; {(total - free) / GIB:.2f} of the device in use"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"


def _say(lines: list[str]) -> None:
    if collectives.rank() == 0:
        print(*lines, sep="\n", flush=True)


@contextlib.contextmanager
def enough_memory(cfg: RunConfig) -> Iterator[None]:
    """Turn a step, in the block, that does not fit into memory, or into fp16, into a UserError that names the cure."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        train, parts = cfg.train, cfg.train.gradient_accumulation_steps
        clips = train.batch_size // collectives.world_size() // parts
        raise UserError(
            f"{clips} clips at a time do not fit into memory: raise train.gradient_accumulation_steps (now {parts}), "
            f"set train.activation_checkpointing=true, or lower train.batch_size ({train.batch_size})"
        ) from None
    except Exception as error:
        if "loss scale already at minimum" not in str(error):  # DeepSpeed has no kind of its own for it
            raise
        raise UserError(
            f"{watch.phase}: the gradients overflow fp16 with the least loss scale too: take bf16 or fp32 in train.precision, "
            "or lower train.lr"
        ) from None
