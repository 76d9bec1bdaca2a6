"""Check one shard: which of its clips are intact, what is wrong with the others, and the facts of each clip."""

import hashlib
import io
import tarfile
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from clip4vla.config import SpectrogramConfig
from clip4vla.data.sample_metadata import labels_of, parse
from clip4vla.data.shards import ENTRIES, HEADER, INDEX, Entries, Member, Shard, read_error
from clip4vla.media.spectrogram import n_segments
from data_prep.checks.files import read

Members = dict[str, memoryview]  # by extension: "json", "fbank.jpg", "frames.jpg"
Places = dict[str, dict[str, Member]]  # by key and extension
Notes = list[tuple[str, str]]  # (key, or "" for the shard; what is wrong)

HASHES = ("id", "group", "item", "audio", "picture")  # 64 bits of BLAKE2; 0: the clip has none
COUNTS = ("n_segments", "n_frames", "n_captions")
FACTS = np.dtype([("shard", "i4"), ("entry", "i4"), ("seconds", "f8"), *((n, "i4") for n in COUNTS)]
                 + [(name, "u8") for name in HASHES])  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """Say what is wrong, and where; shard and key may be "" (the folder, the whole shard)."""

    folder: str
    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return " ".join(filter(None, (f"{self.folder}/{self.shard}".rstrip("/"), self.key))) + f": {self.reason}"


@dataclass
class ClipStats:
    """Count intact clips: a row of FACTS each, and counters of what has no column there."""

    facts: np.ndarray = field(default_factory=lambda: np.zeros(0, FACTS))
    words: Counter[int] = field(default_factory=Counter)  # captions by their length
    types: Counter[str] = field(default_factory=Counter)
    spoken: Counter[str] = field(default_factory=Counter)  # languages of clips with speech
    written: Counter[str] = field(default_factory=Counter)  # languages of captions
    labels: Counter[str] = field(default_factory=Counter)

    @classmethod
    def sum(cls, tallies: list["ClipStats"]) -> "ClipStats":
        """Merge the statistics of several shards or folders."""
        names, none = ("words", "types", "spoken", "written", "labels"), Counter[Any]()
        counts = [sum((getattr(tally, name) for tally in tallies), none) for name in names]
        return cls(np.concatenate([cls().facts, *(t.facts for t in tallies)]), *counts)

    def __len__(self) -> int:
        return len(self.facts)

    @property
    def hours(self) -> float:
        """Sum the clips' lengths in hours."""
        return self.facts["seconds"].sum() / 3600

    def without(self) -> dict[str, int]:
        """Count the clips without sound, without frames and without captions."""
        zeros = [int((self.facts[count] == 0).sum()) for count in COUNTS]
        return dict(zip(("sound", "frames", "captions"), zeros, strict=True))

    def columns(self) -> dict[str, np.ndarray]:
        """Return the values (n,) that distributions are taken of by name, each over the clips that have any."""
        names = {"seconds": "seconds", "segments": "n_segments", "frames": "n_frames", "captions a clip": "n_captions"}
        columns = {label: self.facts[name][self.facts[name] > 0] for label, name in names.items()}
        lengths = np.array(list(self.words), int)
        columns |= {"words a caption": np.repeat(lengths, list(self.words.values()))}
        return {name: values for name, values in columns.items() if len(values)}


@dataclass(frozen=True)
class Rules:
    """Hold what the clips of a folder must agree with; `vectors`: they are the frozen towers' and have no metadata."""

    source: str
    split: str
    spectrogram: SpectrogramConfig
    size: int  # pixels of a frame
    vectors: bool = False


@dataclass(frozen=True)
class ShardCheckJob:
    """Name one shard to check; `decode` numbers the entries whose pictures are decoded, None means all."""

    path: str  # or URL, of the folder
    number: int
    shard: Shard
    rules: Rules
    decode: frozenset[int] | None


def check_shard(task: ShardCheckJob) -> tuple[ClipStats, list[Finding]]:
    """Return the intact clips of one shard, and a finding for each of the others."""
    samples, notes = contents(task.path, task.shard)
    numbers, rows, tally = indexed(task.path, task.shard)[1], [], ClipStats()
    for key, members in samples.items():
        number = numbers.get(key)
        meta, reason = validate_sample(members, task.rules, task.decode is None or number in task.decode)
        if reason:
            notes.append((key, reason))
        elif meta is not None and number is not None:
            rows.append(_fact(task.number, number, meta, members))
            _count(tally, meta)
    tally.facts = np.array(rows, FACTS)
    reasons: dict[str, list[str]] = {}
    for key, reason in notes:
        reasons.setdefault(key, []).append(reason)
    where = (task.path, task.shard.name)
    return tally, [Finding(*where, key, "; ".join(dict.fromkeys(some))) for key, some in reasons.items()]


def contents(folder: str, shard: Shard) -> tuple[dict[str, Members], Notes]:
    """Return the samples of a shard whose bytes can be relied on, and notes on what is wrong.

    A tar with the indexed sha256 is right, whatever else the index says. In another, a member counts if it has the
    indexed CRC-32, be it at the indexed place or where the tar has its name (a repair may have been killed between tar
    and index); a sample with any other member is left out.
    """
    stated, _, notes = indexed(folder, shard)
    try:
        # twice as many, as what follows something that was put in is further on
        data, size = read(folder, shard.name, 0, 2 * shard.bytes)
    except OSError as error:
        return {}, [
            *notes,
            ("", f"unreadable: {error.strerror}"),
            *((key, "its shard is unreadable") for key in stated),
        ]
    listed, more = _listed(data)
    whole = hashlib.sha256(data).hexdigest() == shard.sha256
    notes += more + _disagreements(stated, listed)
    if size != shard.bytes:
        notes.append(("", f"{size:,} bytes, {shard.bytes} in {INDEX}"))
    if not whole:
        notes.append(("", f"sha256 differs from {INDEX}"))
    samples: dict[str, Members] = {}
    for key, members in (listed if whole else stated).items():
        tar = listed.get(key, {})
        parts = {ext: _bytes(memoryview(data), member, tar.get(ext)) for ext, member in members.items()}
        bad = [ext for ext, part in parts.items() if part is None]
        notes += [(key, f"{ext}: no {members[ext].size:,} bytes there with its CRC-32") for ext in bad]
        if not bad:
            samples[key] = {ext: part for ext, part in parts.items() if part is not None}
    return samples, notes


def indexed(folder: str, shard: Shard) -> tuple[Places, dict[str, int], Notes]:
    """Return the members that entries.jsonl lists, the number of each key's entry, and notes on malformed entries."""
    stated: Places = {}
    numbers: dict[str, int] = {}
    entries, notes = _entries(folder, shard)
    for number in range(len(entries)):
        try:
            key, members = entries[number]
            counts = [count for member in members.values() for count in member]
            good = isinstance(key, str) and "." not in key and all(type(n) is int and n >= 0 for n in counts)
        except (TypeError, ValueError, AttributeError, LookupError, RecursionError):
            good = False
        if not good:
            notes.append(("", f"entry {number} in {ENTRIES} is malformed"))
        elif key in stated:
            notes.append((key, f"twice in {ENTRIES}"))
        else:
            stated[key], numbers[key] = members, number
    return stated, numbers, notes


def _entries(folder: str, shard: Shard) -> tuple[Entries, Notes]:
    """Read the lines of a shard in entries.jsonl, none if their checksum is not the one in index.json."""
    lines, _ = read(folder, ENTRIES, shard.entries.offset, shard.entries.size)
    if wrong := read_error(shard.entries, lines):
        return Entries(b""), [("", f"{ENTRIES}: {wrong}")]
    entries = Entries(lines)
    return entries, [("", f"{len(entries)} samples, {shard.samples} in {INDEX}")] * (len(entries) != shard.samples)


def _listed(data: bytes) -> tuple[Places, Notes]:
    """Return the members that the tar's own headers list, as far as they can be read.

    One header after the other. tarfile.open would follow those of pax and of long names, which write_shard does not make:
    1 MB of digits takes it 40 minutes, 400 in a row its stack, and a negative size leads it back without end.
    """
    listed: Places = {}
    notes: Notes = []
    at = 0
    try:
        while (head := data[at : at + HEADER]) != bytes(HEADER):
            info = tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
            if info.size < 0:
                raise tarfile.ReadError(f"a member of {info.size} bytes")
            at += HEADER
            key, _, ext = info.name.partition(".")
            if not info.isfile() or ext in listed.get(key, {}):
                notes.append((key, f"{ext} is in the tar twice, or is no file"))
            listed.setdefault(key, {})[ext] = Member(at, info.size, zlib.crc32(data[at : at + info.size]))
            at += -(-info.size // HEADER) * HEADER
    except tarfile.TarError as error:
        notes.append(("", f"unreadable tar: {error}"))
    return listed, notes


def _disagreements(stated: Places, listed: Places) -> Notes:
    notes: Notes = []
    for key in dict.fromkeys([*stated, *listed]):
        there, here = stated.get(key, {}), listed.get(key, {})
        notes += [(key, f"{ext} is in {ENTRIES}, not in the tar") for ext in there if ext not in here]
        notes += [(key, f"{ext} is in the tar, not in {ENTRIES}") for ext in here if ext not in there]
        for ext in [ext for ext in there if ext in here]:
            one, two = there[ext], here[ext]
            if (one.offset, one.size) != (two.offset, two.size):
                where = f"{two.offset}+{two.size}, by {INDEX} at {one.offset}+{one.size}"
                notes.append((key, f"{ext} is at {where}"))
            elif one.crc32 != two.crc32:
                notes.append((key, f"{ext}: CRC-32 differs from {INDEX}"))
    return notes


def _bytes(data: memoryview, stated: Member, listed: Member | None) -> memoryview | None:
    """Return the stated bytes: where the index, else where the tar has them; None if neither place has their CRC-32."""
    for place in filter(None, (stated, listed)):
        part = data[place.offset : place.offset + stated.size]
        if len(part) == stated.size and zlib.crc32(part) == stated.crc32:
            return part
    return None


def validate_sample(members: Members, rules: Rules, decode: bool) -> tuple[dict[str, Any] | None, str]:
    """Return a sample's metadata, and why it is corrupt ("" if it is not)."""
    if rules.vectors:
        return None, "" if set(members) == {"clip.f16"} else f"members {sorted(members)}, not clip.f16 alone"
    if "json" not in members:
        return None, "no json"
    try:
        meta = parse(bytes(members["json"]))
    except ValueError as error:
        return None, str(error)
    reason = _consistency(meta, members, rules)
    return meta, reason or next(filter(None, (_picture(meta, ext, members[ext], rules, decode) for ext in members)), "")


def _consistency(meta: dict[str, Any], members: Members, rules: Rules) -> str:
    """Say where folder, counts and members disagree, "" if nowhere."""
    spec, rows = rules.spectrogram, meta["n_rows"]
    if (meta["source"], meta["split"]) != (rules.source, rules.split):
        return f"json: {meta['source']}/{meta['split']} in the folder of {rules.source}/{rules.split}"
    wanted = {"json", *[f"fbank.{spec.codec}"] * meta["has_audio"], *["frames.jpg"] * meta["has_frames"]}
    if set(members) != wanted:
        return f"members {sorted(members)}, by its json {sorted(wanted)}"
    if rows > spec.max_segments * spec.segment_rows or meta["n_segments"] != (n_segments(rows, spec) if rows else 0):
        return f"json: n_segments is {meta['n_segments']}, n_rows {rows}"
    return ""


def _picture(meta: dict[str, Any], ext: str, data: memoryview, rules: Rules, decode: bool) -> str:
    """Say why a picture is not what its metadata say; only its header is read unless `decode`."""
    if ext == "json":
        return ""
    spec = rules.spectrogram
    size, mode = (rules.size, meta["n_frames"] * rules.size), "RGB"
    if ext != "frames.jpg":
        size, mode = (spec.n_mels, meta["n_segments"] * spec.segment_rows), "L" if spec.channels == "mono" else "RGB"
    try:
        with Image.open(io.BytesIO(data), formats=["PNG" if ext.endswith("png") else "JPEG"]) as image:
            if (image.size, image.mode) != (size, mode):
                return f"{ext} is {image.mode} {image.size}, by its json {mode} {size}"
            if decode:
                image.load()
    except Exception as error:  # Pillow raises whatever its parsers raise
        return f"{ext} cannot be decoded: {error}"
    return ""


def _fact(shard: int, entry: int, meta: dict[str, Any], members: Members) -> tuple[Any, ...]:
    """Return one row of FACTS."""
    bodies = {ext.partition(".")[0]: data for ext, data in members.items()}
    hashed = [meta[name].encode() for name in ("id", "group", "item")] + [bodies.get("fbank"), bodies.get("frames")]
    return (
        shard, entry, meta["duration"], meta["n_segments"], meta["n_frames"], len(meta["captions"]),
        *(0 if data is None else int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1 for data in hashed),
    )  # fmt: skip


def _count(tally: ClipStats, meta: dict[str, Any]) -> None:
    tally.words.update(len(caption.split()) for caption in meta["captions"])
    tally.types[meta["audio_type"]] += 1
    tally.written.update(meta["caption_langs"])
    tally.labels.update(labels_of(meta))
    if meta["has_audio"] and meta["audio_type"] != "nb":
        tally.spoken[meta["lang"]] += 1
