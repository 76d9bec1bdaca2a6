"""What is in a shard folder: names, metadata, fingerprint; writing tars, and reading samples from them by byte range.

A folder holds SOURCE-SPLIT-000000.tar … and index.json. Members of a sample, in this order: KEY.json, KEY.fbank.jpg|png
(the log-mel picture of spectrogram.encode) and KEY.frames.jpg (the film strip: n frames stacked vertically).

KEY.json: id, item (the thing shown), group (stays in one split, answers the same queries), source, split, captions and
caption_langs (parallel), lang (spoken), audio_type (vb, nb, both), label, start and end (s in the medium, or null),
duration (s of audio), n_frames, n_segments, n_rows (valid ones), has_audio, has_frames, media {audio, frames}.
"""

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import json
import os
import posixpath
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec

from clip4vla import storage
from clip4vla.config import DataConfig, DataSources, UserError

INDEX = "index.json"
FORMAT = 1
HEADER = 512  # bytes of a tar header, and the unit that members are padded to


@dataclass(frozen=True)
class Member:
    """One file in a tar: where its bytes start, how many there are, and their CRC-32."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True)
class Shard:
    """One tar as index.json describes it; entries stay as JSON gave them, [key, {ext: [offset, size, crc32]}].

    of: in a folder of vectors, the sha256 of the shard that they belong to.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    entries: list[Any]
    of: str = ""

    def members(self, entry: int) -> tuple[str, dict[str, Member]]:
        """Key and members by extension ("json", "fbank.jpg", "frames.jpg") of one sample."""
        key, members = self.entries[entry]
        return key, {ext: Member(*place) for ext, place in members.items()}


@dataclass(frozen=True)
class Damaged:
    """A sample that could not be read intact: which (shard name and key), and why."""

    shard: str
    key: str
    reason: str


class _Range(NamedTuple):
    """Adjacent members of one sample, fetched together: bytes start..end of a tar."""

    start: int
    end: int
    members: list[tuple[str, Member]]


def fingerprint(cfg: DataConfig) -> dict[str, Any]:
    """Every setting that shaped the pixels, and the versions of the libraries that made them."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchaudio", "pillow")}
    settings = {"spectrogram": dataclasses.asdict(cfg.spectrogram), "frames": dataclasses.asdict(cfg.frames)}
    return settings | {"versions": versions}


def write_shard(path: str | Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> dict[str, Any]:
    """Write (key, {ext: bytes}) samples as a tar that is complete or absent; returns its entry for index.json.

    Equal samples give equal bytes: times, owners and modes are fixed, members keep the order of the dictionary.
    Raises UserError if another process is writing the same shard.
    """
    import webdataset

    partial = f"{path}.partial"
    with _own(partial) as stream:
        with webdataset.TarWriter(stream, user="root", group="root", mode=0o644, mtime=0, encoder=False) as tar:
            for key, members in samples:
                assert "." not in key, key
                for ext, data in members.items():  # one by one: write() would sort them
                    tar.write({"__key__": key, ext: data})
        stream.flush()
        os.fsync(stream.fileno())
        entry = _describe(partial, Path(path).name)
        os.replace(partial, path)  # while the lock holds
    return entry


def _own(path: str) -> BinaryIO:
    """The file, emptied, locked until it is closed."""
    stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(path).st_ino != os.fstat(stream.fileno()).st_ino:  # another process finished it meanwhile
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        stream.close()
        raise UserError(f"{path}: another run is writing it; wait for it, or choose another folder") from None
    stream.truncate()
    return stream


def _describe(path: str, name: str) -> dict[str, Any]:
    """The index entry of a finished tar, from its own bytes."""
    entries: dict[str, dict[str, list[int]]] = {}
    with tarfile.open(path, "r:") as tar:
        for info in tar:
            key, _, ext = info.name.partition(".")
            member = tar.extractfile(info)
            assert member
            data = member.read()
            entries.setdefault(key, {})[ext] = [info.offset_data, info.size, zlib.crc32(data)]
    with open(path, "rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    size = os.path.getsize(path)
    return {"name": name, "samples": len(entries), "bytes": size, "sha256": sha256, "entries": list(entries.items())}


def write_json(path: str | Path, tree: Any) -> None:
    """JSON that is complete or absent: written aside, synced, renamed."""
    write_text(path, json.dumps(tree, ensure_ascii=False, separators=(",", ":")) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """A text file that is complete or absent: written aside, synced, renamed."""
    with open(f"{path}.partial", "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(f"{path}.partial", path)


def write_index(
    folder: str | Path,
    *,
    fingerprint: dict[str, Any],
    media_root: str,
    source: str,
    split: str,
    counts: dict[str, Any],
    shards: list[dict[str, Any]],
) -> None:
    """index.json of a folder, atomically.

    counts: samples, with_audio, with_frames, seconds, quarantined. shards: what write_shard returned.
    """
    head = {"format": FORMAT, "fingerprint": fingerprint, "media_root": media_root, "source": source, "split": split}
    write_json(Path(folder) / INDEX, head | {"counts": counts, "shards": shards})


class ShardFolder:
    """A folder of shards, local or at any fsspec URL; samples are addressed by (shard number, entry number)."""

    def __init__(
        self, url: str, fs: fsspec.AbstractFileSystem, path: str, index: dict[str, Any], cfg: DataSources
    ) -> None:
        self.url, self.fs, self.path, self.cfg = url, fs, path, cfg
        self.reader = storage.Reader(fs, cfg)
        self.shards = [Shard(**shard) for shard in index["shards"]]
        self.fingerprint: dict[str, Any] = index["fingerprint"]
        self.counts: dict[str, Any] = index["counts"]
        self.source: str = index["source"]
        self.split: str = index["split"]
        self.media_root = posixpath.normpath(posixpath.join(path, index["media_root"]))
        for shard in self.shards:
            if shard.name in ("", ".", "..") or set(shard.name) & set("/\\"):
                raise UserError(f"{url}/{INDEX}: shard name {shard.name!r} leaves the folder; make the index anew")
            if len(shard.entries) != shard.samples:
                raise ValueError(f"{shard.name} lists {len(shard.entries)} of {shard.samples} samples")

    @classmethod
    def open(cls, url: str, cfg: DataSources = storage.DEFAULT) -> "ShardFolder":
        """The folder at a path or URL; raises UserError if it has no readable index.json or no samples.

        cfg: time-out, retries and cache of remote folders.
        """
        url = str(url).rstrip("/")
        try:
            fs, path = storage.open_folder(url)
            text = storage.read_file(fs, f"{path}/{INDEX}", cfg)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"no shards found in {url}: no {INDEX} there; run data_prep/shard.py to make it") from None
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"cannot read {url}/{INDEX}: {error}") from None
        try:
            index = json.loads(text)
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']}, this version reads {FORMAT}")
            folder = cls(url, fs, path, index, cfg)
        except UserError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{url}/{INDEX} is not a readable index ({reason}); run data_prep/shard.py again") from None
        if len(folder) == 0:
            raise UserError(f"{url} is empty: no samples in {INDEX}; quarantine.jsonl there says what was left out")
        return folder

    def __len__(self) -> int:
        """Samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    def read(
        self, wanted: Sequence[tuple[int, int]], exts: Sequence[str] = ("json", "fbank", "frames")
    ) -> list[dict[str, bytes] | Damaged]:
        """Bytes by kind ("json", "fbank", "frames") of each wanted (shard, entry), less those that a sample lacks or are empty.

        Adjacent members are one range, all ranges are read at once (storage.py). Size and CRC-32 are checked; a damaged
        sample, missing tar or failing read gives a Damaged in its place, never an exception.
        """
        plans = [self._plan(shard, entry, tuple(exts)) for shard, entry in wanted]
        parts = [(self.shards[s], part) for (s, _), plan in zip(wanted, plans, strict=True) for part in plan]
        ranges = [storage.Range(f"{self.path}/{s.name}", s.sha256, part.start, part.end) for s, part in parts]
        blobs = iter(self.reader.read(ranges, lambda i, blob: not _members(parts[i][1], blob)[1]))
        return [self._check(s, e, plan, blobs) for (s, e), plan in zip(wanted, plans, strict=True)]

    def _plan(self, shard: int, entry: int, exts: tuple[str, ...]) -> list[_Range]:
        """Byte ranges for one sample, adjacent members joined."""
        _, members = self.shards[shard].members(entry)
        chosen = [(ext.partition(".")[0], member) for ext, member in members.items()]
        parts: list[_Range] = []
        for kind, member in sorted((c for c in chosen if c[0] in exts and c[1].size), key=lambda c: c[1].offset):
            end = member.offset + member.size
            if parts and member.offset - parts[-1].end < 2 * HEADER:  # padding and a header between
                parts[-1] = _Range(parts[-1].start, end, [*parts[-1].members, (kind, member)])
            else:
                parts.append(_Range(member.offset, end, [(kind, member)]))
        return parts

    def _check(self, shard: int, entry: int, plan: list[_Range], blobs: Any) -> dict[str, bytes] | Damaged:
        """The sample's bytes by kind; takes its ranges' answers off `blobs`."""
        key, name = self.shards[shard].entries[entry][0], self.shards[shard].name
        sample: dict[str, bytes] = {}
        reason = ""
        for part, blob in [(part, next(blobs)) for part in plan]:
            if isinstance(blob, BaseException):
                reason = reason or f"{type(blob).__name__}: {blob}"
                continue
            members, fault = _members(part, blob)
            sample |= members
            reason = reason or fault
        return Damaged(name, key, reason) if reason else sample


def _members(part: _Range, blob: bytes) -> tuple[dict[str, bytes], str]:
    """(bytes by kind, what is wrong with them or "") of one range."""
    found: dict[str, bytes] = {}
    for kind, member in part.members:
        at = member.offset - part.start
        found[kind] = bytes(blob[at : at + member.size])
        if len(found[kind]) != member.size:
            return found, f"{kind}: {len(found[kind])} of {member.size} bytes"
        if zlib.crc32(found[kind]) != member.crc32:
            return found, f"{kind}: CRC-32 differs from {INDEX}"
    return found, ""
