"""Sample order -> bytes -> DALI -> Batch.

The loader has no state: which samples form global batch k, with which captions and masks, is a pure function of
(seed, shards, k), and rank r of W takes rows r, r + W, ... of it (of each of its pieces, with accumulation). So resuming is
an integer, and the order is the same on any number of ranks.
"""

import collections
import concurrent.futures
import functools
import hashlib
import itertools
import json
import zlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clip4vla import distributed
from clip4vla.batch import Batch
from clip4vla.config import DataSources, MaskConfig, SpectrogramConfig, UserError
from clip4vla.decoder import Decoder
from clip4vla.masking import draw
from clip4vla.shards import Damaged, ShardFolder
from clip4vla.storage import DEFAULT

TYPES = {"vb": 0, "nb": 1, "both": 2}
COUNTS = {"frames": "n_frames", "fbank": "n_segments"}  # in a clip's json, of the tiles in its strip
EVERYTHING = slice(None)
MIN_READS = 1000  # the share of damaged samples is judged over at least so many


class Place(NamedTuple):
    """Where one sample of a batch is: entry `entry` of shard `shard` of source `source`, met for the `epoch`-th time."""

    source: int
    shard: int
    entry: int
    epoch: int


class TrainOrder:
    """Endless shuffled order over several sources, each with its fixed part of every batch.

    sizes: samples of each shard of each source. Shards are shuffled in every epoch, then samples inside a window of
    shards. An epoch of a source ends with its last whole part of a batch: the tail is dropped, and differs every epoch.
    """

    def __init__(self, sizes: list[list[int]], shares: Sequence[float], batch_size: int, seed: int, window: int):
        self.sizes, self.seed, self.window = [np.array(s) for s in sizes], seed, window
        self.batch_size = batch_size
        self.parts = _apportion(shares, batch_size)
        for source, part in enumerate(self.parts):
            if part > self.sizes[source].sum():
                raise UserError(
                    f"data.train: source {source + 1} has {self.sizes[source].sum()} samples, fewer than its {part} of "
                    f"a batch of {batch_size}: lower train.batch_size or its share"
                )

    def batch(self, k: int, rows: slice = EVERYTHING) -> list[Place]:
        """Rows of global batch k, sources interleaved at random."""
        return [Place(*row) for row in self._batch(k)[rows].tolist()]

    @functools.lru_cache(maxsize=4)  # noqa: B019  (its pieces are asked for one by one)
    def _batch(self, k: int) -> np.ndarray:
        """(batch_size, 4) of the fields of Place."""
        parts = []
        for source, part in enumerate(self.parts):
            if part:
                epoch, place = divmod(k, int(self.sizes[source].sum()) // part)
                found = self._at(source, epoch, np.arange(place * part, (place + 1) * part))
                parts.append(np.column_stack([np.full(part, source), found, np.full(part, epoch)]))
        return np.random.default_rng((self.seed, k, 1)).permutation(np.concatenate(parts))

    def _at(self, source: int, epoch: int, positions: np.ndarray) -> np.ndarray:
        """(shard, entry) at these ascending positions of an epoch, (n, 2)."""
        _, ends = self._shards(source, epoch)
        windows = np.searchsorted(ends, positions, side="right")
        firsts = np.concatenate([[0], ends])[windows]
        return np.concatenate(
            [
                self._window(source, epoch, int(window))[(positions - firsts)[windows == window]]
                for window in np.unique(windows)
            ]
        )

    @functools.lru_cache(maxsize=32)  # noqa: B019  (an order lives as long as its run)
    def _shards(self, source: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shuffled shard numbers, position behind the last sample of each window of shards)."""
        shards = np.random.default_rng((self.seed, source, epoch, 2)).permutation(len(self.sizes[source]))
        ends = self.sizes[source][shards].cumsum()
        return shards, ends[[*range(self.window - 1, len(shards) - 1, self.window), len(shards) - 1]]

    @functools.lru_cache(maxsize=32)  # noqa: B019
    def _window(self, source: int, epoch: int, window: int) -> np.ndarray:
        """(shard, entry) of the samples of one window, shuffled."""
        shards = self._shards(source, epoch)[0][window * self.window : (window + 1) * self.window]
        pairs = np.concatenate(
            [
                np.stack([np.full(n, s), np.arange(n)], 1)
                for s, n in zip(shards, self.sizes[source][shards], strict=True)
            ]
        )
        return np.random.default_rng((self.seed, source, epoch, window, 3)).permutation(pairs)


class EvalOrder:
    """Every sample once, in the order of the shards; the last batch is padded with None so that ranks stay in step.

    most: samples of each source at most; 0: all.
    """

    def __init__(self, sizes: list[list[int]], batch_size: int, most: int = 0):
        self.batch_size = batch_size
        self.places = [
            place
            for s, shards in enumerate(sizes)
            for place in [Place(s, i, e, 0) for i, n in enumerate(shards) for e in range(n)][: most or None]
        ]

    def __len__(self) -> int:
        return -(-len(self.places) // self.batch_size)

    def batch(self, k: int, rows: slice = EVERYTHING) -> list[Place | None]:
        """Rows of global batch k."""
        places = self.places[k * self.batch_size : (k + 1) * self.batch_size]
        return (places + [None] * (self.batch_size - len(places)))[rows]


class Loader:
    """Batches of this rank from shard folders.

    needs: which pictures to read, of "frames" and "fbank". order: TrainOrder or EvalOrder over the same folders.
    vectors: folders of frozen vectors (vectors.py), one for each folder: captions and frames come as these. whole: this rank
    takes whole batches, not its part of them. pieces: micro-batches that a global batch is cut into, the same on any ranks.
    pad_tokens: if set, batches are Batch.padded to it.
    """

    def __init__(self, folders, order, cfg: DataSources, *, tokenize, mask: MaskConfig, seed: int, needs: Sequence[str],
                 device: torch.device, damage_log: Path, vectors: Sequence[ShardFolder] | None = None,
                 whole: bool = False, pieces: int = 1, pad_tokens: int = 0):  # fmt: skip
        self.folders, self.order, self.cfg, self.tokenize, self.mask = folders, order, cfg, tokenize, mask
        self.seed, self.needs, self.device, self.damage_log = seed, needs, device, damage_log
        self.vectors, self.pieces, self.pad_tokens = vectors, pieces, pad_tokens
        self.rank, self.world = (0, 1) if whole else (distributed.rank(), distributed.world())
        self.spectrogram = SpectrogramConfig(**folders[0].fingerprint["spectrogram"])
        self.reads = self.damaged = 0
        self.decoders: dict[str, Decoder] = {}

    def over(self, folders: list[ShardFolder], order: "TrainOrder | EvalOrder", needs: Sequence[str]) -> "Loader":
        """A loader of other folders that is as this one otherwise."""
        return Loader(
            folders, order, self.cfg, tokenize=self.tokenize, mask=self.mask, seed=self.seed, needs=needs,
            device=self.device, damage_log=self.damage_log,
        )  # fmt: skip

    def numbers(self, k: int) -> list[int]:
        """The place in the order of each row of this rank's part of batch k."""
        size = self.order.batch_size
        return list(range(k * size + self.rank, (k + 1) * size, self.world))

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """For each of global batches start..stop-1 this rank's part of its pieces."""
        batches = self.batches(start, stop)
        while micros := list(itertools.islice(batches, self.pieces)):
            yield micros

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """This rank's part of the pieces of global batches start..stop-1, prepared ahead: a thread reads, a thread decodes."""
        pending: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
        on_device = (torch.cuda.set_device, (self.device,)) if self.device.type == "cuda" else (None, ())
        reader = concurrent.futures.ThreadPoolExecutor(1, "read")
        decoder = concurrent.futures.ThreadPoolExecutor(1, "decode", *on_device)

        def complete(ready: concurrent.futures.Future[tuple[dict[str, Any], list]]) -> Batch:
            return self._with_pictures(*ready.result())

        try:
            for k, piece in ((k, piece) for k in range(start, stop) for piece in range(self.pieces)):
                ready = reader.submit(self._without_pictures, k, piece)
                pending.append(decoder.submit(complete, ready))
                if len(pending) > self.cfg.prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            reader.shutdown(wait=True, cancel_futures=True)  # the decoder may be waiting for one of its results
            decoder.shutdown(wait=True, cancel_futures=True)

    def batch(self, k: int, piece: int = 0) -> Batch:
        """This rank's part of a piece of global batch k."""
        return self._with_pictures(*self._without_pictures(k, piece))

    def _without_pictures(self, k: int, piece: int) -> tuple[dict[str, Any], list]:
        """(all of a Batch but its pictures, the samples as they were read)."""
        size = self.order.batch_size // self.pieces
        places = self.order.batch(k, slice(piece * size + self.rank, (piece + 1) * size, self.world))
        samples = self._read(places)
        clips = [spoken(json.loads(s["json"]), self.cfg.languages) if s else _NOTHING for s in samples]
        keys = [
            (self.seed, zlib.crc32(c["id"].encode()), p.epoch if p else 0) for c, p in zip(clips, places, strict=True)
        ]
        drawn = [_drawn(c, key, self.cfg.captions) for c, key in zip(clips, keys, strict=True)]
        captions = [c["captions"][j] if c["captions"] else "" for c, j in zip(clips, drawn, strict=True)]
        frozen: dict[str, Tensor] = {"frame_clip": _owners(samples, clips, "frames")}
        frozen |= self._vectors(samples, clips, drawn) if self.vectors else {"tokens": self.tokenize(captions)}
        return self._described(clips, keys, _owners(samples, clips, "fbank")) | {"captions": captions} | frozen, samples

    def _described(self, clips: list[dict], keys, segment_clip: Tensor) -> dict[str, Any]:
        """What a Batch takes from the json of each clip, masks included."""
        rows, hidden_rows, hidden_channels = self._masks(clips, keys, segment_clip)
        return {
            "ids": [c["id"] for c in clips],
            "segment_clip": segment_clip,
            "segment_rows": rows,
            "hidden_rows": hidden_rows,
            "hidden_channels": hidden_channels,
            "audio_type": torch.tensor([TYPES[c["audio_type"]] for c in clips]),
            "group": torch.tensor([number(c["group"]) for c in clips]),
            "has_text": torch.tensor([bool(c["captions"]) for c in clips]),
            "has_audio": _among(len(clips), segment_clip),
            "meta": clips,
        }

    def _with_pictures(self, described: dict[str, Any], samples: list) -> Batch:
        clips = described["meta"]
        frames = self._pictures("frames", samples, clips)
        segments = self._pictures("fbank", samples, clips)
        has_frames = _among(len(samples), described["frame_clip"])
        batch = Batch(frames=frames, segments=segments, has_frames=has_frames, **described)
        batch = batch.padded(self.pad_tokens) if self.pad_tokens else batch
        return batch.pin() if self.device.type == "cuda" else batch

    def _read(self, places: list[Place | None]) -> list[dict[str, bytes] | None]:
        """The members of each sample by kind; None for padding and for damaged samples, which are counted and listed."""
        samples: list[dict[str, bytes] | None] = [None] * len(places)
        for source, folder in enumerate(self.folders):
            rows = {i: place for i, place in enumerate(places) if place and place.source == source}
            wanted = [(place.shard, place.entry) for place in rows.values()]
            found = folder.read(wanted, ("json", *self.needs))
            if self.vectors:
                found = _with_vectors(found, self.vectors[source], wanted)
            for i, sample in zip(rows, found, strict=True):
                self.reads += 1
                if isinstance(sample, Damaged):
                    self._damage(sample)
                else:
                    samples[i] = sample
        return samples

    def _damage(self, sample: Damaged) -> None:
        self.damaged += 1
        with self.damage_log.open("a") as log:
            log.write(json.dumps(vars(sample)) + "\n")
        if self.damaged > self.cfg.max_damage * max(self.reads, MIN_READS):
            raise UserError(
                f"{self.damaged} of {self.reads} samples read were damaged, more than data.max_damage={self.cfg.max_damage} "
                f"of at least {MIN_READS}; they are listed in {self.damage_log} (last: {sample.reason})"
            )

    def _pictures(self, kind: str, samples: list, clips: list[dict]) -> Tensor:
        """Tiles (n, channels, size, width) uint8 of the strips that are there; UserError if one is not as its json says."""
        there = [i for i, sample in enumerate(samples) if sample and kind in sample]
        size, width, channels = self._tile(kind)
        if not there:
            return torch.zeros(0, channels, size, width, dtype=torch.uint8)
        if kind not in self.decoders:
            self.decoders[kind] = Decoder(len(samples), channels, self.cfg.decode_threads, self.device)
        decoded = self.decoders[kind].run([samples[i][kind] for i in there])
        for i, shape in zip(there, decoded.shape(), strict=True):
            if tuple(shape) != (clips[i][COUNTS[kind]] * size, width, channels):
                raise UserError(
                    f"{clips[i]['id']}: a {kind} picture of {tuple(shape)} does not go with {COUNTS[kind]}="
                    f"{clips[i][COUNTS[kind]]} of its json: run data_prep/check.py --repair"
                )
        return self.decoders[kind].joined(decoded).view(-1, size, width, channels).permute(0, 3, 1, 2)

    def _tile(self, kind: str) -> tuple[int, int, int]:
        """Height, width and channels of a frame or segment."""
        if kind == "frames":
            return (*[self.folders[0].fingerprint["frames"]["size"]] * 2, 3)
        return self.spectrogram.segment_rows, self.spectrogram.n_mels, 1 if self.spectrogram.channels == "mono" else 3

    def _vectors(self, samples, clips, drawn: list[int]) -> dict[str, Tensor]:
        """What the towers would give: text_vectors (B, D) of the drawn captions, frame_vectors (F, D), frame_clip (F,)."""
        assert self.vectors
        width = self.vectors[0].fingerprint["clip"]["dim"]
        text, frames = torch.zeros(len(samples), width, dtype=torch.float16), []
        for i, (sample, clip) in enumerate(zip(samples, clips, strict=True)):
            data = sample.get("clip", b"") if sample else b""
            rows = torch.from_numpy(np.frombuffer(data, "<f2").astype(np.float16)).view(-1, width)
            if clip["captions"]:
                text[i] = rows[drawn[i]]
            frames.append(rows[len(clip["captions"]) :])
        frame_clip = torch.repeat_interleave(torch.tensor([len(part) for part in frames]))
        no_tokens = torch.zeros(len(samples), 0, dtype=torch.int64)
        return {"tokens": no_tokens, "text_vectors": text, "frame_vectors": torch.cat(frames), "frame_clip": frame_clip}

    def _masks(self, clips, keys, segment_clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(valid rows (S,), hidden rows (S, 224), hidden channels (S, 224)) of the packed segments."""
        height, width = self.spectrogram.segment_rows, self.spectrogram.n_mels
        total, first = len(segment_clip), 0
        rows, hidden_rows = np.zeros(total, int), np.zeros((total, height), bool)
        hidden_channels = np.zeros((total, width), bool)
        for clip, segments in enumerate(segment_clip.bincount(minlength=len(clips)).tolist()):
            if segments:
                part, valid = slice(first, first + segments), clips[clip]["n_rows"]
                by_row, hidden_channels[part] = draw(keys[clip], valid, width, self.mask)
                hidden_rows[part].reshape(-1)[:valid] = by_row
                rows[part] = np.clip(valid - height * np.arange(segments), 0, height)
                first += segments
        return torch.from_numpy(rows), torch.from_numpy(hidden_rows), torch.from_numpy(hidden_channels)


_NOTHING: dict[str, Any] = {"id": "", "group": "", "captions": [], "audio_type": "both", "n_rows": 0}


def open_folders(sources: dict[str, float], key: str, cfg: DataSources = DEFAULT) -> list[ShardFolder]:
    """The shard folders of a setting, which must all have been made with the same settings."""
    if not sources:
        raise UserError(f"{key} names no shard folder")
    folders = [ShardFolder.open(url, cfg) for url in sources]
    for folder in folders[1:]:
        check_fingerprint(folders[0].fingerprint, folder.fingerprint, folders[0].url, folder.url)
    return folders


def check_fingerprint(ours: dict, theirs: dict, our_name: str, their_name: str) -> None:
    """UserError that names both values if two fingerprints differ in a setting (library versions may differ)."""
    for section in ("spectrogram", "frames"):
        if section in ours and ours[section] != theirs[section]:
            differ = {k: (v, theirs[section].get(k)) for k, v in ours[section].items() if v != theirs[section].get(k)}
            words = ", ".join(f"{section}.{k} is {a!r} there and {b!r} here" for k, (a, b) in differ.items())
            raise UserError(
                f"fingerprints differ between {our_name} and {their_name}: {words}; make both with one config"
            )


def number(text: str) -> int:
    """A 63-bit number of a string, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _with_vectors(samples: list, vectors: ShardFolder, wanted: list[tuple[int, int]]) -> list[dict | Damaged]:
    """The samples with their vectors as "clip" (absent if 0 bytes); Damaged where these are, or are not as many as due."""
    width = 2 * vectors.fingerprint["clip"]["dim"]  # bytes
    out = []
    for sample, found, (shard, entry) in zip(samples, vectors.read(wanted, ("clip",)), wanted, strict=True):
        if isinstance(sample, Damaged) or isinstance(found, Damaged):
            out.append(sample if isinstance(sample, Damaged) else found)
            continue
        clip, size = json.loads(sample["json"]), len(found.get("clip", b""))
        rows, name = len(clip["captions"]) + clip["n_frames"], vectors.shards[shard].name
        reason = f"clip: {size} bytes, not {rows} vectors of {width}"
        key = vectors.shards[shard].entries[entry][0]
        out.append(sample | found if size == rows * width else Damaged(name, key, reason))
    return out


def _owners(samples: list, clips: list[dict], kind: str) -> Tensor:
    """The number of the clip that each tile of the strips belongs to, (n,)."""
    counts = [
        clip[COUNTS[kind]] if sample and kind in sample else 0 for sample, clip in zip(samples, clips, strict=True)
    ]
    return torch.repeat_interleave(torch.tensor(counts))


def _among(count: int, numbers: Tensor) -> Tensor:
    """Which of 0..count-1 are among the numbers, bool."""
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, numbers, True)


def spoken(clip: dict, languages: list[str]) -> dict:
    """A clip's json, with captions of these languages alone, if any are named."""
    if not languages:
        return clip
    kept = [j for j, language in enumerate(clip.get("caption_langs", [])) if language in languages]
    return clip | {name: [clip[name][j] for j in kept] for name in ("captions", "caption_langs") if name in clip}


def _drawn(clip: dict, key: tuple[int, int, int], how: str) -> int:
    """Number of the caption that this epoch's visit of a clip takes, by data.captions; 0 if it has none."""
    seed, name, epoch = key
    count = len(clip["captions"])
    if count < 2 or how == "first":
        return 0
    if how == "cycle":
        return (int(np.random.default_rng((seed, name, 4)).integers(count)) + epoch) % count
    return int(np.random.default_rng((seed, name, epoch, 1)).integers(count))


def _apportion(shares: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to the shares that add up to total (largest remainders)."""
    if min(shares) < 0 or sum(shares) <= 0:
        raise UserError(f"data.train: shares must be positive, not {list(shares)}")
    exact = np.array(shares, float) / sum(shares) * total
    parts = np.floor(exact).astype(int)
    parts[np.argsort(parts - exact, kind="stable")[: total - parts.sum()]] += 1
    return parts.tolist()
