"""Fine-tune on official folds: a run for each, and their mean as the result of the whole."""

import copy
import json
import statistics
from pathlib import Path
from typing import Any

from clip4vla.config import RunConfig
from clip4vla.config_io import read_tree, to_dict
from clip4vla.distributed import collectives
from clip4vla.errors import UserError
from clip4vla.evaluation import classification
from clip4vla.io.atomic import removed_if_empty, write_text
from clip4vla.report.evaluations import TEST
from clip4vla.training import pipeline

ONE_LABEL = ("accuracy", "top5", "mAP", "mean_class_accuracy", "majority_baseline")  # figures of a fold
SEVERAL_LABELS = ("mAP", "AUC", "d_prime", "chance_mAP")  # where its clips have several classes


def runs(cfg: RunConfig) -> list[RunConfig]:
    """List one run for each folder of data.test, held out while the others train with data.train; or the run itself."""
    classification.must_be_apart(cfg)
    if not cfg.classify.cross_validate:
        return [cfg]
    names = ["-".join(Path(url).parts[-2:]) for url in cfg.data.test]
    if len(set(names)) < max(2, len(names)):
        raise UserError(
            f"classify.cross_validate=true: data.test must name two folders at least, each with its own name: {names}"
        )
    out = []
    for url, name in zip(cfg.data.test, names, strict=True):
        one = copy.deepcopy(cfg)
        one.run_dir, one.train.mirror = f"{cfg.run_dir}/{name}", pipeline.mirror_url_of(cfg, name)
        one.data.train |= {other: share for other, share in cfg.data.test.items() if other != url}
        one.data.test, one.classify.cross_validate = {url: 1.0}, False
        out.append(one)
    return out


def fit_and_test(cfg: RunConfig, ds_config: str | None) -> None:
    """Train and test all runs, as far as that is not done; of several folds run_dir/eval/NAME/ gets the mean."""
    some = runs(cfg)
    collectives.setup(cfg.train.hang_timeout_minutes)
    if len(some) == 1:
        pipeline.fit(cfg, ds_config)
        return pipeline.test(cfg)
    with removed_if_empty(Path(cfg.run_dir), pipeline.SETTINGS):
        pipeline.check_same_settings(cfg.run_dir, {"run": cfg})
        results = [pipeline.fit_and_test(one, ds_config)["label"] for one in some]
    if collectives.rank() == 0:
        folder = Path(cfg.run_dir, "eval", cfg.eval.name or TEST)
        folder.mkdir(parents=True, exist_ok=True)
        names = [Path(one.run_dir).name for one in some]
        write_text(
            folder / "metrics.json", json.dumps({"label": joined(dict(zip(names, results, strict=True)))}, indent=1)
        )
        write_text(folder / "manifest.json", json.dumps(_manifest(cfg, some), indent=1))
        name = _main(results)
        print(f"{cfg.run_dir}: {name} {pipeline.mean_std([row[name] for row in results])} over {len(results)} folds")


def _main(rows: list[dict[str, Any]]) -> str:
    """Name the figure that stands for a fold: accuracy, or mAP where clips have several classes."""
    return "accuracy" if "accuracy" in rows[0] else "mAP"


def joined(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Join the metrics of folds by name to one row: means, the deviation of accuracy or mAP, sums of clips."""
    values = list(rows.values())
    main = _main(values)
    names = ONE_LABEL if main == "accuracy" else SEVERAL_LABELS
    row: dict[str, Any] = {name: statistics.mean(value[name] for value in values) for name in names}
    row[f"{main}_std"] = statistics.stdev(value[main] for value in values)
    sizes = {
        "n_clips": sum(value["n_clips"] for value in values),
        "n_classes": max(value["n_classes"] for value in values),
    }
    kept = ("accuracy", "top5", "n_clips") if main == "accuracy" else (*SEVERAL_LABELS, "n_clips")
    few = {name: {key: value[key] for key in kept} for name, value in rows.items()}
    return row | sizes | {"n_folds": len(rows), "folds": few}


def _manifest(cfg: RunConfig, some: list[RunConfig]) -> dict[str, Any]:
    """Collect where the folds' own manifests are, and all their sources."""
    files = [str(Path(one.run_dir, "eval", one.eval.name or TEST, "manifest.json")) for one in some]
    trees = [read_tree(Path(file)) for file in files]
    sources = {url: source for tree in trees for url, source in tree["sources"].items()}
    return {"folds": files, "sources": sources, "settings": to_dict(cfg), "versions": trees[0]["versions"]}
