"""Choose the best checkpoint of a run by a metric of its evaluations on data.val, never on data.test."""

from pathlib import Path
from typing import Any

from clip4vla.config import RunConfig
from clip4vla.config_io import read_tree
from clip4vla.errors import UserError

# what is better if it is higher
HIGHER = tuple(
    "R@1 R@5 R@10 BLEU-1 BLEU-2 BLEU-3 BLEU-4 METEOR ROUGE-L CIDEr accuracy top5 class_mean mAP AUC d_prime".split()
)
LOWER = ("MedR", "MeanR")


def value(metrics: dict[str, dict[str, Any]], select: str) -> float:
    """Pick eval.best_metric of metrics by direction, negated if less is better; UserError if it is not there."""
    direction, _, name = select.rpartition("/")
    known = {key: row for key, row in metrics.items() if isinstance(row, dict)}
    number = known.get(direction, {}).get(name)
    if name not in HIGHER + LOWER or not isinstance(number, int | float):
        directions, names = (
            ", ".join(known),
            ", ".join(k for k in HIGHER + LOWER if k in next(iter(known.values()), {})),
        )
        raise UserError(f"eval.best_metric={select}: no such number; there is {directions}, each with {names}")
    return -number if name in LOWER else number


def best(cfg: RunConfig) -> str:
    """Name the step-NNNNNNNN whose evaluation on data.val is best (of equal ones the first), "" without any."""
    values = {file.parent.name: value(read_tree(file), cfg.eval.best_metric) for file in _evaluations(cfg)}
    top = max(sorted(values), key=lambda name: values[name], default="")
    return top.replace("val", "step")


def kept(cfg: RunConfig) -> set[str]:
    """Name the step-NNNNNNNN that may not be removed: the best one, and one that is still being evaluated."""
    if not cfg.eval.best_metric:
        return set()
    names = [file.parent.name for file in _evaluations(cfg)]
    begun = [folder.name for folder in Path(cfg.run_dir, "eval").glob("val-*") if folder.name > max(names, default="")]
    return {best(cfg), *(name.replace("val", "step") for name in begun)} - {""}


def _evaluations(cfg: RunConfig) -> list[Path]:
    return [*Path(cfg.run_dir, "eval").glob("val-*/metrics.json")]
