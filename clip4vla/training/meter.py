"""The rows of metrics.jsonl: losses and shares of each step, rates of each interval between two logging steps.

Every row: step, samples, lr, the losses, masked_fraction (of the valid spectrogram rows, hidden in the masked view),
no_audio_fraction (of the clips). The last row of each interval, over that interval:

    clips_per_s              clips of the global batch a second
    data_wait_fraction       share of the time in which this rank waited for data
    tflops, mfu              useful TFLOP/s of a rank (flops.py); on a GPU also their share of its bf16 matrix product rate
    comm_bytes               bytes that a rank passes into collectives in a step (flops.bytes_sent)
    memory_gib, grad_norm    peak of this rank; before clipping
    ranks, gpus or cores     how many there are, and what all of them run on
    alignment, uniformity    of the audio vectors of the last step (Wang & Isola 2020), see audio_space
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip4vla.config import RunConfig
from clip4vla.data.batch import Batch, Labels
from clip4vla.distributed import collectives
from clip4vla.errors import UserError
from clip4vla.models.classifier import known_labels
from clip4vla.training import engine, flops
from clip4vla.training.run_setup import RunSetup

NAMED = 8  # clips of a rank that a message names at most
SKIPPED = 50  # steps in a row that fp16 may skip: a loss scale of 2**32 is 1 after 33
COMPARED = 1024  # clips of a rank whose vectors are compared with each other: their products take 4 MiB


@dataclass
class StepStats:
    """Holds what is counted in one step on this rank, or the means over the ranks."""

    masked_rows: float  # spectrogram rows that the masked view hides
    valid_rows: float
    no_audio: float  # clips without sound
    with_target: float  # clips with text, or with a class to learn
    flops: float
    # before clipping, as the engine gives it: a number or a tensor, None from ZeRO-0 in fp32, -1 from ZeRO if not finite
    grad_norm: Any

    def numbers(self) -> list[float]:
        """Return the fields in order as floats, 0 for None; waits for a device where a number lies there."""
        return [float(value or 0.0) for value in vars(self).values()]


@dataclass
class PendingStep:
    """Keeps one step of this rank until its row is made; tensors stay on the device."""

    losses: Tensor  # of each of Meter.names
    stats: StepStats
    learning_rate: float
    not_finite: Tensor  # (features, b) bool: which features of which clips are not finite
    ids: list[str]  # of the b clips


@dataclass
class NotFiniteClips:
    """Names the clips of one rank that have features that are not finite."""

    features: str  # their names, joined
    ids: list[str]  # the first NAMED of them
    count: int


class Meter:
    """Collects losses and counts of each step without waiting for the device, and makes rows of them on logging steps."""

    def __init__(self, cfg: RunConfig, setup: RunSetup):
        self.cfg, self.device = cfg, setup.device
        self.flop_counter = flops.FlopCounter(setup.model, cfg)
        widths = setup.width, setup.sent_width
        self.comm_bytes = flops.bytes_sent(setup.model, cfg, setup.stage, *widths, bool(setup.vectors))
        self.peak = flops.matrix_rate(setup.device) if setup.device.type == "cuda" else 0.0
        cores = torch.get_num_threads() * collectives.world_size()
        self.devices = ("gpus", collectives.world_size()) if setup.device.type == "cuda" else ("cores", cores)
        self.names: list[str] = []
        self.pending: list[PendingStep] = []
        self.fp16 = setup.precision == "fp16"
        self.skipped = 0  # steps in a row whose gradient overflowed
        self.waited = 0.0
        self.since = time.perf_counter()

    def timed(self, batches: Iterator) -> Iterator:
        """Yield the batches, and count the time spent waiting for them."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, losses: dict[str, Tensor], features: dict[str, Tensor], micros: list[Batch], run: Any) -> None:
        """Keep what one step of the engine gave, without waiting for the device."""
        self.names = [name if name == "loss" else f"loss/{name}" for name in losses]
        step = PendingStep(
            losses=torch.stack([value.detach().float() for value in losses.values()]),
            stats=self._stats(micros, run),
            learning_rate=engine.get_learning_rate(run),
            not_finite=_not_finite(features),
            ids=[name for m in micros for name in m.ids],
        )
        self.pending.append(step)
        self.features, self.labels = features, [m.labels() for m in micros]

    def _stats(self, micros: list[Batch], run: Any) -> StepStats:
        """Count what the micro-batches of a step hold."""
        if self.cfg.loss.label:
            with_target = sum(bool(known_labels(clip, self.cfg.model)) for m in micros for clip in m.meta)
        else:
            with_target = sum(int(m.has_text.sum()) for m in micros)
        return StepStats(
            masked_rows=int(sum(m.hidden_rows.sum() for m in micros)),
            valid_rows=int(sum(m.segment_rows.sum() for m in micros)),
            no_audio=sum(len(m) - int(m.has_audio.sum()) for m in micros),
            with_target=with_target,
            flops=self.flop_counter.flops(micros),
            grad_norm=run.get_global_grad_norm(),
        )

    def rows(self, step: int, run: Any) -> list[dict[str, Any]]:
        """Make rows of the steps since the last call; UserError if a loss, a gradient or a weight is not finite."""
        if not self.pending:
            return []
        means = self._means_over_ranks(weights_finite=_finite_weights(run.module))
        seconds = time.perf_counter() - self.since
        first = step - len(means)
        rows = [
            self._row(first + i, losses, stats, pending.learning_rate)
            for i, ((losses, stats), pending) in enumerate(zip(means, self.pending, strict=True))
        ]
        if self.cfg.loss.label and not any(pending.stats.with_target for pending in self.pending):
            raise UserError(f"no clip of {len(rows)} batches has one of model.labels={self.cfg.model.labels}")
        grad_norms = [stats.grad_norm for _, stats in means]
        self._must_be_finite(rows, grad_norms)
        done = sum(stats.flops for _, stats in means)
        rows[-1] |= {"grad_norm": grad_norms[-1]} | self._interval(len(rows), done, seconds)
        self.pending = []
        return rows

    def _means_over_ranks(self, weights_finite: bool) -> list[tuple[dict[str, float], StepStats]]:
        """Average losses by name and counts of each pending step over the ranks, in one collective; waits for the device.

        weights_finite: if not so on any rank, the norm of the last step's gradient becomes nan, on all of them.
        """
        if not weights_finite:
            self.pending[-1].stats.grad_norm = math.nan
        losses = torch.stack([step.losses for step in self.pending])
        stats = torch.tensor([step.stats.numbers() for step in self.pending], device=losses.device)
        means = collectives.all_reduce_mean(torch.cat([losses, stats], 1)).tolist()
        count = len(self.names)
        return [(dict(zip(self.names, row[:count], strict=True)), StepStats(*row[count:])) for row in means]

    def _interval(self, steps: int, done: float, seconds: float) -> dict[str, Any]:
        """Compute the rates of an interval of `steps` steps and `seconds`, in which a rank has done `done` useful FLOPs."""
        rates = {
            "clips_per_s": steps * self.cfg.train.batch_size / seconds,
            "data_wait_fraction": self.waited / seconds,
            "tflops": done / seconds / 1e12,
            "comm_bytes": self.comm_bytes,
            "memory_gib": peak_memory(self.device),
            "ranks": collectives.world_size(),
            self.devices[0]: self.devices[1],
            "time": time.time(),
        }
        if self.peak:
            rates["mfu"] = done / seconds / self.peak
        if "audio" in self.features:
            rates |= audio_space(self.features, self.labels)
        return rates

    def _must_be_finite(self, rows: list[dict[str, Any]], grad_norms: list[float]) -> None:
        """Raise UserError for the first step that is not sound. All numbers are the same on all ranks, so all stop."""
        good = f"the last checkpoint in {self.cfg.run_dir}/checkpoints is good"
        cure = f"lower train.lr, or take bf16 or fp32 in train.precision; {good}"
        for pending, row, norm in zip(self.pending, rows, grad_norms, strict=True):
            sound = math.isfinite(norm) and norm >= 0  # ZeRO says -1 for one that is not
            if not math.isfinite(row["loss"]):
                raise UserError(f"the loss of step {row['step']} is {row['loss']}, {self._cause(pending)}: {cure}")
            if math.isnan(norm) or not (sound or self.fp16):  # which skips such a step and lowers the loss scale
                what = f"the loss is {row['loss']:.4g}, but the gradient, or the weights after it, are not finite"
                raise UserError(f"step {row['step']}: {what}: {cure}")
            self.skipped = 0 if sound else self.skipped + 1
            if self.skipped == SKIPPED:
                raise UserError(f"step {row['step']}: the last {SKIPPED} gradients overflow fp16: {cure}")

    def _cause(self, step: PendingStep) -> str:
        """Describe which features of which clips of a step are not finite, on any rank; all ranks are to ask."""
        by_rank: list[NotFiniteClips] = collectives.all_gather_objects(self._not_finite_clips(step))
        if sum(clips.count for clips in by_rank) == self.cfg.train.batch_size:
            return f"{by_rank[0].features} not finite in all clips, so the weights are not"
        parts = [
            f"{clips.features} not finite in {clips.count} of the {len(step.ids)} clips of rank {rank} ({', '.join(clips.ids)})"
            for rank, clips in enumerate(by_rank)
            if clips.count
        ]
        return "; ".join(parts) or "all features finite"

    def _not_finite_clips(self, step: PendingStep) -> NotFiniteClips:
        """Find this rank's clips of a step with features that are not finite."""
        not_finite = step.not_finite.cpu()
        by_feature, by_clip = not_finite.any(1).tolist(), not_finite.any(0).tolist()
        names = [name for name, bad in zip(_by_clip(self.features), by_feature, strict=True) if bad]
        ids = [" ".join(name.split()) for name, bad in zip(step.ids, by_clip, strict=True) if bad]
        return NotFiniteClips(" and ".join(names), ids[:NAMED], len(ids))

    def _row(self, step: int, losses: dict[str, float], stats: StepStats, learning_rate: float) -> dict[str, Any]:
        """Make the row of one step from means over the ranks."""
        if self.cfg.loss.caption and not stats.with_target:
            raise UserError(
                f"step {step + 1}: no clip of the batch has a caption to learn (data.languages={self.cfg.data.languages})"
            )
        clips = self.cfg.train.batch_size
        row = {"step": step + 1, "samples": (step + 1) * clips, "lr": learning_rate} | losses
        row["no_audio_fraction"] = stats.no_audio * collectives.world_size() / clips
        if self.cfg.loss.aa and stats.valid_rows:
            row["masked_fraction"] = stats.masked_rows / stats.valid_rows
        return row

    def restart(self) -> None:
        """Start the clock of the next rows."""
        self.waited, self.since = 0.0, time.perf_counter()


def audio_space(features: dict[str, Tensor], labels: list[Labels]) -> dict[str, float]:
    """Compute alignment and uniformity of unit vectors (b, D), Wang & Isola 2020, over all ranks; absent without pairs.

    alignment: mean |audio - text|^2 of clips that have both (pictures, or the masked view, if no loss needs text).
    uniformity: log of the mean of exp(-2 |a - b|^2) over pairs of audio vectors on one rank, of COMPARED clips at most.
    """
    audio = features["audio"]
    _, has_text, has_frames, has_audio = (torch.cat(part).to(audio.device) for part in zip(*labels, strict=True))
    partners = {"text": has_text, "vision": has_frames, "masked": has_audio}
    name = next(name for name in partners if name in features)
    both = has_audio & partners[name]
    apart = (audio - features[name]).square().sum(1)[both]
    compared = audio[has_audio][:COMPARED]
    near = (4 * (compared @ compared.T) - 4).exp().fill_diagonal_(0)
    pairs = audio.new_tensor(len(compared) * (len(compared) - 1))
    squares, count, kernel, pairs = collectives.all_reduce_sum(
        torch.stack([apart.sum(), both.sum(), near.sum(), pairs])
    ).tolist()
    values = {}
    if count:
        values["alignment"] = squares / count
    if pairs:
        values["uniformity"] = math.log(kernel / pairs)
    return values


def _by_clip(features: dict[str, Tensor]) -> list[str]:
    """List the features that have a row for each clip."""
    return [name for name in features if name != "scale"]


def _not_finite(features: dict[str, Tensor]) -> Tensor:
    """Mark the features, in the order of _by_clip, and clips that are not finite, (features, b) bool, without a wait."""
    sums = [features[name].detach().float().reshape(len(features[name]), -1).sum(1) for name in _by_clip(features)]
    return ~torch.stack(sums).isfinite()


def _finite_weights(model: torch.nn.Module) -> bool:
    """Check that this rank's trained weights, its part of them under ZeRO-3, are finite: one pass over them, one wait."""
    local = [getattr(p, "ds_tensor", p).detach() for p in model.parameters() if p.requires_grad]
    return bool(torch.stack(torch._foreach_norm([x for x in local if x.numel()], math.inf)).isfinite().all())


def peak_memory(device: torch.device) -> float:
    """Return the peak in GiB: the allocator's on a GPU, the process's resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / engine.GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / engine.GIB
