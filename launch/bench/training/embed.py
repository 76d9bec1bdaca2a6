"""Benchmark `embed`: clips/s of frozen towers over captions and frames, ours against open_clip on webdataset and Pillow.

ours  data_prep/embed.py's own loop, the tars of its vectors written
peer  what people write: webdataset and Pillow in a DataLoader of two workers, model.encode_image and encode_text on its
      batches, vectors copied back to the CPU
Same weights (random), precision and clips; `agreement` is the least cosine of the same clip's vectors. On a GPU also mfu of
ours: FLOPs of the vision tower over the measured rate of bf16 products.
"""

import argparse
import contextlib
import shutil
import statistics
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from clip4vla.cli import path_word
from clip4vla.config import RunConfig
from clip4vla.config_io import load
from clip4vla.data.loader import open_folders
from clip4vla.data.precomputed_embeddings import FOLDER
from clip4vla.data.shards import ShardFolder
from clip4vla.distributed import collectives
from clip4vla.models.model import Model
from clip4vla.models.towers_fingerprint import embeddings_fingerprint
from clip4vla.towers.build import build_clip
from clip4vla.towers.config import resolve_clip_config
from clip4vla.training import flops
from data_prep import embed_shards
from launch.bench.common import count
from launch.bench.data.loader import Stream, make_shards, peer

CUDA = torch.cuda.is_available()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("--rounds", type=count, default=3, help="rounds to take medians over, after one to warm up")
    parser.add_argument("--clips", type=count, default=2048 if CUDA else 64, help="clips of a round")
    parser.add_argument(
        "--clip", type=path_word, default="ViT-B-32", help="open_clip's name, or its configuration as .json"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = configure(Path(folder), args.clip, args.clips)
        (shards,) = open_folders(cfg.data.train, "data.train")
        model = embed_shards.frozen_towers(cfg, shards).to(collectives.setup())
        return compare(cfg, model, shards, args)


def configure(folder: Path, clip: str, clips: int) -> RunConfig:
    """Write shards of real pictures and random weights; the settings of embed.py for them."""
    (folder / "shards").mkdir()
    make_shards(folder / "shards", clips)
    save_file(build_clip(resolve_clip_config(clip)).state_dict(), folder / "clip.safetensors")
    words = [f"model.clip={folder}/clip.safetensors", f"data.train={folder}/shards", f"run_dir={folder}/run"]
    return load(RunConfig, None, words)


def compare(cfg: RunConfig, model: Model, shards: ShardFolder, args: argparse.Namespace) -> dict[str, Any]:
    """Both in turn, after one round to warm up."""
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(args.rounds + 1):
        seconds = {"ours": ours(cfg, model, shards)}
        seconds["peer"], vectors = theirs(model, shards, args.clips)
        for name, spent in seconds.items():
            if turn:
                rates[name].append(args.clips / spent)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    embedded = _frame_vectors(shards, model.clip_config["embed_dim"])
    cosines = [float(F.cosine_similarity(embedded[name], vectors[name]).min()) for name in vectors]
    ratio = {"throughput_ratio": medians["ours"] / medians["peer"], "agreement": min(cosines)}
    n_frames = sum(len(rows) for rows in embedded.values()) / args.clips
    sizes = {"frames_per_clip": n_frames, "settings": vars(args)}
    return (
        ratio | {"clips_per_s": medians, "rounds": rates} | sizes | _utilisation(model, cfg, medians["ours"] * n_frames)
    )


def ours(cfg: RunConfig, model: Model, shards: ShardFolder) -> float:
    """Seconds that embed.py's loop takes for all clips."""
    shutil.rmtree(Path(shards.path, FOLDER))  # what make_shards or the last round wrote
    start = time.perf_counter()
    with embed_shards.open_places([shards]) as places:
        embed_shards.embed(cfg, model, places, embeddings_fingerprint(model))
    return time.perf_counter() - start


@torch.no_grad()
def theirs(model: Model, shards: ShardFolder, clips: int) -> tuple[float, dict[str, Tensor]]:
    """(Seconds that the peer takes for as many clips, frame vectors (F, D) by clip)."""
    device = next(model.parameters()).device
    vectors: dict[str, Tensor] = {}
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (model.pictures.mean, model.pictures.std))
    start, done = time.perf_counter(), 0
    stream: Stream = peer(shards.path, embed_shards.CLIPS)
    with contextlib.closing(stream):
        for batch in stream:
            pictures = (batch["frames"].to(device).float() / 255 - mean) / std
            frames = F.normalize(model.vision(pictures), dim=-1).cpu()
            tokens = F.pad(batch["tokens"], (0, model.text.context_length - batch["tokens"].shape[1]))  # as open_clip's
            F.normalize(model.text(tokens.to(device)), dim=-1).cpu()
            vectors |= {name: frames[batch["frame_clip"] == i] for i, name in enumerate(batch["ids"])}
            done += len(batch["ids"])
            if done >= clips:
                return (time.perf_counter() - start) * clips / done, vectors
    raise AssertionError("the peer's stream has no end")


def _frame_vectors(shards: ShardFolder, width: int) -> dict[str, Tensor]:
    """Read the frame vectors (F, width) of every clip that ours wrote; each has one caption, whose vector comes first."""
    vectors = {}
    for path in Path(shards.path, FOLDER).glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file
                rows = torch.from_numpy(np.frombuffer(file.read(), "<f2").astype(np.float32))
                number = int(member.name.partition(".")[0])
                vectors[f"clip{number}"] = rows.view(-1, width)[1:]
    return vectors


def _utilisation(model: Model, cfg: RunConfig, frames_per_s: float) -> dict[str, float]:
    """MFU of the vision tower on a GPU."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        return {}
    peak = flops.matrix_rate(device)
    return {"mfu": frames_per_s * flops.FlopCounter(model, cfg).per_frame / peak, "peak_tflops": peak / 1e12}
