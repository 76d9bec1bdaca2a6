"""What a step gives, as rows of numbers: losses, rates, and what there is to see about the run."""

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clip4vla import distributed, engine
from clip4vla.batch import Batch
from clip4vla.config import RunConfig, UserError


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

    def add(self, losses: dict[str, Tensor], features: dict[str, Tensor], micros: list[Batch]) -> None:
        """Note the losses of one step, without waiting for them."""
        named = {name if name == "loss" else f"loss/{name}": value.detach() for name, value in losses.items()}
        device = losses["loss"].device
        counts = {
            "hidden": sum(micro.hidden_rows.sum() for micro in micros).float().to(device, non_blocking=True),
            "heard": sum(micro.segment_rows.sum() for micro in micros).float().to(device, non_blocking=True),
        }
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


def _peak_memory(device: torch.device) -> float:
    """GiB: the allocator's peak on a GPU, the process's peak resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / engine.GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / engine.GIB
