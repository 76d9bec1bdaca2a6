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

# rows hidden, rows valid, clips without sound, clips with text (or a class to learn), FLOPs
COUNTS = ("hidden", "heard", "silent", "told", "flops")
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

    def add(self, losses: dict[str, Tensor], features: dict[str, Tensor], micros: list[Batch]) -> None:
        """Note the losses of one step, without waiting for them."""
        self.names = [name if name == "loss" else f"loss/{name}" for name in losses]
        self.pending.append(torch.stack([value.detach().float() for value in losses.values()]))
        rows = [int(sum(getattr(m, name).sum() for m in micros)) for name in ("hidden_rows", "segment_rows")]
        silent = sum(len(m) - int(m.has_audio.sum()) for m in micros)
        told = sum(int(m.has_text.sum()) for m in micros)
        if self.cfg.loss.label:
            told = sum(label_of(clip) in self.cfg.model.labels for m in micros for clip in m.meta)
        self.counts.append([*rows, silent, told, self.work.flops(micros)])
        self.features, self.labels = features, [m.labels() for m in micros]

    def rows(self, step: int, run: Any) -> list[dict[str, Any]]:
        """Rows of the steps since the last call; stops the run if a loss is not finite."""
        if not self.pending:
            return []
        counts = torch.tensor(self.counts, device=self.pending[0].device)
        table = distributed.mean(torch.cat([torch.stack(self.pending), counts], 1))
        values = table.tolist()  # waits for the device
        seconds = time.perf_counter() - self.since
        rows = [self._row(step - len(values) + i, row) for i, row in enumerate(values)]
        done = sum(row.pop("flops") for row in rows)
        if self.cfg.loss.label and not counts[:, COUNTS.index("told")].any():
            raise UserError(f"no clip of {len(rows)} batches has one of model.labels={self.cfg.model.labels}")
        _must_be_finite(rows, self.cfg.run_dir)
        rows[-1] |= {
            "grad_norm": float(run.get_global_grad_norm() or 0.0),
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
        self.pending, self.counts = [], []
        return rows

    def _row(self, step: int, values: list[float]) -> dict[str, Any]:
        """What there is for each step."""
        row = dict(zip([*self.names, *COUNTS], values, strict=True))
        hidden, heard, silent, told = (row.pop(name) for name in COUNTS[:4])
        if self.cfg.loss.caption and not told:
            raise UserError(
                f"step {step + 1}: no clip of the batch has a caption to learn (data.languages={self.cfg.data.languages})"
            )
        clips, lr = self.cfg.train.batch_size, engine.learning_rate(step, self.cfg.train)
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


def _must_be_finite(rows: list[dict[str, Any]], run_dir: str) -> None:
    """UserError naming the first step whose loss is not finite; the value is the same on all ranks, so all stop."""
    for row in rows:
        if not math.isfinite(row["loss"]):
            raise UserError(
                f"the loss of step {row['step']} is {row['loss']}: lower train.lr, or take bf16 or fp32 in train.precision; "
                f"the last checkpoint in {run_dir}/checkpoints is good"
            )


def peak_memory(device: torch.device) -> float:
    """GiB: the allocator's peak on a GPU, the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / engine.GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / engine.GIB
