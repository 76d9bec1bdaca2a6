"""Fine-tuning on official folds: a run for each, and their mean as the result of the whole."""

import copy
import json
import statistics
from pathlib import Path
from typing import Any

from clip4vla import classification, distributed, stages
from clip4vla.config import RunConfig, UserError
from clip4vla.files import write_text
from clip4vla.settings import read_tree, to_dict


def runs(cfg: RunConfig) -> list[RunConfig]:
    """One for each folder of data.test, held out while the others train with data.train; or the run itself."""
    classification.must_be_apart(cfg)
    if cfg.classify.held_out == "together":
        return [cfg]
    names = ["-".join(Path(url).parts[-2:]) for url in cfg.data.test]
    if len(set(names)) < max(2, len(names)):
        raise UserError(
            f"classify.held_out=in_turn: data.test must name two folders at least, each with its own name: {names}"
        )
    out = []
    for url, name in zip(cfg.data.test, names, strict=True):
        one = copy.deepcopy(cfg)
        one.run_dir, one.train.mirror = f"{cfg.run_dir}/{name}", stages.own_mirror(cfg, name)
        one.data.train |= {other: share for other, share in cfg.data.test.items() if other != url}
        one.data.test, one.classify.held_out = {url: 1.0}, "together"
        out.append(one)
    return out


def fit_and_test(cfg: RunConfig, ds_config: str | None) -> None:
    """All of them, as far as they are not done; of several folds run_dir/eval/test/ gets the mean, as a run has it."""
    some = runs(cfg)
    distributed.setup(cfg.train.timeout)
    if len(some) == 1:
        stages.fit(cfg, ds_config)
        return stages.test(cfg)
    stages.must_be_the_same(cfg.run_dir, {"run": cfg})
    found = [stages.fit_and_test(one, ds_config)["label"] for one in some]
    if distributed.rank() == 0:
        folder = Path(cfg.run_dir, "eval/test")
        folder.mkdir(parents=True, exist_ok=True)
        names = [Path(one.run_dir).name for one in some]
        write_text(
            folder / "metrics.json", json.dumps({"label": joined(dict(zip(names, found, strict=True)))}, indent=1)
        )
        write_text(folder / "manifest.json", json.dumps(_manifest(cfg, some), indent=1))
        print(f"{cfg.run_dir}: accuracy {stages.spread([row['accuracy'] for row in found])} over {len(found)} folds")


def joined(rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Metrics of folds by name as one: means, the deviation of accuracy, sums of clips."""
    values = list(rows.values())
    names = ("accuracy", "top5", "class_mean", "commonest")
    row: dict[str, Any] = {name: statistics.mean(value[name] for value in values) for name in names}
    row["deviation"] = statistics.stdev(value["accuracy"] for value in values)
    sizes = {
        "n_clips": sum(value["n_clips"] for value in values),
        "n_classes": max(value["n_classes"] for value in values),
    }
    few = {name: {key: value[key] for key in ("accuracy", "top5", "n_clips")} for name, value in rows.items()}
    return row | sizes | {"n_folds": len(rows), "folds": few}


def _manifest(cfg: RunConfig, some: list[RunConfig]) -> dict[str, Any]:
    """Where the folds' own manifests are, and all their sources."""
    files = [str(Path(one.run_dir, "eval/test/manifest.json")) for one in some]
    trees = [read_tree(Path(file)) for file in files]
    sources = {url: source for tree in trees for url, source in tree["sources"].items()}
    return {"folds": files, "sources": sources, "settings": to_dict(cfg), "versions": trees[0]["versions"]}
