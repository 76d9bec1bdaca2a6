"""Read the sources of a search index: media files and shards, and the clips in them.

A file is one clip if it is short, else consecutive windows of 17.92 s (preprocessing.max_clip_seconds). A shard has its
samples.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clip4vla.config_io import to_dict
from clip4vla.data import preprocessing, sample_metadata
from clip4vla.data.preprocessing import ClipInput
from clip4vla.data.shards import INDEX, CorruptSample, ShardFolder
from clip4vla.errors import UserError
from clip4vla.io.walk import walk
from clip4vla.media.av_reader import duration, window_bounds
from clip4vla.media.source import PICTURES, SOUNDS, VIDEOS, suffix_of
from clip4vla.media.worker_pool import IsolatedIterator
from clip4vla.models.model import Model

TOGETHER = 16  # samples of a shard that are read at once


class SourceClip(NamedTuple):
    """Hold clip `number` of its source: what a Hit shows, and what the towers take, or why that cannot be read."""

    number: int
    shown: dict[str, Any]
    input: ClipInput | None
    reason: str = ""


@dataclass
class Source:
    """Name a media file or a shard; state: its size and time, or its sha256."""

    place: str
    state: str
    name: str  # a file's, below the folder that was named
    shard: tuple[ShardFolder, int] | None = None

    def clips(
        self, first: int, model: Model, apart: IsolatedIterator | None = None
    ) -> Iterator[tuple[SourceClip, bool]]:
        """Yield its clips from number `first` on, and whether it is the last one; where the file is corrupt it ends.

        apart: runs `media`; None: it runs in this process.
        """
        if self.shard:
            rows = _samples(*self.shard, first, model)
        else:
            words = self.place, self.name, first
            rows = apart.iterate(*words) if apart else media(model, *words)
        held = None
        while True:
            try:
                clip = next(rows, None)
            except (OSError, ValueError) as error:
                number = held.number + 1 if held else first
                clip, rows = SourceClip(number, {"name": self.name}, None, f"{error}"), iter(())
            if held:
                yield held, clip is None
            if clip is None:
                return
            held = clip


def find(where: str, model: Model) -> tuple[str, list[Source]]:
    """Return (root, its sources, sorted) of what lies at `where`.

    where: a media file; or a folder of media and shard folders, at any depth; or a shard folder's URL.
    Symbolic links that leave the root, and those to folders, are not followed; what is hidden (io/walk.py) is left out.
    UserError if nothing is there.
    """
    if "://" in where:
        return where.rstrip("/"), _shards(where.rstrip("/"), model)
    root = Path(where).resolve()
    if not root.exists():
        raise UserError(
            f"{where}: no such file or folder; python -m clip4vla.search remove takes what is gone out of an index"
        )
    if root.is_file():
        if suffix_of(str(root)) not in (*VIDEOS, *SOUNDS, *PICTURES):
            raise UserError(
                f"{where}: neither a video, a sound nor a picture by its name ({suffix_of(str(root)) or 'no suffix'})"
            )
        return str(root), [Source(str(root), file_state(root), root.name)]
    sources: list[Source] = []
    for folder, below, names in walk(root, on_error=_unreadable):
        if INDEX in names and (folder == str(root) or any(name.endswith(".tar") for name in names)):
            sources += _shards(folder, model)
            below.clear()  # vectors
            continue
        files = [Path(folder, name) for name in names]
        sources += [_file(path, root) for path in files if _wanted(path, root)]
    return str(root), sources


def _unreadable(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename}: {error.strerror}")


def _wanted(path: Path, root: Path) -> bool:
    known = suffix_of(str(path)) in (*VIDEOS, *SOUNDS, *PICTURES)
    if not known or not path.is_file() or not path.resolve().is_relative_to(root):
        return False
    if any("\udc80" <= letter <= "\udcff" for letter in str(path)):  # how Python reads such bytes; SQLite holds none
        print(f"left out, its name is not UTF-8: {os.fsencode(path)!r}", file=sys.stderr)
        return False
    return True


def _file(path: Path, root: Path) -> Source:
    return Source(str(path), file_state(path), str(path.relative_to(root)))


def file_state(path: Path) -> str:
    """Return what shows whether a file changed: size in bytes and time of change in ns."""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _shards(url: str, model: Model) -> list[Source]:
    """Return the shards of a folder; UserError if they were made with other settings than the model's shards."""
    from clip4vla.data.loader import check_fingerprint, must_hold_clips  # training's

    folder = ShardFolder.open(url)
    must_hold_clips(folder)
    ours = {"spectrogram": to_dict(model.spectrogram)}
    check_fingerprint(ours, folder.fingerprint, "the model's shards", url)
    return [Source(f"{url}/{s.name}", s.sha256, s.name, (folder, i)) for i, s in enumerate(folder.shards)]


def _samples(folder: ShardFolder, shard: int, first: int, model: Model) -> Iterator[SourceClip]:
    samples = folder.shards[shard].samples
    for begin in range(first, samples, TOGETHER):
        numbers = range(begin, min(begin + TOGETHER, samples))
        for number, sample in zip(numbers, folder.read([(shard, n) for n in numbers]), strict=True):
            yield _sample(number, folder.key(shard, number), sample, model)


def _sample(number: int, key: str, sample: dict[str, bytes] | CorruptSample, model: Model) -> SourceClip:
    try:
        meta = parsed(sample)
        assert not isinstance(sample, CorruptSample)
        shown = {name: meta[name] for name in ("captions", "start", "end")} | {"name": meta["id"], "key": key}
        clip = preprocessing.of_shard(meta, sample, model.spectrogram, model.pictures)
        return SourceClip(number, shown, clip)
    except (ValueError, KeyError) as error:
        return SourceClip(number, {"name": key}, None, str(error))


def parsed(sample: dict[str, bytes] | CorruptSample) -> dict[str, Any]:
    """Parse a sample's json; ValueError if it cannot be read."""
    if isinstance(sample, CorruptSample):
        raise ValueError(sample.reason)
    return sample_metadata.parse(sample.get("json", b""))


def media(model: Model, place: str, name: str, first: int) -> Iterator[SourceClip]:
    """Yield the clips of a media file from number `first` on."""
    path = Path(place)
    spec, long = model.spectrogram, preprocessing.max_clip_seconds(model.spectrogram)
    shown = {"name": name, "captions": [], "key": ""}
    kind = suffix_of(str(path))
    if kind in PICTURES:
        still = preprocessing.read(path, spec, model.frames, "v", fit=model.pictures)
        yield SourceClip(0, shown | {"start": None, "end": None}, still)
    elif kind in SOUNDS:
        for number, (begin, finish, clip) in enumerate(preprocessing.windows(path, spec, first * long), first):
            yield SourceClip(number, shown | {"start": begin, "end": finish}, clip)
    else:
        for number, (begin, finish) in enumerate(window_bounds(0.0, duration(path), long, long / spec.max_segments)):
            if number >= first:
                read = preprocessing.read(path, spec, model.frames, "av", begin, finish, model.pictures)
                yield SourceClip(number, shown | {"start": begin, "end": finish}, read)
