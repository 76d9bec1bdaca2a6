"""Annotations of each data set, in their own format, as rows: one row is one sample to be."""

import csv
import hashlib
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip4vla.config import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".svg")
SOUNDS = (".ogg", ".wav", ".flac", ".mp3", ".opus")
VIDEOS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v")
PICTURE_LANGS = ("fr", "ro", "ru", "ca", "bg", "es", "be", "el", "da")
KINDS = Path(__file__).parent / "stamps_sound_kinds.csv"


@dataclass
class Row:
    """One sample to be; paths are relative to the media root, start and end in seconds within the medium."""

    id: str
    item: str  # the thing shown
    group: str  # what must stay in one split, and answers the same queries
    source: str
    split: str
    captions: list[str]
    caption_langs: list[str]
    picture: str | None = None
    audio: str | None = None
    lang: str = "en"  # spoken in the audio
    audio_type: str = "both"  # vb, nb, both
    label: str | None = None
    start: float | None = None
    end: float | None = None
    problem: str = field(default="", compare=False)  # why the row cannot become a sample


# Tux Paint stamps


@dataclass
class Stamp:
    """NAME.png or .svg with texts by language, a sound of its own, and spoken clips (language, path)."""

    picture: str
    texts: dict[str, str]
    sound: str | None
    speech: list[tuple[str, str]]


def stamps(root: Path) -> list[Row]:
    """Rows of Tux Paint's stamps in the sources pictures, sounds (nonverbal), and speech_LANG (the name spoken).

    Splits are by group: stamps that share a normalised English caption, a picture, a recording or a _mirror/_flip base.
    """
    found = _find_stamps(root)
    groups = _groups(root, found)
    with KINDS.open(encoding="utf-8") as file:
        nonverbal = {row["path"] for row in csv.DictReader(file) if row["kind"] == "nonverbal"}
    return [row for item, stamp in found.items() for row in _stamp_rows(item, stamp, groups[item], nonverbal)]


def _stamp_rows(item: str, stamp: Stamp, group: str, nonverbal: set[str]) -> Iterator[Row]:
    """The picture, the sound if it is a nonverbal one, and every spoken clip."""

    def row(source: str, langs: list[str], **more: Any) -> Row:
        captions = [stamp.texts[lang] for lang in langs]
        return Row(
            f"{source}/{item}", item, group, source, split_of(group), captions, langs, picture=stamp.picture, **more
        )

    yield row("pictures", ["en", *(lang for lang in PICTURE_LANGS if lang in stamp.texts)])
    if stamp.sound in nonverbal:
        yield row("sounds", ["en"], audio=stamp.sound, audio_type="nb")
    for lang, path in stamp.speech:
        langs = [lang, "en"] if lang != "en" and lang in stamp.texts else ["en"]
        yield row(f"speech_{lang}", langs, audio=path, audio_type="vb", lang=lang)


def split_of(group: str) -> str:
    """train, val or test (8:1:1), by the group's hash."""
    number = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "val"}.get(number, "train")


def _find_stamps(root: Path) -> dict[str, Stamp]:
    """Stamps with picture and English text by name (path without suffix), sorted."""
    files = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    spoken = defaultdict(list)
    for path in sorted(files):
        if match := re.fullmatch(r"(.+)_desc(?:_([A-Za-z_@]+))?\.ogg", path):
            spoken[match[1]].append((match[2] or "en", path))
    found = {}
    for text in sorted(path for path in files if path.endswith(".txt")):
        name = text.removesuffix(".txt")
        picture, sound = (_first(files, name, kinds) for kinds in ((".png", ".svg"), (".ogg", ".wav")))
        texts = _texts(root / text)
        if picture and texts.get("en"):
            found[name] = Stamp(picture, texts, sound, spoken[name])
    return found


def _first(files: set[str], name: str, suffixes: tuple[str, ...]) -> str | None:
    return next((name + suffix for suffix in suffixes if name + suffix in files), None)


def _texts(path: Path) -> dict[str, str]:
    """Texts by language of a stamp's .txt: the first line is English, then `fr.utf8=…`."""
    first, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
    pairs = [line.partition(".utf8=") for line in lines]
    return {"en": first.strip()} | {lang.strip(): text.strip() for lang, sign, text in pairs if sign and text.strip()}


def _groups(root: Path, found: dict[str, Stamp]) -> dict[str, str]:
    """Smallest name of each stamp's group (union-find over what stamps share)."""
    parent = {name: name for name in found}

    def head(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    owner: dict[str, str] = {}
    for name, stamp in found.items():
        for key in _shared(root, name, stamp):
            low, high = sorted((head(owner.setdefault(key, name)), head(name)))
            parent[high] = low
    return {name: head(name) for name in found}


def _shared(root: Path, name: str, stamp: Stamp) -> Iterator[str]:
    """Keys that put stamps into one group when they are equal."""
    words = re.sub(r"\.$", "", stamp.texts["en"].lower()).split()
    yield "caption " + " ".join(word for word in words if word not in ("a", "an", "the"))
    yield "base " + re.sub(r"_(mirror|flip)$", "", name)
    if "dreydl" in name:
        yield "dreydl"
    for path in filter(None, [stamp.picture, stamp.sound, *(path for _, path in stamp.speech)]):
        yield "file " + hashlib.sha256((root / path).read_bytes()).hexdigest()


# A folder with captions.csv or captions.jsonl


def folder(root: Path, annotations: Path | None = None) -> list[Row]:
    """Rows of captions.csv or .jsonl: path, caption[, start, end, audio_type, label, split, lang].

    Lines with equal path, start, end and split are one sample with several captions. A malformed line becomes a row
    with a `problem`; a missing column or a video raises UserError.
    """
    place = annotations or root
    file = next((f for f in (place, place / "captions.csv", place / "captions.jsonl") if f.is_file()), None)
    if file is None:
        raise UserError(f"no captions.csv or captions.jsonl in {place}: write one with columns path, caption")
    rows: dict[tuple, Row] = {}
    for number, line in _lines(file):
        try:
            row = _folder_row(root, line, number)
        except UserError:
            raise
        except (ValueError, TypeError, AttributeError) as error:
            path = str(line.get("path")) if isinstance(line, dict) else ""
            row = Row(f"line-{number}", path, path, _slug(root.name), "train", [], [])
            row.problem = f"{file.name}:{number}: {error}"
        key = (row.item, row.start, row.end, row.split) if not row.problem else (number,)
        first = rows.setdefault(key, row)
        if first is not row:
            first.captions += row.captions
            first.caption_langs += row.caption_langs
    return list(rows.values())


def _lines(file: Path) -> Iterator[tuple[int, Any]]:
    """(line number, columns) of a .csv or .jsonl file; a .jsonl line that is not JSON comes as its text."""
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
        if file.suffix == ".csv":
            reader = csv.DictReader(stream)
            if missing := {"path", "caption"} - set(reader.fieldnames or []):
                raise UserError(f"{file}: the first line names no column {' and '.join(sorted(missing))}")
            yield from ((reader.line_num, line) for line in reader)
            return
        for number, text in enumerate(stream, 1):
            try:
                yield number, json.loads(text)
            except ValueError:
                yield number, text


def _folder_row(root: Path, line: Any, number: int) -> Row:
    if not isinstance(line, dict):
        raise ValueError("not a JSON object")
    get = {key: value for key, value in line.items() if key and value not in (None, "")}.get
    path, caption, kind = get("path"), get("caption"), get("audio_type", "both")
    if not path or not caption:
        raise ValueError("path or caption is empty")
    suffix = os.path.splitext(inside(path))[1].lower()
    if suffix in VIDEOS:
        raise UserError(
            f"{path}: video comes with a later version, pictures and audio work now; take out line {number}"
        )
    if suffix not in PICTURES + SOUNDS:
        raise ValueError(f"{path}: unknown kind of file, not one of {' '.join(PICTURES + SOUNDS)}")
    if kind not in ("vb", "nb", "both"):
        raise ValueError(f"audio_type {kind!r} is not vb, nb or both")
    start, end = (None if get(name) is None else float(get(name)) for name in ("start", "end"))
    if not 0 <= (start or 0) < (math.inf if end is None else end) or end == math.inf:
        raise ValueError(f"start {start} and end {end} do not span any time")
    medium = {"picture" if suffix in PICTURES else "audio": path}
    source, split, lang = _slug(root.name), _slug(get("split", "train")), get("lang", "en")
    name = path if start is None and end is None else f"{path}@{start or 0:g}-{'' if end is None else f'{end:g}'}"
    more = {"lang": lang, "audio_type": kind, "label": get("label") and str(get("label")), "start": start, "end": end}
    return Row(name, path, path, source, split, [str(caption)], [lang], **medium, **more)


def inside(path: str) -> str:
    """The path, if it stays inside the media root; raises ValueError otherwise."""
    if os.path.isabs(path) or ".." in re.split(r"[/\\]", path):
        raise ValueError(f"{path}: leaves the media root")
    return path


def _slug(text: str) -> str:
    """A name fit for a folder."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "data"
