"""Make batches: sample order -> bytes -> DALI -> Batch.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from clip4vla.config import AugmentConfig, DataSources, MaskConfig, SpectrogramConfig
from clip4vla.data import precomputed_embeddings as embeddings
from clip4vla.data.batch import Batch, upload
from clip4vla.data.dali_decoder import Decoder
from clip4vla.data.sample_metadata import COUNTS, TYPES, check_fit, draw_captions, keep_languages, parse
from clip4vla.data.sampler import EvalSampler, SampleIndex, TrainSampler
from clip4vla.data.shards import CorruptSample, ShardFolder
from clip4vla.distributed import collectives
from clip4vla.errors import UserError
from clip4vla.io.remote import DEFAULT
from clip4vla.media import augmentation, masking
from clip4vla.media.images import Fit

AUGMENT, MIX = 2, 3  # end the keys of what is drawn for augmentation
MIN_READS = 1000  # over which, at least, the share of corrupt samples is taken


class Loader:
    """Makes this rank's batches from shard folders.

    needs: which pictures to read, of "frames" and "fbank". order: TrainSampler or EvalSampler over the same folders.
    vectors: folders of frozen vectors (precomputed_embeddings.py), one for each folder: captions and frames come as these.
    whole: this rank takes whole batches, not its part of them. pieces: micro-batches that a global batch is cut into, the
    same on any ranks. pad_tokens: if set, batches are Batch.padded to it. fit: size and interpolation that the vision tower
    wants, to which frames are resized if they are stored in another size; None: as they are.
    """

    def __init__(self, folders, order, cfg: DataSources, *, tokenize, mask: MaskConfig, seed: int, needs: Sequence[str],
                 device: torch.device, damage_log: Path, vectors: Sequence[ShardFolder] | None = None,
                 whole: bool = False, pieces: int = 1, pad_tokens: int = 0, augment: AugmentConfig | None = None,
                 fit: Fit | None = None):  # fmt: skip
        self.folders, self.order, self.cfg, self.tokenize, self.mask = folders, order, cfg, tokenize, mask
        self.seed, self.needs, self.device, self.damage_log = seed, needs, device, damage_log
        self.vectors, self.pieces, self.pad_tokens = vectors, pieces, pad_tokens
        self.augment = augment if augment and augmentation.is_on(augment) else None
        self.rank, self.world = (0, 1) if whole else (collectives.rank(), collectives.world_size())
        self.spectrogram = SpectrogramConfig(**folders[0].fingerprint["spectrogram"])
        size = folders[0].fingerprint["frames"]["size"]
        self.fit = fit if fit and fit.size != (size, size) else None
        self.reads = self.corrupt = 0
        self.counting = threading.Lock()
        self.decoders: dict[str, Decoder] = {}

    def for_folders(
        self, folders: list[ShardFolder], order: TrainSampler | EvalSampler, needs: Sequence[str]
    ) -> "Loader":
        """Make a loader of other folders that is like this one otherwise."""
        return Loader(
            folders, order, self.cfg, tokenize=self.tokenize, mask=self.mask, seed=self.seed, needs=needs,
            device=self.device, damage_log=self.damage_log, fit=self.fit,
        )  # fmt: skip

    def sample_numbers(self, k: int) -> list[int]:
        """List the place in the order of each row of this rank's part of batch k."""
        size = self.order.batch_size
        return list(range(k * size + self.rank, (k + 1) * size, self.world))

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """Yield, for each of global batches start..stop-1, this rank's part of its pieces."""
        batches = self.batches(start, stop)
        while micros := list(itertools.islice(batches, self.pieces)):
            yield micros

    def batches(self, start: int, stop: int) -> Generator[Batch, None, None]:
        """Yield this rank's part of the pieces of global batches start..stop-1, prepared ahead by two threads."""
        pending: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
        on_device = (torch.cuda.set_device, (self.device,)) if self.device.type == "cuda" else (None, ())
        reader = concurrent.futures.ThreadPoolExecutor(1, "read")
        decoder = concurrent.futures.ThreadPoolExecutor(1, "decode", *on_device)

        def complete(read: concurrent.futures.Future[_ReadBatch]) -> Batch:
            return self._complete(read.result())

        try:
            for k, piece in ((k, piece) for k in range(start, stop) for piece in range(self.pieces)):
                read = reader.submit(self.read, k, piece)
                pending.append(decoder.submit(complete, read))
                if len(pending) > self.cfg.prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            reader.shutdown(wait=True, cancel_futures=True)  # the decoder may be waiting for one of its results
            decoder.shutdown(wait=True, cancel_futures=True)

    def batch(self, k: int, piece: int = 0) -> Batch:
        """Make this rank's part of a piece of global batch k."""
        return self._complete(self.read(k, piece))

    def read(self, k: int, piece: int) -> "_ReadBatch":
        """Read this rank's samples of a piece of global batch k; corrupt ones are counted, listed and left missing.

        Sounds are mixed with those that have their places in the next batch: the same ones on any ranks.
        """
        size = self.order.batch_size // self.pieces
        rows = slice(piece * size + self.rank, (piece + 1) * size, self.world)
        batches = (k, k + 1) if self.augment and self.augment.mix else (k,)
        samples, *others = ([_Sample(index) for index in self.order.batch(n, rows)] for n in batches)
        every = [*samples, *itertools.chain(*others)]
        for source in range(len(self.folders)):
            self._read_source(source, [(s, s.index) for s in every if s.index and s.index.source == source])
        return _ReadBatch(samples, self._fields(samples), *others)

    def _read_source(self, source: int, rows: list[tuple["_Sample", SampleIndex]]) -> None:
        """Fill in the samples that lie in one folder, all of which are read together."""
        folder = self.folders[source]
        entries = [(index.shard, index.entry) for _, index in rows]
        samples = folder.read(entries, ("json", *self.needs))
        vectors = self.vectors[source].read(entries, ("clip",)) if self.vectors else [{} for _ in entries]
        for (sample, index), members, vector in zip(rows, samples, vectors, strict=True):
            self.reads += 1
            try:
                sample.clip, sample.members = self._intact(members, vector)
            except ValueError as error:
                if isinstance(members, CorruptSample):
                    self._damage(members)
                else:
                    self._damage(folder.corrupt(index.shard, index.entry, str(error)))

    def _complete(self, read: "_ReadBatch") -> Batch:
        """Decode the pictures of a batch. Samples that cannot be decoded are corrupt: the batch is made without them."""
        while True:
            try:
                return self._with_pictures(read)
            except _Undecodable as error:
                for i, reason in error.reasons.items():
                    self._discard(error.samples[i], reason)
            read = read._replace(fields=self._fields(read.samples))

    def _discard(self, sample: "_Sample", reason: str) -> None:
        """Count a sample as corrupt and make it a missing one."""
        assert sample.index
        folder = self.folders[sample.index.source]
        self._damage(folder.corrupt(sample.index.shard, sample.index.entry, reason))
        sample.clip, sample.members = _MISSING_CLIP, {}

    def _fields(self, samples: list["_Sample"]) -> dict[str, Any]:
        """Make all fields of a Batch but those that need its pictures."""
        clips, keys = [sample.clip for sample in samples], [sample.random_key(self.seed) for sample in samples]
        drawn = draw_captions(clips, keys, self.cfg.caption_sampling)
        captions = [c["captions"][j] if c["captions"] else "" for c, j in zip(clips, drawn, strict=True)]
        fields = self._clip_fields(clips, keys, _owners(samples, "fbank")) | {"captions": captions}
        if self.vectors:
            vectors, counts = (
                [sample.members.get("clip", b"") for sample in samples],
                [len(c["captions"]) for c in clips],
            )
            width = self.vectors[0].fingerprint["clip"]["dim"]
            fields["tokens"] = torch.zeros(len(samples), 0, dtype=torch.int64)
            if isinstance(self.order, EvalSampler):
                fields["caption_vectors"] = embeddings.every_caption(vectors, counts, width)
            return fields | embeddings.packed(vectors, counts, drawn, width)
        return fields | {"tokens": self.tokenize(captions), "frame_clip": _owners(samples, "frames")}

    def _clip_fields(self, clips: list[dict], keys, segment_clip: Tensor) -> dict[str, Any]:
        """Make the fields of a Batch that follow from the clips' json and from segment_clip (S,), masks included."""
        rows, hidden_rows, hidden_channels = self._masks(clips, keys, segment_clip)
        return {
            "ids": [c["id"] for c in clips],
            "segment_clip": segment_clip,
            "segment_rows": rows,
            "hidden_rows": hidden_rows,
            "hidden_channels": hidden_channels,
            "audio_type": torch.tensor([TYPES[c["audio_type"]] for c in clips]),
            "group": torch.tensor([stable_hash63(c["group"]) for c in clips]),
            "has_text": torch.tensor([bool(c["captions"]) for c in clips]),
            "has_audio": _among(len(clips), segment_clip),
            "meta": clips,
        }

    def _with_pictures(self, read: "_ReadBatch") -> Batch:
        """Decode frames and segments, and make the Batch; raises _Undecodable."""
        frames, segments = self._pictures("frames", read.samples), self._pictures("fbank", read.samples)
        segments, mixed = self._mixed(segments, read) if read.others else (segments, {})
        if self.augment and len(segments):
            segments = self._changed(segments, read)
        has_frames = _among(len(read.samples), read.fields["frame_clip"])
        batch = Batch(frames=frames, segments=segments, has_frames=has_frames, **read.fields, **mixed)
        batch = batch.padded(self.pad_tokens) if self.pad_tokens else batch
        return batch.pin() if self.device.type == "cuda" else batch

    def _mixed(self, segments: Tensor, read: "_ReadBatch") -> tuple[Tensor, dict[str, Any]]:
        """Mix decoded segments (S, C, 224, 224) with those of read.others; also whose they are, and the own's shares."""
        assert self.augment
        own, other = _sounds(segments, read.samples), _sounds(self._pictures("fbank", read.others), read.others)
        keys = [(*sample.random_key(self.seed), MIX) for sample in read.samples]
        shares = augmentation.draw_shares(keys, own, other, self.augment.mix)
        whose = {"others": [sample.clip for sample in read.others], "share": shares}
        return augmentation.mix(own, other, shares, self.spectrogram), whose

    def _changed(self, segments: Tensor, read: "_ReadBatch") -> Tensor:
        """Change decoded segments (S, C, 224, 224) as cfg.augment says."""
        assert self.augment
        owner, clips = read.fields["segment_clip"], [sample.clip for sample in read.samples]
        keys = [(*sample.random_key(self.seed), AUGMENT) for sample in read.samples]
        counts = owner.bincount(minlength=len(clips)).tolist()
        size = self.spectrogram.segment_rows, self.spectrogram.n_mels
        changes = augmentation.draw(keys, [clip["n_rows"] for clip in clips], counts, size, self.augment)
        owner, *parts = (upload(x, segments.device) for x in (owner, *changes))
        return augmentation.change(segments, owner, len(clips), augmentation.Changes(*parts))

    def _intact(
        self, sample: dict[str, bytes] | CorruptSample, vectors: dict[str, bytes] | CorruptSample
    ) -> tuple[dict, dict]:
        """Check a sample and return (json, members by kind); raises ValueError with the reason if it is corrupt."""
        for part in (sample, vectors):
            if isinstance(part, CorruptSample):
                raise ValueError(part.reason)
        assert isinstance(sample, dict) and isinstance(vectors, dict)
        clip = parse(sample.get("json", b""))
        for kind in self.needs:
            check_fit(clip, kind, sample.get(kind), self._tile(kind)[:2])
        if clip["n_rows"] > clip["n_segments"] * self.spectrogram.segment_rows:
            raise ValueError(f"json: n_rows is {clip['n_rows']}, n_segments {clip['n_segments']}")
        if self.vectors:
            made = self.vectors[0].fingerprint["clip"]
            clip = embeddings.described(clip, made)
            if reason := embeddings.damage(vectors.get("clip", b""), clip, made):
                raise ValueError(reason)
        return keep_languages(clip, self.cfg.languages), sample | vectors

    def _damage(self, sample: CorruptSample) -> None:
        with self.counting:  # one thread reads, one decodes
            self.corrupt += 1
        with self.damage_log.open("a", encoding="utf-8") as log:
            log.write(json.dumps(vars(sample)) + "\n")
        if self.corrupt > self.cfg.max_corrupt_fraction * max(self.reads, MIN_READS):
            raise UserError(
                f"{self.corrupt} of {self.reads} samples read were corrupt, more than "
                f"data.max_corrupt_fraction={self.cfg.max_corrupt_fraction} of at least {MIN_READS}; "
                f"they are listed in {self.damage_log} (last: {sample.reason})"
            )

    def _pictures(self, kind: str, samples: list["_Sample"]) -> Tensor:
        """Decode the strips that are there to tiles (n, channels, size, width) uint8; _Undecodable if some are corrupt."""
        strips = {i: sample.members[kind] for i, sample in enumerate(samples) if kind in sample.members}
        size, width, channels = self._tile(kind)
        wanted = self.fit.size if self.fit and kind == "frames" else (size, width)
        if not strips:
            return torch.zeros(0, channels, *wanted, dtype=torch.uint8)
        if kind not in self.decoders:
            self.decoders[kind] = self._decoder(kind, len(samples))
        stored = [(samples[i].clip[COUNTS[kind]] * size, width, channels) for i in strips]
        try:
            decoded, pictures = self.decoders[kind].run(list(strips.values()))
        except RuntimeError as error:
            del self.decoders[kind]  # which is of no more use
            reasons = self._undecodable(kind, strips)
            raise _Undecodable(samples, reasons) if reasons else error from None
        turned = {
            i: f"{kind} is {tuple(shape)} once decoded, by its json {due}"
            for i, shape, due in zip(strips, decoded.shape(), stored, strict=True)
            if tuple(shape) != due
        }
        if turned:
            raise _Undecodable(samples, turned)
        return self.decoders[kind].joined(pictures).view(-1, *wanted, channels).permute(0, 3, 1, 2)

    def _undecodable(self, kind: str, strips: dict[int, bytes]) -> dict[int, str]:
        """Find the strips that cannot be decoded, each tried alone; none if something else is wrong."""
        reasons: dict[int, str] = {}
        decoder = None
        for i, strip in strips.items():
            decoder = decoder or self._decoder(kind, 1)
            try:
                decoder.run([strip])
            except RuntimeError:
                reasons[i], decoder = f"{kind} cannot be decoded", None  # it is of no more use
        return reasons

    def _decoder(self, kind: str, most: int) -> Decoder:
        size, _, channels = self._tile(kind)
        fit = self.fit if kind == "frames" else None
        return Decoder(most, channels, self.cfg.decode_threads, self.device, size, fit)

    def _tile(self, kind: str) -> tuple[int, int, int]:
        """Return height, width and channels of a frame or segment as it is stored."""
        if kind == "frames":
            return (*[self.folders[0].fingerprint["frames"]["size"]] * 2, 3)
        return self.spectrogram.segment_rows, self.spectrogram.n_mels, 1 if self.spectrogram.channels == "mono" else 3

    def _masks(self, clips, keys, segment_clip: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (valid rows (S,), hidden rows (S, 224), hidden channels (S, 224)) of the packed segments."""
        size = self.spectrogram.segment_rows, self.spectrogram.n_mels
        valid, owner = np.array([clip["n_rows"] for clip in clips]), segment_clip.numpy()
        counts = np.bincount(owner, minlength=len(clips))
        before = np.arange(len(owner)) - (counts.cumsum() - counts)[owner]  # segments of the same clip
        rows = np.clip(valid[owner] - size[0] * before, 0, size[0])
        hidden_rows, hidden_channels = masking.draw(keys, valid.tolist(), counts.tolist(), size, self.mask)
        return torch.from_numpy(rows), torch.from_numpy(hidden_rows), torch.from_numpy(hidden_channels)


_MISSING_CLIP: dict[str, Any] = {"id": "", "group": "", "captions": [], "audio_type": "both", "n_rows": 0}


@dataclass
class _Sample:
    """Holds one row of a batch as it was read. A missing one, corrupt or beyond the end of the data, has no members."""

    index: SampleIndex | None  # None: beyond the end of the data
    clip: dict[str, Any] = field(default_factory=lambda: _MISSING_CLIP)  # its json
    members: dict[str, bytes] = field(default_factory=dict)  # by kind

    def random_key(self, seed: int) -> tuple[int, int, int]:
        """Make the seed of all that is drawn for this visit of the clip: run, clip and epoch."""
        return seed, zlib.crc32(self.clip["id"].encode()), self.index.epoch if self.index else 0


class _ReadBatch(NamedTuple):
    """Holds a batch whose pictures are still to be decoded: its samples, and the other fields of its Batch."""

    samples: list[_Sample]
    fields: dict[str, Any]
    others: list[_Sample] = []  # whose sounds its own are mixed with


class _Undecodable(Exception):
    """Says why pictures of samples cannot be decoded, by their number among them."""

    def __init__(self, samples: "list[_Sample]", reasons: dict[int, str]) -> None:
        self.samples, self.reasons = samples, reasons


def open_folders(sources: dict[str, float], key: str, cfg: DataSources = DEFAULT) -> list[ShardFolder]:
    """Open the shard folders of a setting, which must all have been made with the same settings."""
    if not sources:
        raise UserError(f"{key} names no shard folder")
    folders = [ShardFolder.open(url, cfg) for url in sources]
    for folder in folders:
        must_hold_clips(folder)
        check_fingerprint(folders[0].fingerprint, folder.fingerprint, folders[0].url, folder.url)
    return folders


def must_hold_clips(folder: ShardFolder) -> None:
    """Raise UserError for a folder of vectors."""
    if not {"spectrogram", "frames"} <= folder.fingerprint.keys():
        raise UserError(
            f"{folder.url}: a folder of vectors (data_prep/embed.py), not of shards: name the folder above it"
        )


def check_fingerprint(ours: dict, theirs: dict, our_name: str, their_name: str) -> None:
    """Raise UserError with both values if two fingerprints differ in a setting (library versions may differ)."""
    for section in ("spectrogram", "frames"):
        if section in ours and ours[section] != theirs[section]:
            differ = {k: (v, theirs[section].get(k)) for k, v in ours[section].items() if v != theirs[section].get(k)}
            words = ", ".join(f"{section}.{k} is {a!r} there and {b!r} here" for k, (a, b) in differ.items())
            raise UserError(
                f"fingerprints differ between {our_name} and {their_name}: {words}; make both with one config"
            )


def stable_hash63(text: str) -> int:
    """Hash a string to a 63-bit number, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _owners(samples: list[_Sample], kind: str) -> Tensor:
    """Number the clip that each tile of the strips belongs to, (n,)."""
    counts = [sample.clip[COUNTS[kind]] if kind in sample.members else 0 for sample in samples]
    return torch.repeat_interleave(torch.tensor(counts))


def _sounds(segments: Tensor, samples: list[_Sample]) -> augmentation.PackedSounds:
    rows = [sample.clip["n_rows"] if "fbank" in sample.members else 0 for sample in samples]
    counts = _owners(samples, "fbank").bincount(minlength=len(samples)).tolist()
    return augmentation.PackedSounds(segments, rows, counts)


def _among(count: int, numbers: Tensor) -> Tensor:
    """Mark which of 0..count-1 are among the numbers: bool (count,)."""
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, numbers, True)
