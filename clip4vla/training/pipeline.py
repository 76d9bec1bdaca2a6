"""Get from settings to metrics in one process: train a run unless it is trained, test it unless it is tested.

So that several runs that belong together (folds, rows of an ablation, seeds) are one command under any launcher, which killed
goes on where it was: each run resumes as it would alone.
"""

import gc
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from clip4vla.checkpoints.lookup import newest_checkpoint
from clip4vla.config import RunConfig
from clip4vla.config_io import flatten, parse_yaml, read_tree, to_dict
from clip4vla.distributed import collectives
from clip4vla.distributed.rank_0 import run_on_rank_0
from clip4vla.errors import UserError
from clip4vla.evaluation import classification, manifest
from clip4vla.evaluation.runner import check_evaluation, evaluate, write_report
from clip4vla.io.atomic import removed_if_empty, write_text
from clip4vla.report import evaluations
from clip4vla.report.tracking import watching
from clip4vla.training import train
from clip4vla.training.run_setup import load_eval_model

SETTINGS = "settings.yaml"  # of a folder of several runs


def fit(cfg: RunConfig, ds_config: str | None) -> bool:
    """Train up to train.max_steps; False if this run's newest checkpoint is of that step already."""
    collectives.setup(cfg.train.hang_timeout_minutes)
    last = f"step-{cfg.train.max_steps:08d}"
    if _agreed((newest_checkpoint(cfg.run_dir) or Path()).name == last):
        return False
    train.train(cfg, ds_config)
    gc.collect()  # the next run needs the memory
    return True


def test(cfg: RunConfig) -> None:
    """Evaluate on data.test: metrics.json and manifest.json in run_dir/eval/NAME/, and its page."""
    device = collectives.setup()
    check_evaluation(cfg)
    cfg.classify.labels = classification.class_names(cfg)  # not the name of a file, which may change
    name, failed = run_on_rank_0(lambda _: manifest.choose_name(cfg))
    if failed:
        raise UserError(failed)
    with removed_if_empty(Path(cfg.run_dir)):
        model, origin = load_eval_model(cfg)
        result = evaluate(model.to(device), cfg, name, origin, print)
    if result:
        with watching("report.html", OSError):
            print(f"report: {write_report(cfg, name, origin, *result)}")
    collectives.barrier()


def fit_and_test(cfg: RunConfig, ds_config: str | None) -> dict[str, dict[str, Any]]:
    """Train and test, as far as that is not done, and return the metrics on data.test by direction, on all ranks."""
    trained, name = fit(cfg, ds_config), cfg.eval.name or evaluations.TEST
    file = Path(cfg.run_dir, "eval", name, "metrics.json")
    if trained or not _agreed(file.is_file() and evaluations.page_path(cfg.run_dir, name).is_file()):  # written last
        test(cfg)
    return collectives.all_gather_objects(read_tree(file) if collectives.rank() == 0 else None)[0]


def check_same_settings(folder: str | Path, configs: dict[str, RunConfig]) -> None:
    """Raise UserError if the runs below a folder were begun with other settings, which are written there the first time.

    A setting that the version did not have that wrote them had its default value.
    """
    ours = flatten({name: to_dict(cfg) for name, cfg in configs.items()})
    defaults = flatten({name: to_dict(type(cfg)()) for name, cfg in configs.items()})
    file = Path(folder, SETTINGS)
    theirs = collectives.all_gather_objects(read_tree(file, parse_yaml) if file.is_file() else None)[0]
    if theirs is None and collectives.rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, yaml.safe_dump(ours, sort_keys=False))
    for key in {**ours, **theirs} if theirs else ():
        if theirs.get(key, defaults.get(key)) != ours.get(key):
            raise UserError(
                f"{folder}: its runs have {key}={theirs.get(key)}, not {ours.get(key)}: name another folder"
            )


def mirror_url_of(cfg: RunConfig, name: str) -> str:
    """Return train.mirror of one of several runs: a folder below it, or "" without one."""
    return cfg.train.mirror and f"{cfg.train.mirror.rstrip('/')}/{name}"


def mean_std(values: Sequence[float]) -> str:
    """Format mean ± sample standard deviation, which one value does not have."""
    middle = f"{statistics.mean(values):.1f}"
    return f"{middle} ± {statistics.stdev(values):.1f}" if len(values) > 1 else middle


def _agreed(here: bool) -> bool:
    """Return on all ranks what rank 0 finds on its disk."""
    return collectives.all_gather_objects(here)[0]
