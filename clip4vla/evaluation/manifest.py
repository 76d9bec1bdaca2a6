"""Write manifest.json beside metrics.json: what a number was computed from, so that it can be computed again.

And name evaluations by that, so that those of other data or settings lie beside each other in RUN/eval/NAME/.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from clip4vla.config import RunConfig
from clip4vla.config_io import parse_yaml, read_tree, to_dict
from clip4vla.data.loader import Loader, open_folders
from clip4vla.errors import UserError
from clip4vla.io.atomic import write_text
from clip4vla.report import tracking
from clip4vla.report.evaluations import TEST, VALIDATION, by_setting

# settings that decide the numbers, beside the data and the run's weights: of each task, and of its own
DECIDING = (
    "seed", "data.languages", "eval.task", "eval.captions", "eval.best_metric", "model.clip", "model.head", "model.modalities",
    "model.audio_type", "model.media_mean", "model.spectrogram_norm", "model.text_tokens", "model.max_tokens", "model.max_frames",
)  # fmt: skip
OF_TASK = {
    "zero_shot": ("eval.audio_types",),
    "retrieval": ("eval.missing_audio", "data.train"),
    "captioning": ("decode", "data.train"),
    "classification": ("classify", "data.train"),
}
LONGEST = 120  # bytes of a name that is made here; file systems take 255


def check_name(name: str) -> None:
    """Raise UserError for an eval.name that is no name of a folder, or one of training's own."""
    if name and (not re.fullmatch(r"\w[\w.,=+-]*", name) or name.startswith(VALIDATION) or len(name.encode()) > 200):
        raise UserError(
            f"eval.name={name}: must be one folder's name of letters, digits and . , = + - _, of at most 200 bytes, and "
            f"not begin with {VALIDATION}, as evaluations during training do; choose another"
        )


def choose_name(cfg: RunConfig) -> str:
    """Choose the folder below RUN/eval of an evaluation on data.test: eval.name, or a name by data and settings.

    TEST has the run's own data.test and settings, which are those in its config.yaml, or without one those of its first
    evaluation. Other data are named by the shortest ending of their folders' paths that no other data have, as SOURCE-SPLIT;
    other settings that decide the numbers follow as ,KEY=VALUE. Raises UserError where another evaluation has that name.
    """
    shards = {shard.sha256 for folder in open_folders(cfg.data.test, "data.test", cfg.data) for shard in folder.shards}
    for name in [cfg.eval.name] if cfg.eval.name else _names(cfg, shards):
        other = _other(cfg, name, shards)
        if not other:
            return name
    raise UserError(
        f"eval.name={cfg.eval.name}: {cfg.run_dir}/eval/{name} has an evaluation {other}; give this one a name of its own, "
        "eval.name=NAME, or remove that folder"
    )


def replaced(folder: Path, weights: dict[str, Any]) -> str:
    """Say which other weights the evaluation in a folder is of; "" if it is of these, or there is none."""
    old = _read(folder).get("checkpoint")
    if not isinstance(old, dict) or old.get("sha256", old) == weights.get("sha256", weights):
        return ""
    return f"{old.get('folder', '')}, step {old.get('step')}"


def _names(cfg: RunConfig, shards: set[str]) -> list[str]:
    """List names of an evaluation by its data and settings, to be tried in turn."""
    config, first = Path(cfg.run_dir, "config.yaml"), _read(Path(cfg.run_dir, "eval", TEST))
    tested = first["settings"] if first else {}
    own = read_tree(config, parse_yaml) if config.is_file() else tested
    test = by_setting(own).get("data.test") or by_setting(tested).get("data.test") or cfg.data.test
    if _places(test) == _places(cfg.data.test) or first and _shards(first) == shards:
        names = [TEST]
    else:
        names = _endings(_places(cfg.data.test))
    more = "".join(f",{key}={_word(value)}" for key, (value, _) in _differing(cfg, own).items())
    return [_shortened(name + more) for name in names]


def _endings(places: list[str]) -> list[str]:
    """List the last two parts of paths as a name, the last three, and so on; none is TEST or one of training's."""
    most = max(2, *(place.count("/") + 1 for place in places))
    names = (_word(places, parts).lstrip(".") for parts in range(2, most + 1))
    return [f"data-{name}" if name == TEST or name.startswith(VALIDATION) else name for name in names]


def _places(urls: Any) -> list[str]:
    """Return where shard folders lie, sorted, without what URLs hide: absolute paths, or HOST/PATH."""
    urls = urls if isinstance(urls, dict | list) else []
    bare = (
        re.sub(r"^\w+://([^/]*@)?|[?#].*$", "", str(url)) if "://" in str(url) else os.path.abspath(str(url))
        for url in urls
    )
    return sorted(place.strip("/") for place in bare)


def _differing(cfg: RunConfig, settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return by dotted key the (own, other) values that decide the numbers and differ in settings, where these know the key."""
    ours, theirs = (_deciding(by_setting(tree), cfg.eval.task) for tree in (to_dict(cfg), settings))
    return {key: (ours[key], theirs[key]) for key in sorted(ours.keys() & theirs.keys()) if ours[key] != theirs[key]}


def _deciding(flat: dict[str, Any], task: str) -> dict[str, Any]:
    """Select what decides the numbers of a task from settings by dotted key."""
    names = (*DECIDING, *OF_TASK.get(task, ()))
    chosen = {key: value for key, value in flat.items() if key in names or key.partition(".")[0] in names}
    if "data.train" in chosen:
        chosen["data.train"] = _places(chosen["data.train"])
    if isinstance(types := chosen.get("eval.audio_types"), list):  # the first is the main one
        chosen["eval.audio_types"] = (types or [flat.get("model.audio_type")])[0]
    if "train.max_steps" in flat:  # 0: not the run's own weights
        chosen["init_from"] = flat.get("init_from") if flat["train.max_steps"] == 0 else "the run's own"
    return chosen


def _word(value: Any, parts: int = 2) -> str:
    """Return a value as part of a folder's name, of a path its last parts."""
    texts = map(str, value) if isinstance(value, list | dict) else [str(value)]
    return re.sub(r"[^\w.+-]+", "_", "+".join("-".join(text.split("/")[-parts:]) for text in texts))


def _shortened(name: str) -> str:
    """Cut a long name, and end it with a hash of all of it."""
    if len(name.encode()) <= LONGEST:
        return name
    return f"{name.encode()[: LONGEST - 9].decode(errors='ignore')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _other(cfg: RunConfig, name: str, shards: set[str]) -> str:
    """Say which other evaluation has this name: of other data, or with other settings; "" if none."""
    folder = Path(cfg.run_dir, "eval", name)
    tree = _read(folder) if (folder / "metrics.json").is_file() else {}
    if not tree:
        return ""
    if _shards(tree) != shards:
        return f"of other shards ({', '.join(tree['sources'])})"
    return ", ".join(
        f"with {key}={theirs}, not {ours}" for key, (ours, theirs) in _differing(cfg, tree["settings"]).items()
    )


def write(
    path: Path,
    loader: Loader,
    clips: dict[int, dict],
    cfg: RunConfig,
    weights: dict[str, Any],
    protocol: dict[str, Any],
) -> None:
    """Write the manifest of an evaluation to path.

    clips: json of those used, by their place in the loader's order; weights: where they come from; protocol: entries of
    the task.
    """
    used = [clips[i]["id"] for i in sorted(clips)]
    missing = [_key(loader, i) for i in range(len(loader.order.places)) if i not in clips]
    captions = json.dumps([[clips[i]["id"], clips[i]["captions"]] for i in sorted(clips)], ensure_ascii=False)
    tree = {
        "sources": {folder.url: _source(folder) for folder in loader.folders},
        "checkpoint": weights,
        **protocol,
        "captions_sha256": hashlib.sha256(captions.encode()).hexdigest(),
        "n_ids": len(used),
        "ids": used,
        "missing": missing,
        "settings": to_dict(cfg),
        "versions": tracking.versions() | {"git": tracking.git_commit()},
    }
    write_text(path, json.dumps(tree, ensure_ascii=False, indent=1))


def of_checkpoint(folder: Path) -> dict[str, Any]:
    """Describe a checkpoint's weights: folder, step and SHA-256."""
    with open(folder / "model.safetensors", "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    step = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("step")
    return {"folder": str(folder), "step": step, "sha256": digest}


def _read(folder: Path) -> dict[str, Any]:
    """Read the manifest in a folder; nothing if there is none, or if it says too little: such numbers are of no use."""
    try:
        tree = read_tree(folder / "manifest.json")
        return tree if _shards(tree) and isinstance(tree["settings"], dict) else {}
    except (UserError, LookupError, TypeError, AttributeError):
        return {}


def _shards(manifest: dict[str, Any]) -> set[str]:
    """Collect the SHA-256 of the shards that a manifest names."""
    return {sha256 for source in manifest["sources"].values() for sha256 in source["shards_sha256"].values()}


def _source(folder: Any) -> dict[str, Any]:
    shards = {shard.name: shard.sha256 for shard in folder.shards}
    made = json.dumps(folder.fingerprint, sort_keys=True)
    return {
        "source": folder.source,
        "split": folder.split,
        "samples": len(folder),
        "fingerprint_sha256": hashlib.sha256(made.encode()).hexdigest(),
        "shards_sha256": shards,
    }


def _key(loader: Loader, i: int) -> str:
    """Name a clip that was not used as its shards do: SOURCE/KEY."""
    place = loader.order.places[i]
    folder = loader.folders[place.source]
    return f"{folder.source}/{folder.key(place.shard, place.entry)}"
