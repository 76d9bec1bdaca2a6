"""What a step gives, as rows of numbers: losses, rates, and what there is to see about the run.

Every row: step, samples, lr, the losses, hidden_rows (share of the valid spectrogram rows that the masked view hides),
no_audio (share of clips without sound). The last row of each interval, over that interval:

    clips_per_s, data_wait   clips of the global batch a second; share of the time in which this rank waited for data
    tflops, mfu              useful TFLOP/s of a rank (flops.py); on a GPU also their share of its bf16 matrix product rate
    comm_bytes               bytes that a rank passes into collectives in a step (flops.bytes_sent)
    memory_gib, grad_norm    peak of this rank; before clipping
    ranks, gpus or cores     how many there are, and what all of them run on
    alignment, uniformity    of the audio vectors of the last step (Wang & Isola 2020), see audio_space
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clip4vla import distributed, engine, flops
from clip4vla.batch import Batch, Labels
from clip4vla.build import Setup
from clip4vla.classifier import label_of
from clip4vla.config import RunConfig, UserError

# rows hidden, rows valid, clips without sound, clips with text (or a class to learn), FLOPs, norm of the gradient
COUNTS = ("hidden", "heard", "silent", "told", "flops", "norm")
NAMED = 8  # clips of a rank that a message names at most
SKIPPED = 50  # steps in a row that fp16 may skip: a loss scale of 2**32 is 1 after 33
COMPARED = 1024  # clips of a rank whose vectors are compared with each other: their products take 4 MiB


class Meter:
    """Collects what a step gives on the device, and turns it into rows on the logging steps."""

    def __init__(self, cfg: RunConfig, setup: Setup):
        self.cfg, self.device, self.work = cfg, setup.device, flops.Work(setup.model, cfg)
        self.comm_bytes = flops.bytes_sent(setup.model, cfg, setup.stage, setup.width, bool(setup.vectors))
        self.peak = flops.matrix_rate(setup.device) if setup.device.type == "cuda" else 0.0
        cores = torch.get_num_threads() * distributed.world()
        self.devices = ("gpus", distributed.world()) if setup.device.type == "cuda" else ("cores", cores)
        self.names: list[str] = []
        self.pending: list[Tensor] = []  # losses of each step, on the device
        self.counts: list[list[float]] = []
        self.rates: list[float] = []  # of learning
        self.broken: list[Tensor] = []  # of each step, which features of which clips are not finite, on the device
        self.ids: list[list[str]] = []
        self.fp16, self.skipped = setup.precision == "fp16", 0
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

    def add(self, losses: dict[str, Tensor], features: dict[str, Tensor], micros: list[Batch], run: Any) -> None:
        """Note what one step of the engine gave, without waiting for the losses."""
        self.names = [name if name == "loss" else f"loss/{name}" for name in losses]
        self.pending.append(torch.stack([value.detach().float() for value in losses.values()]))
        rows = [int(sum(getattr(m, name).sum() for m in micros)) for name in ("hidden_rows", "segment_rows")]
        silent = sum(len(m) - int(m.has_audio.sum()) for m in micros)
        told = sum(int(m.has_text.sum()) for m in micros)
        if self.cfg.loss.label:
            told = sum(label_of(clip) in self.cfg.model.labels for m in micros for clip in m.meta)
        self.counts.append([*rows, silent, told, self.work.flops(micros), run.get_global_grad_norm()])
        self.rates.append(engine.get_learning_rate(run))
        self.broken.append(_broken(features))
        self.ids.append([name for m in micros for name in m.ids])
        self.features, self.labels = features, [m.labels() for m in micros]

    def rows(self, step: int, run: Any) -> list[dict[str, Any]]:
        """Rows of the steps since the last call; stops the run if a loss, a gradient or a weight is not finite."""
        if not self.pending:
            return []
        counts = torch.tensor([_numbers(row) for row in self.counts], device=self.pending[0].device)
        if not _finite_weights(run.module):
            counts[-1, -1] = torch.nan
        table = distributed.mean(torch.cat([torch.stack(self.pending), counts], 1))
        values = table.tolist()  # waits for the device
        seconds = time.perf_counter() - self.since
        rows = [self._row(step - len(values) + i, row, self.rates[i]) for i, row in enumerate(values)]
        done, norms = sum(row.pop("flops") for row in rows), [row.pop("norm") for row in rows]
        if self.cfg.loss.label and not counts[:, COUNTS.index("told")].any():
            raise UserError(f"no clip of {len(rows)} batches has one of model.labels={self.cfg.model.labels}")
        self._must_be_finite(rows, norms)
        rows[-1] |= {
            "grad_norm": norms[-1],
            "clips_per_s": len(rows) * self.cfg.train.batch_size / seconds,
            "data_wait": self.waited / seconds,
            "tflops": done / seconds / 1e12,
            "comm_bytes": self.comm_bytes,
            "memory_gib": peak_memory(self.device),
            "ranks": distributed.world(),
            self.devices[0]: self.devices[1],
            "time": time.time(),
        }
        rows[-1] |= {"mfu": done / seconds / self.peak} if self.peak else {}
        rows[-1] |= audio_space(self.features, self.labels) if "audio" in self.features else {}
        self.pending, self.counts, self.rates, self.broken, self.ids = [], [], [], [], []
        return rows

    def _must_be_finite(self, rows: list[dict[str, Any]], norms: list[float]) -> None:
        """UserError naming the first step that is not sound. All numbers are the same on all ranks, so all stop."""
        good = f"the last checkpoint in {self.cfg.run_dir}/checkpoints is good"
        cure = f"lower train.lr, or take bf16 or fp32 in train.precision; {good}"
        for i, (row, norm) in enumerate(zip(rows, norms, strict=True)):
            sound = math.isfinite(norm) and norm >= 0  # ZeRO says -1 for one that is not
            if not math.isfinite(row["loss"]):
                raise UserError(f"the loss of step {row['step']} is {row['loss']}, {self._cause(i)}: {cure}")
            if math.isnan(norm) or not (sound or self.fp16):  # which skips such a step and lowers the loss scale
                what = f"the loss is {row['loss']:.4g}, but the gradient, or the weights after it, are not finite"
                raise UserError(f"step {row['step']}: {what}: {cure}")
            self.skipped = 0 if sound else self.skipped + 1
            if self.skipped == SKIPPED:
                raise UserError(f"step {row['step']}: the last {SKIPPED} gradients overflow fp16: {cure}")

    def _cause(self, i: int) -> str:
        """Which features of which clips are not finite in a pending step; all ranks are to ask."""
        broken = self.broken[i].cpu()
        names = [
            name for name, any_clip in zip(_by_clip(self.features), broken.any(1).tolist(), strict=True) if any_clip
        ]
        mine = [
            " ".join(name.split())
            for name, any_feature in zip(self.ids[i], broken.any(0).tolist(), strict=True)
            if any_feature
        ]
        everyone = distributed.gather_objects((" and ".join(names), mine[:NAMED], len(mine)))
        parts = [
            f"{names} not finite in {count} of the {len(broken[0])} clips of rank {rank} ({', '.join(some)})"
            for rank, (names, some, count) in enumerate(everyone)
            if count
        ]
        if sum(count for *_, count in everyone) == self.cfg.train.batch_size:
            return f"{everyone[0][0]} not finite in all clips, so the weights are not"
        return "; ".join(parts) or "all features finite"

    def _row(self, step: int, values: list[float], lr: float) -> dict[str, Any]:
        """What there is for each step."""
        row = dict(zip([*self.names, *COUNTS], values, strict=True))
        hidden, heard, silent, told = (row.pop(name) for name in COUNTS[:4])
        if self.cfg.loss.caption and not told:
            raise UserError(
                f"step {step + 1}: no clip of the batch has a caption to learn (data.languages={self.cfg.data.languages})"
            )
        clips = self.cfg.train.batch_size
        row = {"step": step + 1, "samples": (step + 1) * clips, "lr": lr} | row
        row["no_audio"] = silent * distributed.world() / clips
        return row | ({"hidden_rows": hidden / heard} if heard and self.cfg.loss.aa else {})

    def restart(self) -> None:
        """Start the clock of the next rows."""
        self.waited, self.since = 0.0, time.perf_counter()


def audio_space(features: dict[str, Tensor], labels: list[Labels]) -> dict[str, float]:
    """Alignment and uniformity of unit vectors (b, D), Wang & Isola 2020, over all ranks; absent without pairs.

    alignment: mean |audio - text|^2 of clips that have both (pictures, or the masked view, if no loss needs text).
    uniformity: log of the mean of exp(-2 |a - b|^2) over pairs of audio vectors on one rank, of COMPARED clips at most.
    """
    audio = features["audio"]
    _, has_text, has_frames, has_audio = (torch.cat(part).to(audio.device) for part in zip(*labels, strict=True))
    partners = {"text": has_text, "vision": has_frames, "masked": has_audio}
    name = next(name for name in partners if name in features)
    both = has_audio & partners[name]
    apart = (audio - features[name]).square().sum(1)[both]
    heard = audio[has_audio][:COMPARED]
    near = (4 * (heard @ heard.T) - 4).exp().fill_diagonal_(0)
    pairs = audio.new_tensor(len(heard) * (len(heard) - 1))
    squares, count, kernel, pairs = distributed.all_sum(
        torch.stack([apart.sum(), both.sum(), near.sum(), pairs])
    ).tolist()
    found = {"alignment": squares / count} if count else {}
    return found | ({"uniformity": math.log(kernel / pairs)} if pairs else {})


def _by_clip(features: dict[str, Tensor]) -> list[str]:
    return [name for name in features if name != "scale"]


def _broken(features: dict[str, Tensor]) -> Tensor:
    """Of each feature, by name, and clip whether it is not finite, (features, b) bool: kept, not looked at."""
    return ~torch.stack(
        [features[name].detach().float().reshape(len(features[name]), -1).sum(1) for name in _by_clip(features)]
    ).isfinite()


def _numbers(row: list[Any]) -> list[float]:
    """Without a norm, as ZeRO-0 has none in fp32, 0."""
    return [float(value or 0.0) for value in row]


def _finite_weights(model: torch.nn.Module) -> bool:
    """Whether this rank's trained weights, its part of them under ZeRO-3, are finite: one pass over them, one wait."""
    own = [getattr(p, "ds_tensor", p).detach() for p in model.parameters() if p.requires_grad]
    return bool(torch.stack(torch._foreach_norm([x for x in own if x.numel()], math.inf)).isfinite().all())


def peak_memory(device: torch.device) -> float:
    """GiB: the allocator's peak on a GPU, the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / engine.GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / engine.GIB
