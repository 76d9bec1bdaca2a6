"""The annotation files of every format that data_prep/annotations.py reads, damaged: rows and counted skips come of them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

from annotation_files import FORMATS
from raw_media import write_tar

from clip4vla.config import DataConfig
from data_prep.annotations import read
from data_prep.manifest import ManifestRow
from faults._trees import Damage
from faults._watch import Target

TEXTS = {  # beside a sound in a tar
    "json": json.dumps(
        {"key": "0", "url": "x", "clips": [[1, 2.5], ["00:00:03.000", "00:01:00"]], "label": ["a", "b"]}
    ),
    "txt": "A dog, barking.",
    "cls": "7",
}


def corrupt(name: str, data: bytes, damage: Damage) -> bytes:
    """By what the name says is in the file."""
    kinds = {"json": damage.json, "jsonl": damage.jsonl, "csv": damage.csv, "txt": damage.lines, "cls": damage.lines}
    return kinds[name.rpartition(".")[2]](data)


def prepare(form: str, root: Path) -> tuple[DataConfig, dict[Path, bytes]]:
    """Settings, and the intact files."""
    media, place, given = root / "media", root / "annotations", FORMATS[form]
    media.mkdir()
    (media / "link").symlink_to("../../canary")
    (media / "loop").symlink_to(".")
    (media / "again").symlink_to("../media")
    files = given.write(place, media, str.encode)  # stamps of one content would be one stamp
    where = media if given.beside else place
    return DataConfig(dataset=form.split()[0], media_root=str(media), annotations=str(where)), files  # type: ignore[arg-type]


def case(state: tuple[DataConfig, dict[Path, bytes]], damage: Damage) -> str:
    """The rows of what one corrupt file leaves; each is fit to be written, and lies below the media root."""
    cfg, files = state
    path = damage.rng.choice(list(files))
    path.write_bytes(corrupt(path.name, files[path], damage))
    try:
        return _outcome(cfg)
    finally:
        path.write_bytes(files[path])


def prepare_tar(root: Path) -> tuple[DataConfig, Path]:
    """Settings for a tar, and its path."""
    return DataConfig(dataset="webdataset", media_root=str(root / "a.tar")), root / "a.tar"


def tar_case(state: tuple[DataConfig, Path], damage: Damage) -> str:
    """The rows of a tar of which one text is corrupt."""
    cfg, path = state
    texts = {f"{i}.{kind}": text for i in range(3) for kind, text in TEXTS.items()}
    name = damage.rng.choice(list(texts))
    texts[name] = corrupt(name, texts[name].encode(), damage)
    write_tar(path, {f"{i}.wav": b"" for i in range(3)} | texts)
    return _outcome(cfg)


def _outcome(cfg: DataConfig) -> str:
    rows, skipped = read(cfg)
    for row in rows:
        _sound(row)
    for item in skipped:
        json.dumps(vars_of(item), ensure_ascii=False).encode()
        assert isinstance(item.where, str) and isinstance(item.reason, str), item
    return "rows and counted skips" if skipped else "rows"


def vars_of(item: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in item.__slots__}


def _sound(row: ManifestRow) -> None:
    tree = vars_of(row)
    json.dumps(tree, ensure_ascii=False).encode()
    texts = [
        row.id,
        row.item,
        row.group,
        row.source,
        row.split,
        row.lang,
        row.audio_type,
        *row.captions,
        *row.caption_langs,
    ]
    texts += [text for text in (row.media, row.picture, row.label, *row.labels) if text is not None]
    assert all(isinstance(text, str) for text in texts), tree
    assert not {"/", "..", "."} & {*row.split, *row.source}, tree
    for path in (row.media, row.picture):
        assert path is None or not path.startswith("/") and ".." not in path.split("/"), tree
    assert all(isinstance(x, float | int | None) for x in (row.start, row.end)), tree


TARGETS = [
    Target(f"annotations of {form}", partial(prepare, form), case, may=("os.fork",))
    for form, given in FORMATS.items()
    if given.files  # GRID's annotations are the names of its media
] + [Target("annotations of webdataset", prepare_tar, tar_case)]
