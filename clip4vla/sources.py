"""What a search index is built from: media files and shards, and the clips in them.

A file is one clip if it is short, else windows of 17.92 s (inputs.longest) one behind the other. A shard has its samples.
"""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clip4vla import clips, inputs
from clip4vla.config import UserError
from clip4vla.inputs import Input
from clip4vla.media import SOUNDS, VIDEOS, duration, edges
from clip4vla.model import Model
from clip4vla.pictures import PICTURES
from clip4vla.pool import Apart
from clip4vla.settings import to_dict
from clip4vla.shards import INDEX, Damaged, ShardFolder

TOGETHER = 16  # samples of a shard that are read at once


class Clip(NamedTuple):
    """Clip `number` of its source: what a Hit tells of it, and what the towers take, or why that cannot be read."""

    number: int
    shown: dict[str, Any]
    input: Input | None
    reason: str = ""


@dataclass
class Source:
    """A media file or a shard; state: its size and time, or its sha256."""

    place: str
    state: str
    name: str  # a file's, below the folder that was named
    shard: tuple[ShardFolder, int] | None = None

    def clips(self, first: int, model: Model, apart: Apart | None = None) -> Iterator[tuple[Clip, bool]]:
        """Its clips from number `first` on, and whether it is the last one; where the file is damaged it ends.

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
                clip, rows = Clip(number, {"name": self.name}, None, f"{error}"), iter(())
            if held:
                yield held, clip is None
            if clip is None:
                return
            held = clip


def find(where: str, model: Model) -> tuple[str, list[Source]]:
    """(root, its sources, sorted): a media file; or a folder of media and shard folders, at any depth; or a shard folder's URL.

    Symbolic links that leave the root, and those to folders, are not followed. UserError if nothing is there.
    """
    if "://" in where:
        return where.rstrip("/"), _shards(where.rstrip("/"), model)
    root = Path(where).resolve()
    if not root.exists():
        raise UserError(
            f"{where}: no such file or folder; python -m clip4vla.search drop takes what is gone out of an index"
        )
    if root.is_file():
        if root.suffix.lower() not in (*VIDEOS, *SOUNDS, *PICTURES):
            raise UserError(
                f"{where}: neither a video, a sound nor a picture by its name ({root.suffix or 'no suffix'})"
            )
        return str(root), [Source(str(root), file_state(root), root.name)]
    found: list[Source] = []
    for folder, below, names in os.walk(root, onerror=_unreadable):
        if INDEX in names and (folder == str(root) or any(name.endswith(".tar") for name in names)):
            found += _shards(folder, model)
            below.clear()  # vectors
            continue
        below.sort()
        files = [Path(folder, name) for name in sorted(names)]
        found += [_file(path, root) for path in files if _wanted(path, root)]
    return str(root), found


def _unreadable(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename}: {error.strerror}")


def _wanted(path: Path, root: Path) -> bool:
    known = path.suffix.lower() in (*VIDEOS, *SOUNDS, *PICTURES)
    if not known or not path.is_file() or not path.resolve().is_relative_to(root):
        return False
    if any("\udc80" <= letter <= "\udcff" for letter in str(path)):  # how Python reads such bytes; SQLite holds none
        print(f"left out, its name is not UTF-8: {os.fsencode(path)!r}", file=sys.stderr)
        return False
    return True


def _file(path: Path, root: Path) -> Source:
    return Source(str(path), file_state(path), str(path.relative_to(root)))


def file_state(path: Path) -> str:
    """What tells whether a file changed: size in bytes and time of change in ns."""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _shards(url: str, model: Model) -> list[Source]:
    """The shards of a folder; UserError if they were made with other settings than the model's shards."""
    from clip4vla.loader import check_fingerprint, must_hold_clips  # training's

    folder = ShardFolder.open(url)
    must_hold_clips(folder)
    ours = {"spectrogram": to_dict(model.spectrogram)}
    check_fingerprint(ours, folder.fingerprint, "the model's shards", url)
    return [Source(f"{url}/{s.name}", s.sha256, s.name, (folder, i)) for i, s in enumerate(folder.shards)]


def _samples(folder: ShardFolder, shard: int, first: int, model: Model) -> Iterator[Clip]:
    samples = folder.shards[shard].samples
    for begin in range(first, samples, TOGETHER):
        numbers = range(begin, min(begin + TOGETHER, samples))
        for number, sample in zip(numbers, folder.read([(shard, n) for n in numbers]), strict=True):
            yield _sample(number, folder.key(shard, number), sample, model)


def _sample(number: int, key: str, sample: dict[str, bytes] | Damaged, model: Model) -> Clip:
    try:
        meta = parsed(sample)
        assert not isinstance(sample, Damaged)
        shown = {name: meta[name] for name in ("captions", "start", "end")} | {"name": meta["id"], "key": key}
        clip = inputs.of_shard(meta, sample, model.spectrogram)
        if clip.frames is not None and clip.frames.shape[-1] != model.frames.size:
            raise ValueError(f"frames of {clip.frames.shape[-1]} pixels, not {model.frames.size}")
        return Clip(number, shown, clip)
    except (ValueError, KeyError) as error:
        return Clip(number, {"name": key}, None, str(error))


def parsed(sample: dict[str, bytes] | Damaged) -> dict[str, Any]:
    """A sample's json; ValueError if it cannot be read."""
    if isinstance(sample, Damaged):
        raise ValueError(sample.reason)
    return clips.parsed(sample.get("json", b""))


def media(model: Model, place: str, name: str, first: int) -> Iterator[Clip]:
    """Clips of a media file from number `first` on."""
    path = Path(place)
    spec, long = model.spectrogram, inputs.longest(model.spectrogram)
    shown = {"name": name, "captions": [], "key": ""}
    kind = path.suffix.lower()
    if kind in PICTURES:
        yield Clip(0, shown | {"start": None, "end": None}, inputs.read(path, spec, model.frames, "v"))
    elif kind in SOUNDS:
        for number, (begin, finish, heard) in enumerate(inputs.windows(path, spec, first * long), first):
            yield Clip(number, shown | {"start": begin, "end": finish}, heard)
    else:
        for number, (begin, finish) in enumerate(edges(0.0, duration(path), long, long / spec.max_segments)):
            if number >= first:
                read = inputs.read(path, spec, model.frames, "av", begin, finish)
                yield Clip(number, shown | {"start": begin, "end": finish}, read)
