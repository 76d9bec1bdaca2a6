"""Write manifest.json beside metrics.json: what a number was computed from, so that it can be computed again."""

import hashlib
import json
from pathlib import Path
from typing import Any

from clip4vla.config import RunConfig
from clip4vla.config_io import to_dict
from clip4vla.data.loader import Loader
from clip4vla.io.atomic import write_text
from clip4vla.report import tracking


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
