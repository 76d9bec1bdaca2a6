"""Read a table of captions beside or for a folder of media: the way in for data without a format of its own."""

import difflib
import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clip4vla.errors import UserError
from clip4vla.media.images import PICTURES
from clip4vla.media.suffixes import SOUNDS, VIDEOS, suffix_of
from data_prep import annotation_io
from data_prep.annotation_io import RowsOrSkipped
from data_prep.manifest import ManifestRow, Skipped, composed, inside, on_disk, slug

COLUMNS = ("path", "caption", "start", "end", "audio_type", "label", "split", "lang")
OTHER_NAMES = {
    **{"begin": "start", "onset": "start", "stop": "end", "language": "lang", "fold": "split", "subset": "split"},
    **{"class": "label", "category": "label"},
}


def folder(place: Path, root: Path) -> RowsOrSkipped:
    """captions.csv or .jsonl: path, caption[, start, end, audio_type, label, split, lang].

    Lines with equal path, start, end and split are one sample with several captions.
    """
    file = _table(place)
    others: set[str] = set()
    lines = (
        annotation_io.read_csv(file, "path", "caption")
        if file.suffix.lower() == ".csv"
        else annotation_io.read_lines(file)
    )
    yield from annotation_io.rows(
        ((where, "", line) for where, line in lines), lambda _, line: _row(root, line, others), join=True
    )
    if others:
        why = f"columns that are not read: {', '.join(sorted(others))[:300]}; those that are: {', '.join(COLUMNS)}"
        yield Skipped("unusable", file.name, why)


def _table(place: Path) -> Path:
    files = [file for file in (place, place / "captions.csv", place / "captions.jsonl") if file.is_file()]
    if not files:
        raise UserError(f"no captions.csv or captions.jsonl in {place}: write one with columns path, caption")
    if len(files) > 1:
        raise UserError(f"annotations={place}: one table of captions, not both; name one, as annotations={files[0]}")
    return files[0]


def _row(root: Path, line: Any, others: set[str]) -> ManifestRow:
    """Return the row of a line; `others` collects the names of what is in it and is not read."""
    line = annotation_io.parse_foreign(line) if isinstance(line, str) else line
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    _check_names(line, others)
    given = {name: value.strip() if isinstance(value, str) else value for name, value in line.items()}
    get: Callable[..., Any] = {name: value for name, value in given.items() if value not in (None, "")}.get
    path, caption = get("path"), annotation_io.clean(get("caption", ""))
    kind, lang = get("audio_type", "both"), get("lang", "en")
    if not path or not caption:
        raise ValueError("path or caption is empty")
    texts = isinstance(path, str) and isinstance(lang, str)
    if not texts or any(isinstance(get(name), dict | list) for name in ("label", "split")):
        raise ValueError("path, lang, label or split is no text")
    suffix = suffix_of(inside(path))
    if suffix not in PICTURES + VIDEOS + SOUNDS:
        raise ValueError(f"{path}: unknown kind of file, not one of {' '.join(PICTURES + VIDEOS + SOUNDS)}")
    if kind not in ("vb", "nb", "both"):
        raise ValueError(f"audio_type {kind!r} is not vb, nb or both")
    start, end = (None if get(name) is None else float(get(name)) for name in ("start", "end"))
    annotation_io.check_span(start, end)
    path = posixpath.normpath(path)
    name = composed(path)  # one file is one sample, however its lines spell it
    span = "" if start is end is None else f"@{start or 0:.10g}-{'' if end is None else f'{end:.10g}'}"
    more: dict[str, Any] = {"picture" if suffix in PICTURES else "media": on_disk(root, path)}
    label = None if get("label") is None else str(get("label"))
    more |= {"lang": lang, "audio_type": kind, "label": label, "start": start, "end": end}
    split = slug(str(get("split", "train")))
    return ManifestRow(name + span, name, name, slug(root.name), split, [caption], [lang], **more)


def _check_names(line: dict[str, Any], others: set[str]) -> None:
    for name in line:
        if name in COLUMNS or name in others or not name:  # pandas writes a column of numbers without a name
            continue
        if near := _meant(name, line):
            raise ValueError(f"no column is called {name}, the nearest is {near}: rename or remove it")
        others.add(name)


def _meant(name: str, line: dict[str, Any]) -> str | None:
    """Return the column that a name is likely to mean; None if there is none, or the line has that one too."""
    words = re.findall("[a-z]+", name.lower())
    near = [OTHER_NAMES.get(word, word) for word in words if word in OTHER_NAMES or word in COLUMNS]
    near += difflib.get_close_matches("_".join(words), COLUMNS, n=1, cutoff=0.75)
    return near[0] if near and near[0] not in line else None
