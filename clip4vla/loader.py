"""Sample order -> bytes -> DALI -> Batch.

The loader has no state: which samples form global batch k, with which captions and masks, is a pure function of
(seed, shards, k), and rank r of W takes rows r, r + W, ... of it (of each of its pieces, with accumulation). So resuming is
an integer, and the order is the same on any number of ranks.
"""

import collections
import concurrent.futures
import hashlib
import itertools
import json
import threading
import zlib
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clip4vla import distributed
from clip4vla.batch import Batch
from clip4vla.clips import COUNTS, TYPES, must_fit, parsed
from clip4vla.config import DataSources, MaskConfig, SpectrogramConfig, UserError
from clip4vla.decoder import Decoder
from clip4vla.masking import draw
from clip4vla.order import EvalOrder, Place, TrainOrder
from clip4vla.shards import Damaged, ShardFolder
from clip4vla.storage import DEFAULT

MIN_READS = 1000  # the share of damaged samples is judged over at least so many


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
        self.counting = threading.Lock()
        self.decoders: dict[str, Decoder] = {}

    def over(self, folders: list[ShardFolder], order: TrainOrder | EvalOrder, needs: Sequence[str]) -> "Loader":
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

        def complete(ready: concurrent.futures.Future[_Samples]) -> Batch:
            return self._complete(ready.result())

        try:
            for k, piece in ((k, piece) for k in range(start, stop) for piece in range(self.pieces)):
                ready = reader.submit(self._read, k, piece)
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
        return self._complete(self._read(k, piece))

    def _complete(self, samples: "_Samples") -> Batch:
        """With all pictures decoded. Samples whose pictures cannot be are damaged ones: the batch is made again without them."""
        try:
            return self._with_pictures(samples)
        except _Undecodable as error:
            for i, reason in error.reasons.items():
                place = samples.places[i]
                assert place
                self._damage(self.folders[place.source].damaged(place.shard, place.entry, reason))
                samples.clips[i], samples.members[i] = _NOTHING, None
            return self._complete(
                samples._replace(described=self._described(samples.places, samples.clips, samples.members))
            )

    def _described(self, places: list[Place | None], clips: list[dict], members: list) -> dict[str, Any]:
        """All of a Batch but its pictures."""
        keys = [
            (self.seed, zlib.crc32(c["id"].encode()), p.epoch if p else 0) for c, p in zip(clips, places, strict=True)
        ]
        drawn = [_drawn(c, key, self.cfg.captions) for c, key in zip(clips, keys, strict=True)]
        captions = [c["captions"][j] if c["captions"] else "" for c, j in zip(clips, drawn, strict=True)]
        frozen: dict[str, Tensor] = {"frame_clip": _owners(members, clips, "frames")}
        frozen |= self._vectors(members, clips, drawn) if self.vectors else {"tokens": self.tokenize(captions)}
        return self._by_json(clips, keys, _owners(members, clips, "fbank")) | {"captions": captions} | frozen

    def _by_json(self, clips: list[dict], keys, segment_clip: Tensor) -> dict[str, Any]:
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

    def _with_pictures(self, samples: "_Samples") -> Batch:
        frames, segments = (self._pictures(kind, samples) for kind in ("frames", "fbank"))
        has_frames = _among(len(samples.clips), samples.described["frame_clip"])
        batch = Batch(frames=frames, segments=segments, has_frames=has_frames, **samples.described)
        batch = batch.padded(self.pad_tokens) if self.pad_tokens else batch
        return batch.pin() if self.device.type == "cuda" else batch

    def _read(self, k: int, piece: int) -> "_Samples":
        """This rank's samples of a piece of batch k; in the place of a damaged one, counted and listed, there is nothing."""
        size = self.order.batch_size // self.pieces
        places = self.order.batch(k, slice(piece * size + self.rank, (piece + 1) * size, self.world))
        clips = [_NOTHING] * len(places)
        members: list[dict[str, bytes] | None] = [None] * len(places)
        for source, folder in enumerate(self.folders):
            rows = {i: place for i, place in enumerate(places) if place and place.source == source}
            wanted = [(place.shard, place.entry) for place in rows.values()]
            found = folder.read(wanted, ("json", *self.needs))
            vectors = self.vectors[source].read(wanted, ("clip",)) if self.vectors else [{}] * len(wanted)
            for i, sample, vector in zip(rows, found, vectors, strict=True):
                self.reads += 1
                try:
                    clips[i], members[i] = self._intact(sample, vector)
                except ValueError as error:
                    known = isinstance(sample, Damaged)
                    self._damage(sample if known else folder.damaged(rows[i].shard, rows[i].entry, str(error)))
        return _Samples(places, clips, members, self._described(places, clips, members))

    def _intact(self, sample: dict[str, bytes] | Damaged, vectors: dict[str, bytes] | Damaged) -> tuple[dict, dict]:
        """(json, members by kind) of a sample; raises ValueError with the reason if it is damaged."""
        for part in (sample, vectors):
            if isinstance(part, Damaged):
                raise ValueError(part.reason)
        assert isinstance(sample, dict) and isinstance(vectors, dict)
        clip = parsed(sample.get("json", b""))
        for kind in self.needs:
            must_fit(clip, kind, sample.get(kind), self._tile(kind)[:2])
        if clip["n_rows"] > clip["n_segments"] * self.spectrogram.segment_rows:
            raise ValueError(f"json: n_rows is {clip['n_rows']}, n_segments {clip['n_segments']}")
        if self.vectors:
            rows, width = len(clip["captions"]) + clip["n_frames"], 2 * self.vectors[0].fingerprint["clip"]["dim"]
            if (size := len(vectors.get("clip", b""))) != rows * width:
                raise ValueError(f"clip: {size} bytes, not {rows} vectors of {width}")
            if not np.isfinite(np.frombuffer(vectors.get("clip", b""), "<f2")).all():
                raise ValueError("clip: vectors that are not finite")
        return spoken(clip, self.cfg.languages), sample | vectors

    def _damage(self, sample: Damaged) -> None:
        with self.counting:  # one thread reads, one decodes
            self.damaged += 1
        with self.damage_log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(vars(sample)) + "\n")
        if self.damaged > self.cfg.max_damage * max(self.reads, MIN_READS):
            raise UserError(
                f"{self.damaged} of {self.reads} samples read were damaged, more than data.max_damage={self.cfg.max_damage} "
                f"of at least {MIN_READS}; they are listed in {self.damage_log} (last: {sample.reason})"
            )

    def _pictures(self, kind: str, samples: "_Samples") -> Tensor:
        """Tiles (n, channels, size, width) uint8 of the strips that are there; _Undecodable if some are damaged."""
        strips = {i: members[kind] for i, members in enumerate(samples.members) if members and kind in members}
        size, width, channels = self._tile(kind)
        if not strips:
            return torch.zeros(0, channels, size, width, dtype=torch.uint8)
        if kind not in self.decoders:
            self.decoders[kind] = self._decoder(kind, len(samples.members))
        wanted = [(samples.clips[i][COUNTS[kind]] * size, width, channels) for i in strips]
        try:
            decoded = self.decoders[kind].run(list(strips.values()))
        except RuntimeError as error:
            del self.decoders[kind]  # which is of no more use
            raise self._undecodable(kind, strips) or error from None
        turned = {
            i: f"{kind} is {tuple(shape)} once decoded, by its json {due}"
            for i, shape, due in zip(strips, decoded.shape(), wanted, strict=True)
            if tuple(shape) != due
        }
        if turned:
            raise _Undecodable(turned)
        return self.decoders[kind].joined(decoded).view(-1, size, width, channels).permute(0, 3, 1, 2)

    def _undecodable(self, kind: str, strips: dict[int, bytes]) -> "_Undecodable | None":
        """Which of some strips cannot be decoded, each tried alone; none if that is not what is wrong."""
        reasons = {}
        for i, strip in strips.items():
            try:
                self._decoder(kind, 1).run([strip])
            except RuntimeError:
                reasons[i] = f"{kind} cannot be decoded"
        return _Undecodable(reasons) if reasons else None

    def _decoder(self, kind: str, most: int) -> Decoder:
        return Decoder(most, self._tile(kind)[2], self.cfg.decode_threads, self.device)

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


class _Samples(NamedTuple):
    """The samples of a batch as they were read: their json, their members by kind, and all of the Batch but pictures."""

    places: list[Place | None]
    clips: list[dict]
    members: list[dict[str, bytes] | None]
    described: dict[str, Any]


class _Undecodable(Exception):
    """Why pictures of samples of a batch cannot be decoded, by their number in it."""

    def __init__(self, reasons: dict[int, str]) -> None:
        self.reasons = reasons


_NOTHING: dict[str, Any] = {"id": "", "group": "", "captions": [], "audio_type": "both", "n_rows": 0}


def open_folders(sources: dict[str, float], key: str, cfg: DataSources = DEFAULT) -> list[ShardFolder]:
    """The shard folders of a setting, which must all have been made with the same settings."""
    if not sources:
        raise UserError(f"{key} names no shard folder")
    folders = [ShardFolder.open(url, cfg) for url in sources]
    for folder in folders:
        must_hold_clips(folder)
        check_fingerprint(folders[0].fingerprint, folder.fingerprint, folders[0].url, folder.url)
    return folders


def must_hold_clips(folder: ShardFolder) -> None:
    """UserError for a folder of vectors."""
    if not {"spectrogram", "frames"} <= folder.fingerprint.keys():
        raise UserError(
            f"{folder.url}: a folder of vectors (data_prep/embed.py), not of shards: name the folder above it"
        )


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
