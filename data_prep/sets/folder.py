"""Read a table of captions beside or for a folder of media: the way in for data without a format of its own."""

import difflib
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clip4vla.errors import UserError
from clip4vla.media.source import PICTURES, SOUNDS, VIDEOS, suffix_of
from data_prep import annotation_io
from data_prep.annotation_io import RowsOrSkipped
from data_prep.manifest import Located, ManifestRow, MediaFolder, Skipped, composed, inside, on_disk, slug

FILES = ("path", "picture", "sound")
GUESSED = ("path", "caption", "start", "end", "audio_type", "label", "split", "lang")  # that a misspelt name may mean
COLUMNS = (*GUESSED, "labels", "picture", "sound", "id", "group")
OTHER_NAMES = {
    **{"begin": "start", "onset": "start", "stop": "end", "language": "lang", "fold": "split", "subset": "split"},
    **{"class": "label", "category": "label"},
}


def folder(place: Path, media: MediaFolder) -> RowsOrSkipped:
    """captions.csv or .jsonl: path (or picture, sound), caption[, start, end, audio_type, label, labels, split, lang, id, group].

    Lines with equal files, start, end and split, or with equal id and split, are one sample with several captions.
    """
    file = _table(place)
    others: set[str] = set()
    files_of: dict[tuple[str, str], tuple[Any, ...]] = {}
    lines = _csv(file) if file.suffix.lower() in (".csv", ".tsv") else annotation_io.read_lines(file)

    def row(_: str, line: Any) -> ManifestRow:
        made = _row(media, line, others)
        files = made.picture, made.media, made.start, made.end
        if files_of.setdefault((made.split, made.id), files) != files:
            raise ValueError(f"id {made.id} is that of another file or interval too")
        return made

    yield from annotation_io.rows(((where, "", line) for where, line in lines), row, join=True)
    if others:
        why = f"columns that are not read: {', '.join(sorted(others))[:300]}; those that are: {', '.join(COLUMNS)}"
        yield Skipped("unusable", file.name, why)


def _csv(file: Path) -> Iterator[tuple[str, dict[str, str] | ValueError]]:
    """Read a table whose cells stand between commas, semicolons or tabs: whichever gives its header a column `caption`."""
    header = str(next(annotation_io.read_lines(file), ("", ""))[1])
    names = {separator: [name.strip(' "') for name in header.split(separator)] for separator in ",;\t"}
    separator = next((separator for separator, some in names.items() if "caption" in some), ",")
    needed = "caption" if {"picture", "sound"} & set(names[separator]) else "path"
    return annotation_io.read_csv(file, needed, "caption", separator=separator)


def _table(place: Path) -> Path:
    files = [file for file in (place, place / "captions.csv", place / "captions.jsonl") if file.is_file()]
    if not files:
        raise UserError(f"no captions.csv or captions.jsonl in {place}: write one with columns path, caption")
    if len(files) > 1:
        raise UserError(f"annotations={place}: one table of captions, not both; name one, as annotations={files[0]}")
    return files[0]


def _row(media: MediaFolder, line: Any, others: set[str]) -> ManifestRow:
    """Return the row of a line; `others` collects the names of what is in it and is not read."""
    line = annotation_io.parse_foreign(line) if isinstance(line, str) else line
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    _check_names(line, others)
    given = {name: value.strip() if isinstance(value, str) else value for name, value in line.items()}
    get: Callable[..., Any] = {name: value for name, value in given.items() if value not in (None, "")}.get
    caption = annotation_io.clean(get("caption", ""))
    kind, lang = get("audio_type", "both"), get("lang", "en")
    files = {name: get(name) for name in FILES if get(name)}
    if not files or not caption:
        raise ValueError("path or caption is empty")
    texts = all(isinstance(text, str) for text in (lang, *files.values()))
    if not texts or any(isinstance(get(name), dict | list) for name in ("label", "split", "id", "group")):
        raise ValueError("path, lang, label or split is no text")
    if kind not in ("vb", "nb", "both"):
        raise ValueError(f"audio_type {kind!r} is not vb, nb or both")
    start, end = (None if get(name) is None else float(get(name)) for name in ("start", "end"))
    annotation_io.check_span(start, end)
    picture, place = _find(media, files, start, end)
    name = composed("+".join(posixpath.normpath(path) for path in files.values()))  # however its lines spell it
    span = annotation_io.span_suffix(start, end)
    label = None if get("label") is None else str(get("label"))
    more: dict[str, Any] = {"lang": lang, "audio_type": kind, "label": label, "labels": _labels(get("labels", []))}
    split, group = slug(str(get("split", "train"))), str(get("group", name))
    clip = str(get("id", name + span)), name, group, slug(media.root.name), split, [caption], [lang]
    row = annotation_io.located(ManifestRow(*clip, start=start, end=end, **more), place)
    if picture:
        row.picture, row.picture_start = picture, None
    return row


def _labels(given: Any) -> list[str]:
    """Return the classes of a list, or of a text with semicolons between them."""
    labels = given.split(";") if isinstance(given, str) else given
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ValueError("labels are a list of texts, or a text with ; between them")
    return list(dict.fromkeys(filter(None, (label.strip() for label in labels))))


def _find(
    media: MediaFolder, files: dict[str, str], start: float | None, end: float | None
) -> tuple[str | None, Located | None]:
    """Return the still of a line, and its sound or video; of a picture and a sound both or none."""
    if "path" in files and len(files) > 1:
        raise ValueError("path and picture or sound: a sample is of one file, or of a picture and a sound")
    place: Located | None = None
    picture: str | None = None
    for column, path in files.items():
        path = posixpath.normpath(inside(path))
        suffix = suffix_of(path)
        if column == "picture" or (column == "path" and suffix in PICTURES):
            picture = on_disk(media.root, path) if suffix in PICTURES else media.find_picture(path)
        else:
            place = _find_sound(media, path, suffix, start, end)
    return (picture, place) if len(files) == bool(picture) + bool(place) else (None, None)


def _find_sound(media: MediaFolder, path: str, suffix: str, start: float | None, end: float | None) -> Located | None:
    """Return where a sound or video is; one without a suffix is an id, looked for as other sets' clips are."""
    if suffix in VIDEOS + SOUNDS:
        there = on_disk(media.root, path)
        whole = Located(there) if there else None
    elif place := _find_clip(media, path, start, end):
        return place
    else:
        whole = (media.find(path) or media.find_video(path)) if media.paths else None
        if not whole and suffix:
            raise ValueError(f"{path}: unknown kind of file, not one of {' '.join(PICTURES + VIDEOS + SOUNDS)}")
    return whole if not whole or media.cut else whole._replace(start=start, end=end)


def _find_clip(media: MediaFolder, video: str, start: float | None, end: float | None) -> Located | None:
    return media.find_clip(video, start, end) if media.paths and start is not None and end is not None else None


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
    near = [OTHER_NAMES.get(word, word) for word in words if word in OTHER_NAMES or word in GUESSED]
    near += difflib.get_close_matches("_".join(words), GUESSED, n=1, cutoff=0.75)
    return near[0] if near and near[0] not in line else None
