"""What each step of some runs did to the loss scale and the weights: python tests/helpers/overflows.py OUT JSON of cases.

Cases are those of faults/_numbers.py. One may say `left_out`, a step that is not taken, as if its gradient had overflowed.
A run_dir that an earlier case had goes on from the checkpoint before its last one.
"""

import json
import shutil
import sys
from pathlib import Path

import half
import torch
from faults import _numbers

from clip4vla.distributed import collectives

honest = _numbers.honest


def weights(run) -> list[torch.Tensor]:
    """What this rank holds of those that are trained, as they stand."""
    return [getattr(p, "ds_tensor", p).detach().clone() for p in run.module.parameters() if p.requires_grad]


def norm(run) -> float:
    """Of the gradient that is about to be used, 0 where ZeRO keeps it elsewhere and gives its norm."""
    grads = [p.grad.float().norm() for p in run.module.parameters() if p.grad is not None]
    return float(torch.stack([torch.zeros(()), *grads]).norm())


def leave_out(run) -> None:
    """Do what a step does to the engine, but for the update."""
    run.zero_grad()
    run.micro_steps, run.global_steps = run.micro_steps + 1, run.global_steps + 1


def watched(case: dict, rows: list[dict]):
    """accumulation.step, which adds a row."""

    def step(run, micros, cfg):
        before, taken = weights(run), run.step
        norms = []
        last = leave_out if run.global_steps + 1 == case.get("left_out") else type(run).step
        run.step = lambda: (norms.append(norm(run)), last(run))
        losses, features = honest(run, micros, cfg)
        run.step = taken
        moved = [not torch.equal(old, new) for old, new in zip(before, weights(run), strict=True)]
        row = {
            "dtype": str(next(run.module.parameters()).dtype),
            "loss": float(collectives.all_reduce_mean(losses["loss"])),
        }
        row |= {"skipped": run.skipped_steps, "scale": float(getattr(run.optimizer, "cur_scale", 1.0))}
        row |= {"norm": float(run.get_global_grad_norm() or norms[0])}
        rows.append(row | {"moved": sum(collectives.all_gather_objects(any(moved)))})
        return losses, features

    return step


def rows_of(case: dict) -> list[dict]:
    """Of one run, in order; AssertionError if it is not."""
    checkpoints = sorted(Path(case["run_dir"], "checkpoints").glob("step-*"))
    collectives.barrier()
    if checkpoints and collectives.rank() == 0:
        shutil.rmtree(checkpoints[-1])
    collectives.barrier()
    rows: list[dict] = []
    _numbers.honest = watched(case, rows)
    came = _numbers.ended(case | {"words": [*case["words"], f"run_dir={case['run_dir']}"]})
    assert came["said"] == "" and came["finite"], came
    return rows


if __name__ == "__main__":
    half.answer(True)
    collectives.setup()
    found = {case["name"]: rows_of(case) for case in json.loads(sys.argv[2])}
    if collectives.rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
