"""Add up what runs cost, from their own logs, beside the paper's 48 V100 days.

Time is that of the steps that count, with their waiting for data; start-up, checkpoints, evaluations and steps done twice after
a kill are not in it.
"""

from collections.abc import Sequence
from typing import Any

from clip4vla.checkpoints.lookup import newest_checkpoint
from clip4vla.errors import UserError
from clip4vla.models.model import Model
from clip4vla.report.tracking import read_rows
from clip4vla.training import flops

PAPER = ["CLIP4VLA (paper)", "3.2 M, 10 times", "88", "-", "1,152 GPU h (48 V100 days)", "-"]
DEVICES = {"gpus": "GPU", "cores": "CPU core"}
HEAD = ["run", "clips seen", "trained, M", "all parameters, M", "hours", "useful FLOPs"]


def of_run(run: str) -> dict[str, Any]:
    """Compute a run's cost: clips, device hours by kind (gpus or cores), FLOPs, parameters in all and trained.

    Raises UserError for a run without a log or checkpoint, or whose log does not say what it ran on.
    """
    rows, checkpoint = read_rows(run), newest_checkpoint(run)
    if not rows or not checkpoint:
        raise UserError(f"{run}: no run with metrics.jsonl and a checkpoint there")
    model = Model.from_checkpoint(checkpoint)
    model.freeze()
    return of_log(run, rows) | {"parameters": flops.elements(model), "trained": flops.elements(model, trained=True)}


def of_log(run: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compute clips, hours and FLOPs from the rows of a log; raises UserError if they do not say what it ran on."""
    try:
        return _total(rows)
    except (LookupError, TypeError, ValueError, StopIteration, ZeroDivisionError, OverflowError):
        raise UserError(
            f"{run}: its log is of an older version, which did not note the devices: train it again"
        ) from None


def _total(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {"clips": int(rows[-1]["samples"]), "hours": {}, "flops": 0.0}
    before = 0
    for row in rows:
        if "clips_per_s" in row:
            kind = next(kind for kind in DEVICES if kind in row)
            seconds = (row["samples"] - before) / row["clips_per_s"]
            total["hours"][kind] = total["hours"].get(kind, 0.0) + seconds * row[kind] / 3600
            total["flops"] += row["tflops"] * 1e12 * seconds * row["ranks"]
            before = row["samples"]
    return total


def table(runs: Sequence[str]) -> str:
    """Format the costs of runs as a Markdown table, the paper's line first."""
    lines = [HEAD, ["---", *["---:"] * (len(HEAD) - 1)], PAPER]
    for run in runs:
        cost = of_run(run)
        hours = " + ".join(f"{value:.3g} {DEVICES[kind]} h" for kind, value in cost["hours"].items())
        sizes = [f"{cost[name] / 1e6:.1f}" for name in ("trained", "parameters")]
        lines.append([run, f"{cost['clips']:,}", *sizes, hours, f"{cost['flops']:.2e}"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
