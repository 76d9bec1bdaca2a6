"""Write shard folders (names, metadata, fingerprint, tars), and read samples from their tars by byte range.

A folder holds SOURCE-SPLIT-000000.tar …, index.json, which counts the samples of each, and entries.jsonl with a line
[key, {extension: [offset, size, CRC-32]}] for each sample, of which only the shards in use are in memory. Members of a sample,
in this order: KEY.json, KEY.fbank.jpg|png (the log-mel picture of spectrogram.encode) and KEY.frames.jpg (the film strip: n
frames stacked vertically).

KEY.json: id, item (the thing shown), group (stays in one split, answers the same queries), source, split, captions and
caption_langs (parallel), lang (spoken), audio_type (vb, nb, both), label, start and end (s in the medium, or null),
duration (s of audio), n_frames, n_segments, n_rows (valid ones), has_audio, has_frames, media {audio, frames}.
"""

import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import posixpath
import tarfile
import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from clip4vla.config import DataConfig, DataSources, FramesConfig, SpectrogramConfig
from clip4vla.config_io import from_tree, to_dict
from clip4vla.errors import UserError
from clip4vla.io import remote
from clip4vla.io.atomic import atomic_write, line, open_exclusive, write_json

INDEX = "index.json"
ENTRIES = "entries.jsonl"
FORMAT = 2
DECODER = json.JSONDecoder()  # without what json.loads does around it, which takes as long for a line
HEADER = 512  # bytes of a tar header, and the unit that members are padded to


class Member(NamedTuple):
    """Locates one file in a tar: where its bytes start, how many there are, and their CRC-32."""

    offset: int
    size: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Shard:
    """Describes one tar as index.json does. entries: where its lines of entries.jsonl are.

    of: in a folder of vectors, the sha256 of the shard that they belong to.
    """

    name: str
    samples: int
    bytes: int
    sha256: str
    entries: Member
    of: str = ""

    @classmethod
    def of_json(cls, tree: dict[str, Any]) -> "Shard":
        """Make a shard from its row of index.json; raises ValueError or TypeError if that cannot be one."""
        shard = cls(**tree | {"entries": Member(*tree["entries"])})
        texts, numbers = (shard.name, shard.sha256, shard.of), (shard.samples, shard.bytes, *shard.entries)
        if not all(isinstance(x, str) for x in texts) or not all(type(x) is int and x >= 0 for x in numbers):
            raise ValueError(f"a shard is {tree!r:.200}")
        return shard


class Entries(Sequence[tuple[str, dict[str, Member]]]):
    """Holds the samples of one shard: key, and members by extension ("json", "fbank.jpg", "frames.jpg").

    Kept as text, which takes a tenth of the memory; raises ValueError, KeyError or TypeError for a line that is none.
    """

    def __init__(self, lines: bytes) -> None:
        self.lines = lines.splitlines()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, number: Any) -> Any:
        key, members = DECODER.decode(self.lines[number].decode())
        return key, {ext: Member(*place) for ext, place in members.items()}

    def keys(self) -> list[str]:
        """List the keys of all samples."""
        return [key for key, _ in self]


@dataclass(frozen=True)
class CorruptSample:
    """Names a sample that could not be read intact, by shard and key, and says why."""

    shard: str
    key: str
    reason: str


class _Range(NamedTuple):
    """Joins adjacent members of one sample, fetched together: bytes start..end of a tar."""

    start: int
    end: int
    members: list[tuple[str, Member]]


def fingerprint(cfg: DataConfig) -> dict[str, Any]:
    """Collect every setting that shaped the pixels, and the versions of the libraries that made them."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchaudio", "pillow")}
    settings = {"spectrogram": dataclasses.asdict(cfg.spectrogram), "frames": frames_settings(cfg.frames)}
    return settings | {"versions": versions}


def frames_settings(frames: FramesConfig) -> dict[str, Any]:
    """List the settings of frames, resize_mode only where it is not the default: hashes from before it was there stay valid."""
    settings = dataclasses.asdict(frames)
    return {key: settings[key] for key in settings if (key, settings[key]) != ("resize_mode", FramesConfig.resize_mode)}


def write_shard(path: str | Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> dict[str, Any]:
    """Write (key, {ext: bytes}) samples as a tar that is complete or absent; returns its entry for index.json.

    Equal samples give equal bytes: times, owners and modes are fixed, members keep the order of the dictionary.
    Raises UserError if another process is writing the same shard.
    """
    import webdataset

    partial = f"{path}.partial"
    with open_exclusive(partial) as stream:  # not atomic_write: it would give the errors of samples this file's name
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


def _describe(path: str, name: str) -> dict[str, Any]:
    """Make the index entry of a finished tar from its own bytes."""
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


def write_index(
    folder: str | Path,
    *,
    fingerprint: dict[str, Any],
    media_root: str,
    source: str,
    split: str,
    counts: dict[str, Any],
    shards: Iterable[dict[str, Any]],
) -> None:
    """Write entries.jsonl and then index.json of a folder; each is complete or absent, and index.json has the other's CRC-32s.

    counts: samples, with_audio, with_frames, seconds, quarantined. shards: what write_shard returned; taken one by one.
    """
    rows = []
    with atomic_write(Path(folder, ENTRIES)) as stream:
        for shard in shards:
            lines = "".join(line(entry) for entry in shard["entries"]).encode()
            rows.append(shard | {"entries": Member(stream.tell(), len(lines), zlib.crc32(lines))})
            stream.write(lines)
    head = {"format": FORMAT, "fingerprint": fingerprint, "media_root": media_root, "source": source, "split": split}
    write_json(Path(folder) / INDEX, head | {"counts": counts, "shards": rows})


class ShardFolder:
    """Reads a folder of shards, local or at any fsspec URL; samples are addressed by (shard number, entry number)."""

    def __init__(
        self, url: str, fs: fsspec.AbstractFileSystem, path: str, index: dict[str, Any], cfg: DataSources
    ) -> None:
        self.url, self.fs, self.path, self.cfg = url, fs, path, cfg
        self.reader = remote.Reader(fs, cfg)
        self.shards = [Shard.of_json(shard) for shard in index["shards"]]
        self.total = sum(shard.samples for shard in self.shards)
        self.in_use: collections.OrderedDict[int, Entries] = collections.OrderedDict()  # the last one used last
        self.looking = threading.Lock()  # one thread reads samples, another asks for the names of corrupt ones
        self.fingerprint: dict[str, Any] = _made_with(index["fingerprint"])
        self.counts: dict[str, Any] = index["counts"]
        self.source, self.split = _name(index["source"]), _name(index["split"])
        self.media_root = posixpath.normpath(posixpath.join(path, index["media_root"]))
        for shard in self.shards:
            _name(shard.name)
        lines = sum(shard.entries.size for shard in self.shards)
        there = remote.size(fs, f"{path}/{ENTRIES}", cfg) if self.shards else 0
        if lines != there or lines < self.total:
            raise ValueError(f"{ENTRIES} has {there} bytes, not {lines} for {self.total} samples")

    @classmethod
    def open(cls, url: str, cfg: DataSources = remote.DEFAULT) -> "ShardFolder":
        """Open the folder at a path or URL; raises UserError if it has no readable index.json or no samples.

        cfg: time-out, retries and cache of remote folders.
        """
        url = str(url).rstrip("/")
        try:
            fs, path = remote.open_folder(url)
            text = remote.read_file(fs, f"{path}/{INDEX}", cfg)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"no shards found in {url}: no {INDEX} there; run data_prep/shard.py to make it") from None
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"cannot read {url}/{INDEX}: {error}") from None
        try:
            index = json.loads(text)
            if index["format"] != FORMAT:
                raise ValueError(f"format {index['format']}, this version reads {FORMAT}")
            folder = cls(url, fs, path, index, cfg)
        except OSError as error:
            raise UserError(f"cannot read {url}/{ENTRIES}: {error}; run data_prep/shard.py to make it") from None
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{url}/{INDEX} is not a readable index ({reason}); run data_prep/shard.py again") from None
        if len(folder) == 0:
            raise UserError(f"{url} is empty: no samples in {INDEX}; quarantine.jsonl there says what was left out")
        return folder

    def __len__(self) -> int:
        """Count the samples in all shards."""
        return self.total

    def entries(self, shard: int) -> Entries:
        """List the samples of a shard; ValueError if they cannot be had."""
        entries = self._entries({shard})[shard]
        if isinstance(entries, str):
            raise ValueError(f"{self.shards[shard].name}: {entries}")
        return entries

    def read(
        self, wanted: Sequence[tuple[int, int]], exts: Sequence[str] = ("json", "fbank", "frames")
    ) -> list[dict[str, bytes] | CorruptSample]:
        """Read each wanted (shard, entry): bytes by kind ("json", "fbank", "frames"), less what it lacks or is empty.

        Adjacent members are one range, all ranges are read at once (io/remote.py). Size and CRC-32 are checked; a corrupt
        sample, missing tar or failing read gives a CorruptSample in its place, never an exception.
        """
        entries = self._entries({shard for shard, _ in wanted})
        plans = [self._plan(shard, entry, entries[shard], tuple(exts)) for shard, entry in wanted]
        parts = [(self.shards[s], part) for (s, _), plan in zip(wanted, plans, strict=True) for part in plan.ranges]
        ranges = [remote.Range(f"{self.path}/{s.name}", s.sha256, part.start, part.end) for s, part in parts]
        blobs = iter(self.reader.read(ranges, lambda i, blob: not _split(parts[i][1], blob, {})))
        return [_checked(self.shards[shard].name, plan, blobs) for (shard, _), plan in zip(wanted, plans, strict=True)]

    def corrupt(self, shard: int, number: int, reason: str) -> CorruptSample:
        """Make the report of a sample that was read, and is not right all the same."""
        return CorruptSample(self.shards[shard].name, self.key(shard, number), reason)

    def key(self, shard: int, number: int) -> str:
        """Return the key of a sample, or its number if that cannot be read."""
        return self._plan(shard, number, self._entries({shard})[shard], ()).key

    def _entries(self, shards: set[int]) -> dict[int, Entries | str]:
        """Look up the samples of each shard, or why they cannot be had; those of two windows of shards stay in memory."""
        with self.looking:
            return self._looked_up(shards)

    def _looked_up(self, shards: set[int]) -> dict[int, Entries | str]:
        missing = sorted(shards - self.in_use.keys())
        places = [self.shards[shard].entries for shard in missing]
        ranges = [
            remote.Range(
                f"{self.path}/{ENTRIES}", f"{ENTRIES} of {self.shards[shard].sha256}", p.offset, p.offset + p.size
            )
            for shard, p in zip(missing, places, strict=True)
        ]
        blobs = self.reader.read(ranges, lambda i, blob: not read_error(places[i], blob))
        by_shard: dict[int, Entries | str] = {shard: self.in_use[shard] for shard in shards & self.in_use.keys()}
        for shard, place, blob in zip(missing, places, blobs, strict=True):
            wrong = read_error(place, blob)
            entries = Entries(blob) if isinstance(blob, bytes) and not wrong else None
            if entries is not None and len(entries) != self.shards[shard].samples:
                wrong = f"{len(entries)} of {self.shards[shard].samples} samples"
            by_shard[shard] = f"{ENTRIES}: {wrong}" if entries is None or wrong else entries
        self._keep(by_shard)
        return by_shard

    def _keep(self, by_shard: dict[int, Entries | str]) -> None:
        for shard, entries in by_shard.items():
            if isinstance(entries, Entries):
                self.in_use[shard] = entries
                self.in_use.move_to_end(shard)
        while len(self.in_use) > 2 * self.cfg.shuffle_window:
            self.in_use.popitem(last=False)

    def _plan(self, shard: int, number: int, entries: Entries | str, exts: tuple[str, ...]) -> "_Plan":
        """Plan the byte ranges of one sample, adjacent members joined."""
        if isinstance(entries, str):
            return _Plan(f"entry {number}", [], entries)
        try:
            key, members = entries[number]
            chosen: dict[str, Member] = {}
            for ext, member in members.items():
                kind = ext.partition(".")[0]
                if kind in exts and member.size:
                    if kind in chosen:
                        raise ValueError("two members of one kind")
                    if member.offset < 0 or not 0 <= member.size <= self.shards[shard].bytes - member.offset:
                        raise ValueError("a member lies outside of the tar")
                    chosen[kind] = member
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            return _Plan(f"entry {number}", [], f"{ENTRIES}: {type(error).__name__}: {error}")
        return _Plan(key, _joined(sorted(chosen.items(), key=lambda kind_and_member: kind_and_member[1].offset)), "")


def _name(text: Any) -> str:
    """Return a name that is one part of a path; ValueError for what would leave the folder."""
    if not isinstance(text, str) or text in ("", ".", "..") or set(text) & set("/\\\0"):
        raise ValueError(f"the name {text!r} leaves the folder")
    return text


def _made_with(tree: dict[str, Any]) -> dict[str, Any]:
    """Read a fingerprint, with defaults; raises TypeError, AttributeError or UserError for settings that are none."""
    kinds = {"spectrogram": SpectrogramConfig, "frames": FramesConfig}
    sections = {
        name: from_tree(cls, tree[name], "fingerprint", f"{name}.") for name, cls in kinds.items() if name in tree
    }
    return {**tree, **{name: to_dict(settings) for name, settings in sections.items()}}


class _Plan(NamedTuple):
    """Says what is to be read of a sample, or why nothing can be."""

    key: str
    ranges: list[_Range]
    read_error: str


def _joined(members: list[tuple[str, Member]]) -> list[_Range]:
    """Join (kind, member) in the order of their offsets to ranges; between two joined ones lie padding and a header at most."""
    parts: list[_Range] = []
    for kind, member in members:
        end = member.offset + member.size
        if parts and member.offset - parts[-1].end < 2 * HEADER:
            parts[-1] = _Range(parts[-1].start, end, [*parts[-1].members, (kind, member)])
        else:
            parts.append(_Range(member.offset, end, [(kind, member)]))
    return parts


def _checked(shard: str, plan: _Plan, blobs: Iterator[Any]) -> dict[str, bytes] | CorruptSample:
    """Check a sample's bytes and return them by kind; takes its ranges' answers off `blobs`."""
    sample: dict[str, bytes] = {}
    reason = plan.read_error
    for part in plan.ranges:
        wrong = _split(part, next(blobs), sample)
        reason = reason or wrong
    return CorruptSample(shard, plan.key, reason) if reason else sample


def _split(part: _Range, blob: bytes | BaseException, by_kind: dict[str, bytes]) -> str:
    """Cut one range into members, added to by_kind, and check them; returns what is wrong, or ""."""
    if isinstance(blob, BaseException):
        return read_error(part.members[0][1], blob)
    for kind, member in part.members:
        at = member.offset - part.start
        by_kind[kind] = blob[at : at + member.size]
        if wrong := read_error(member, by_kind[kind]):
            return f"{kind}: {wrong}"
    return ""


def read_error(place: Member, answer: bytes | BaseException) -> str:
    """Say what is wrong with the bytes that were read of a place, or ""."""
    if isinstance(answer, BaseException):
        return f"{type(answer).__name__}: {answer}"
    if len(answer) != place.size:
        return f"{len(answer)} of {place.size} bytes"
    return "" if zlib.crc32(answer) == place.crc32 else f"CRC-32 differs from {INDEX}"
