"""Tux Paint's stamps: real pictures, text, sounds and speech, which a fresh machine can get (get_stamps.sh)."""

import csv
import functools
import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile

from clip4vla.config_io import NOT_UTF8
from clip4vla.io.walk import walk
from clip4vla.media.worker_pool import NO_ITEM, WorkerStatus, run_units
from data_prep.annotation_io import bounded, not_utf8
from data_prep.manifest import ManifestRow, Skipped

PICTURE_LANGS = ("fr", "ro", "ru", "ca", "bg", "es", "be", "el", "da")
KINDS = Path(__file__).parent / "stamps_sound_kinds.csv"
PATIENCE = 60.0  # s for one sound


@dataclass
class Stamp:
    """NAME.png or .svg with texts by language, a sound of its own, and spoken clips (language, path)."""

    picture: str
    texts: dict[str, str]
    sound: str | None
    speech: list[tuple[str, str]]

    @property
    def sounds(self) -> list[str]:
        """Paths of the sound and of the spoken clips."""
        return [path for path in (self.sound, *(path for _, path in self.speech)) if path]


def stamps(root: Path) -> list[ManifestRow | Skipped]:
    """Return rows of Tux Paint's stamps in the sources pictures, sounds (nonverbal) and speech_LANG (the name spoken).

    Splits are by group: stamps that share a normalised English caption, a picture, a recording or a _mirror/_flip base.
    """
    by_name = _find_stamps(root)
    groups = _groups(root, by_name)
    with KINDS.open(encoding="utf-8") as file:
        nonverbal = {row["path"] for row in csv.DictReader(file) if row["kind"] == "nonverbal"}
    return [row for item, stamp in by_name.items() for row in _stamp_rows(item, stamp, groups[item], nonverbal)]


def _stamp_rows(item: str, stamp: Stamp, group: str, nonverbal: set[str]) -> Iterator[ManifestRow | Skipped]:
    """Yield rows of the picture, the sound if it is a nonverbal one, and every spoken clip.

    label: the stamp's folder.
    """
    try:
        for text in stamp.texts.values():
            if not_utf8(bounded(text)):
                raise ValueError(NOT_UTF8)
    except ValueError as error:
        yield Skipped("malformed", f"{item}.txt", str(error))
        return
    label = item.partition("/")[0]

    def row(source: str, langs: list[str], **more: Any) -> ManifestRow:
        captions = [stamp.texts[lang] for lang in langs]
        return ManifestRow(
            f"{source}/{item}",
            item,
            group,
            source,
            split_of(group),
            captions,
            langs,
            picture=stamp.picture,
            label=label,
            **more,
        )

    yield row("pictures", ["en", *(lang for lang in PICTURE_LANGS if lang in stamp.texts)])
    if stamp.sound in nonverbal:
        yield row("sounds", ["en"], media=stamp.sound, audio_type="nb")
    for lang, path in stamp.speech:
        langs = [lang, "en"] if lang != "en" and lang in stamp.texts else ["en"]
        yield row(f"speech_{lang}", langs, media=path, audio_type="vb", lang=lang)


def split_of(group: str) -> str:
    """Return train, val or test (8:1:1), by the group's hash."""
    number = int(hashlib.sha256(group.encode()).hexdigest(), 16) % 10
    return {0: "test", 1: "val"}.get(number, "train")


def _find_stamps(root: Path) -> dict[str, Stamp]:
    """Return the by_name with picture and English text by name (path without suffix), sorted."""
    every = (Path(folder, name) for folder, _, names in walk(root) for name in names)
    files = {path.relative_to(root).as_posix() for path in every if path.is_file()}
    spoken = defaultdict(list)
    for path in sorted(files):
        if match := re.fullmatch(r"(.+)_desc(?:_([A-Za-z_@]+))?\.ogg", path):
            spoken[match[1]].append((match[2] or "en", path))
    by_name = {}
    for text in sorted(path for path in files if path.endswith(".txt")):
        name = text.removesuffix(".txt")
        picture, sound = (_first(files, name, kinds) for kinds in ((".png", ".svg"), (".ogg", ".wav")))
        texts = _texts(root / text)
        if picture and texts.get("en"):
            by_name[name] = Stamp(picture, texts, sound, spoken[name])
    return by_name


def _first(files: set[str], name: str, suffixes: tuple[str, ...]) -> str | None:
    return next((name + suffix for suffix in suffixes if name + suffix in files), None)


def _texts(path: Path) -> dict[str, str]:
    """Read the texts by language of a stamp's .txt: the first line is English, then `fr.utf8=…`."""
    first, *lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines() or [""]
    pairs = [line.partition(".utf8=") for line in lines]
    return {"en": first.strip()} | {lang.strip(): text.strip() for lang, sign, text in pairs if sign and text.strip()}


def _groups(root: Path, by_name: dict[str, Stamp]) -> dict[str, str]:
    """Return the smallest name of each stamp's group (union-find over what by_name share)."""
    parent, sounds = {name: name for name in by_name}, _sounds(root, by_name)

    def head(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    owner: dict[str, str] = {}
    for name, stamp in by_name.items():
        picture = "picture " + hashlib.sha256((root / stamp.picture).read_bytes()).hexdigest()
        for key in [*_words(name, stamp), picture, *(sounds[path] for path in stamp.sounds if path in sounds)]:
            low, high = sorted((head(owner.setdefault(key, name)), head(name)))
            parent[high] = low
    return {name: head(name) for name in by_name}


def _words(name: str, stamp: Stamp) -> Iterator[str]:
    """Yield keys from names and captions that put stamps into one group when they are equal."""
    words = re.sub(r"\.$", "", stamp.texts["en"].lower()).split()
    yield "caption " + " ".join(word for word in words if word not in ("a", "an", "the"))
    yield "base " + re.sub(r"_(mirror|flip)$", "", name)
    if "dreydl" in name:
        yield "dreydl"


def _sounds(root: Path, by_name: dict[str, Stamp]) -> dict[str, str]:
    """Hash the samples by path, less silent ones: the same recording lies in files of different bytes."""
    paths = sorted({path for stamp in by_name.values() for path in stamp.sounds})
    chunks = [range(first, min(first + 64, len(paths))) for first in range(0, len(paths), 64)]
    do = functools.partial(_hashes, [root / path for path in paths])
    done = run_units(chunks, do, len(os.sched_getaffinity(0)), PATIENCE, lambda _: None)
    hashes = {paths[i]: digest for chunk, digests in done for i, digest in zip(chunk, digests, strict=True)}
    return {path: f"sound {hashes[path]}" for path in paths if hashes[path]}


def _hashes(paths: list[Path], chunk: range, failed_items: dict[int, str], status: WorkerStatus) -> list[str]:
    """Hash the samples of a chunk of files, in a worker; "" for a file that hangs or crashes the decoder."""
    hashes = []
    for i in chunk:
        status.start(i)
        hashes.append("" if i in failed_items else _samples_hash(paths[i]))
    status.start(NO_ITEM)
    return hashes


def _samples_hash(path: Path) -> str:
    try:
        samples, _ = soundfile.read(path, dtype="int16")
    except soundfile.SoundFileError:
        return ""  # what is broken is found out, and listed, when it becomes a sample
    return hashlib.blake2b(samples.tobytes()).hexdigest() if samples.any() else ""
