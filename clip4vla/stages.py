"""From settings to numbers in one process: train a run unless it is trained, test it unless it is tested.

So that several runs that belong together (folds, rows of an ablation, seeds) are one command under any launcher, which killed
goes on where it was: each run resumes as it would alone.
"""

import gc
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clip4vla import distributed, train
from clip4vla.build import weights_to_evaluate
from clip4vla.checkpoints import newest_checkpoint
from clip4vla.config import RunConfig
from clip4vla.evaluation import check_evaluation, evaluate, write_report


def fit(cfg: RunConfig, ds_config: str | None) -> None:
    """Train up to train.max_steps, if this run's newest checkpoint is not of that step already."""
    distributed.setup(cfg.train.timeout)
    last = f"step-{cfg.train.max_steps:08d}"
    if not _agreed((newest_checkpoint(cfg.run_dir) or Path()).name == last):
        train.train(cfg, ds_config)
        gc.collect()  # engines hold themselves by their hooks; the next run needs the memory


def test(cfg: RunConfig) -> None:
    """Evaluate on data.test: metrics.json, manifest.json and report.html in the run folder."""
    device = distributed.setup()
    check_evaluation(cfg)
    model, origin = weights_to_evaluate(cfg)
    result = evaluate(model.to(device), cfg, origin, print)
    if result:
        print(f"report: {write_report(cfg, origin, *result)}")
    distributed.barrier()


def fit_and_test(cfg: RunConfig, ds_config: str | None) -> dict[str, dict[str, Any]]:
    """Both, as far as they are not done: the metrics on data.test by direction, on all ranks."""
    distributed.setup(cfg.train.timeout)
    file = Path(cfg.run_dir, "eval/test/metrics.json")
    if not _agreed(file.is_file()):
        fit(cfg, ds_config)
        test(cfg)
    return distributed.gather_objects(json.loads(file.read_text()) if distributed.rank() == 0 else None)[0]


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation, which one value does not have."""
    middle = f"{statistics.mean(values):.1f}"
    return f"{middle} ± {statistics.stdev(values):.1f}" if len(values) > 1 else middle


def _agreed(here: bool) -> bool:
    """What rank 0 finds on its disk."""
    return distributed.gather_objects(here)[0]
