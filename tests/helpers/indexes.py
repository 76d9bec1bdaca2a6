"""index.json with each shard's entries in place, as write_index takes them: to be read, changed and written again."""

import json
from pathlib import Path
from typing import Any

from clip4vla.data.shards import ENTRIES, INDEX, write_index


def read(folder: Path) -> dict[str, Any]:
    """The tree; entries are lists [key, {extension: [offset, size, CRC-32]}]."""
    tree, lines = json.loads((folder / INDEX).read_text()), (folder / ENTRIES).read_bytes()
    for shard in tree["shards"]:
        offset, size, _ = shard["entries"]
        shard["entries"] = [json.loads(line) for line in lines[offset : offset + size].splitlines()]
    return tree


def write(folder: Path, tree: dict[str, Any]) -> None:
    """Both files."""
    write_index(folder, **{name: value for name, value in tree.items() if name != "format"})
