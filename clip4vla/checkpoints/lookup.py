"""Find the checkpoints in a run's own folder: the complete ones, the newest, the one to evaluate, those to remove."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clip4vla.checkpoints import best
from clip4vla.config import RunConfig
from clip4vla.config_io import parse_json
from clip4vla.errors import UserError, one_line

STEP = re.compile(r"step-\d{8}")  # the name of a whole checkpoint, and no other


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """Find the newest complete checkpoint of a run: a folder is named step-NNNNNNNN only when all of it is on the disk."""
    return max(complete_checkpoints(Path(run_dir, "checkpoints")), default=None)


def complete_checkpoints(folder: Path) -> list[Path]:
    """List the complete checkpoints in RUN_DIR/checkpoints, in no order."""
    return [path for path in folder.glob("step-*") if STEP.fullmatch(path.name)]


def read_metadata(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json: model, step, ranks, zero_stage, sample order.

    Raises UserError if it is unreadable or belongs to another step.
    """
    try:
        meta = parse_json((checkpoint / "config.json").read_bytes())
        step, *layout = (meta[key] for key in ("step", "ranks", "zero_stage"))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise corrupt_error(checkpoint, f"config.json: {one_line(error)}") from None
    if step != int(checkpoint.name[5:]) or not all(type(number) is int for number in (step, *layout)):
        raise corrupt_error(checkpoint, f"config.json says step {step}, ranks and ZeRO stage {layout}")
    return meta


def corrupt_error(checkpoint: Path, why: str) -> UserError:
    """Make the error that says why a run cannot continue from a checkpoint, and what to do."""
    return UserError(f"{checkpoint}: cannot be continued from ({why}); remove it to go on from the one before")


def chosen_checkpoint(cfg: RunConfig) -> Path | None:
    """Find the checkpoint to evaluate: the best one by eval.best_metric, or the newest complete one without that setting.

    Raises UserError if the best one is not there.
    """
    if not cfg.eval.best_metric:
        return newest_checkpoint(cfg.run_dir)
    name = best.best(cfg)
    folder = Path(cfg.run_dir, "checkpoints", name)
    if not name or not folder.is_dir():
        missing = f"{folder} is gone" if name else f"{cfg.run_dir}/eval has no evaluation on data.val"
        raise UserError(
            f"eval.best_metric={cfg.eval.best_metric}: {missing}; eval.best_metric= evaluates the newest checkpoint"
        )
    return folder


def expired(names: Iterable[str], cfg: RunConfig) -> list[str]:
    """Select the checkpoint names (step-NNNNNNNN) that train.keep_last, train.keep_every and eval.best_metric do not keep."""
    kept, every = best.kept(cfg), cfg.train.keep_every
    old = [name for name in sorted(names)[: -cfg.train.keep_last] if name not in kept]
    return [name for name in old if not every or int(name[5:]) % every]
