"""Benchmark `step`: clips/s of pre-training, ViT-B/32, clips of 2-10 s, ours against all three towers on padded batches.

ours  launch/pretrain.py's own step: frozen vectors cached, segments packed, bf16, DeepSpeed, the loader's time included
peer  what the paper's code does: text, vision and audio towers trained in fp32 on batches padded to 12 frames and
      10 segments, N x N matrices, torch's AdamW; its batches are at hand
Both start from the same weights with the same clips, so the first loss must be the same (loss_difference, relative).
On a GPU also mfu, FLOPs of unpadded work over the measured rate of bf16 products, and data_wait, the share of the time.
"""

import argparse
import copy
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from clip4vla.cli import path_word
from clip4vla.config import RunConfig
from clip4vla.config_io import load
from clip4vla.data.batch import Batch
from clip4vla.data.loader import open_folders
from clip4vla.distributed import collectives
from clip4vla.losses.objective import compute_losses
from clip4vla.media.masking import masked_view
from clip4vla.media.spectrogram import decode, normalise
from clip4vla.models.audio_encoder import type_token_weights
from clip4vla.models.model import Model
from clip4vla.models.towers_fingerprint import embeddings_fingerprint
from clip4vla.towers.build import build_clip
from clip4vla.towers.config import resolve_clip_config
from clip4vla.training import engine, flops, train_step
from clip4vla.training.run_setup import RunSetup, prepare, train_loader
from data_prep import embed_shards
from launch.bench.common import count
from launch.bench.data.loader import make_shards

FRAMES, SEGMENTS, TOKENS = 12, 10, 32  # what the paper's code pads to
CUDA = torch.cuda.is_available()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("--rounds", type=count, default=3, help="rounds to take medians over, after one to warm up")
    parser.add_argument("--steps", type=count, default=20 if CUDA else 1, help="of ours in a round")
    parser.add_argument("--batch", type=count, default=512 if CUDA else 4, help="clips of ours in a step")
    parser.add_argument("--peer-batch", type=count, default=32 if CUDA else 4, help="clips of the peer's in a step")
    parser.add_argument(
        "--clip", type=path_word, default="ViT-B-32", help="open_clip's name, or its configuration as .json"
    )
    parser.add_argument("--compile", default="off", help="torch.compile's backend for ours")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    with tempfile.TemporaryDirectory() as folder:
        cfg = configure(Path(folder), args.clip, max(32, args.batch), args.batch, args.compile)
        setup = prepare(cfg, None)
        peer_cfg = load(RunConfig, Path(folder, "run.yaml"), [f"train.batch_size={args.peer_batch}"])
        batch = (
            train_loader(peer_cfg, setup.folders, None, setup.device, setup.model.pictures).batch(0).to(setup.device)
        )
        peer = Peer(copy.deepcopy(setup.model).to(setup.device), peer_cfg, batch)
        return compare(Ours(cfg, setup), peer, batch, args)


def configure(folder: Path, clip: str, clips: int, batch: int, compiled: str = "off") -> RunConfig:
    """A run on `clips` clips in `folder`, with a CLIP of random weights and its frozen vectors, as users have them."""
    (folder / "shards").mkdir()
    make_shards(folder / "shards", clips)
    save_file(build_clip(resolve_clip_config(clip)).state_dict(), folder / "clip.safetensors")
    run = folder / "run.yaml"
    run.write_text(
        f"run_dir: {folder}/run\nmodel: {{clip: {folder}/clip.safetensors, temperature: 0.07}}\n"
        f"data: {{train: {folder}/shards, decode_threads: {os.cpu_count()}}}\ntrack: {{wandb: 'off'}}\n"
        f"train: {{batch_size: {batch}, precision: bf16, compile: '{compiled}', max_steps: 1000000, lr: 1.0e-6}}\n"
    )
    cfg, device = load(RunConfig, run), collectives.setup()
    (shards,) = open_folders(cfg.data.train, "data.train")
    model = embed_shards.frozen_towers(cfg, shards).to(device)
    with embed_shards.open_places([shards]) as places:
        embed_shards.embed(cfg, model, places, embeddings_fingerprint(model))
        embed_shards.finish(places[0], embeddings_fingerprint(model))
    return cfg


class Ours:
    """launch/pretrain.py's step."""

    def __init__(self, cfg: RunConfig, setup: RunSetup):
        Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
        self.cfg, self.device = cfg, setup.device
        self.engine = engine.start(setup.model, setup.ds, cfg.train)
        self.loader = train_loader(cfg, setup.folders, setup.vectors, setup.device, setup.model.pictures)
        self.batches = self.loader.steps(0, cfg.train.max_steps)
        self.work, self.useful = flops.FlopCounter(setup.model, cfg), 0.0  # FLOPs
        self.waited = 0.0  # s

    def loss(self, batch: Batch) -> float:
        """Return the loss of a batch whose frames are there, without a step."""
        with torch.no_grad():
            features = self.engine(batch, self.cfg.loss, self.cfg.mask)
        return float(compute_losses(features, batch.labels(), self.cfg.loss)["loss"])

    def run(self, steps: int) -> int:
        """Train for `steps` steps; return the number of clips."""
        clips = 0
        for _ in range(steps):
            start = time.perf_counter()
            micros = next(self.batches)
            self.waited += time.perf_counter() - start
            train_step.step(self.engine, micros, self.cfg)
            self.useful += self.work.flops(micros)
            clips += sum(map(len, micros))
        return clips


class Peer:
    """Three towers in fp32, all trained, on padded batches."""

    def __init__(self, model: Model, cfg: RunConfig, batch: Batch):
        self.model, self.cfg = model.float().requires_grad_(True), cfg
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.train.lr)
        self.frames, self.frame_present = _padded(batch.frames, batch.frame_clip, len(batch), FRAMES)
        self.segments, self.segment_present = _padded(batch.segments, batch.segment_clip, len(batch), SEGMENTS)
        packs = (batch.segment_rows, batch.hidden_rows, batch.hidden_channels)
        self.rows, *hidden = (_padded(x, batch.segment_clip, len(batch), SEGMENTS)[0].flatten(0, 1) for x in packs)
        self.hidden = hidden[0][:, :, None] | hidden[1][:, None, :]
        self.types = batch.audio_type.repeat_interleave(SEGMENTS)
        self.kept = batch.has_audio  # every clip has frames and a caption
        self.tokens = F.pad(batch.tokens, (0, TOKENS - batch.tokens.shape[1]))

    def run(self, steps: int) -> int:
        """Train for `steps` steps; return the number of clips."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
        return steps * len(self.tokens)

    def loss(self) -> Tensor:
        """NCE_at + NCE_av + NCE_aa."""
        text = F.normalize(self.model.encode_tokens(self.tokens)[0], dim=-1)
        vision = _pooled(self.model.encode_frames(self.frames.flatten(0, 1)), self.frame_present)
        decibels, how = decode(self.segments.flatten(0, 1), self.model.spectrogram), self.model.cfg.spectrogram_norm
        views = normalise(decibels, self.rows, how), masked_view(decibels, self.rows, self.hidden, self.cfg.mask, how)
        mix = type_token_weights("data", self.types)
        audio, masked = (  # in three channels, as the paper's code has them
            _pooled(self.model.encode_segments(view.expand(-1, 3, -1, -1), mix), self.segment_present) for view in views
        )
        scale, (text, vision, audio, masked) = (
            1 / self.model.cfg.temperature,
            (side[self.kept] for side in (text, vision, audio, masked)),
        )
        return _nce(text, audio, scale) + _nce(vision, audio, scale) + _nce(audio, masked, scale, intra=True)


def _padded(x: Tensor, clip: Tensor, clips: int, most: int) -> tuple[Tensor, Tensor]:
    """(clips, most, ...) of a pack, zeros after each clip's, and which are there, (clips, most)."""
    out, there = x.new_zeros(clips, most, *x.shape[1:]), torch.zeros(clips, most, device=x.device)
    for i in range(clips):
        mine = x[clip == i]
        out[i, : len(mine)], there[i, : len(mine)] = mine, 1
    return out, there


def _pooled(vectors: Tensor, there: Tensor) -> Tensor:
    """Mean of the unit vectors that are there, to unit length."""
    unit = F.normalize(vectors, dim=-1).view(*there.shape, -1)
    return F.normalize((unit * there[:, :, None]).sum(1), dim=-1)


def _nce(a: Tensor, b: Tensor, scale: float, intra: bool = False) -> Tensor:
    """Symmetric InfoNCE with the matrices in memory; intra: (3) and (4)."""
    labels, own = torch.arange(len(a), device=a.device), torch.eye(len(a), dtype=torch.bool, device=a.device)
    logits = [scale * a @ b.T, scale * b @ a.T]
    if intra:
        same = [(scale * x @ x.T).masked_fill(own, -torch.inf) for x in (a, b)]
        logits = [torch.cat(pair, 1) for pair in zip(logits, same, strict=True)]
    return torch.stack([F.cross_entropy(x, labels) for x in logits]).mean()


def compare(ours: Ours, peer: Peer, batch: Batch, args: argparse.Namespace) -> dict[str, Any]:
    """Both in turn, after one round to warm up."""
    losses = ours.loss(batch), float(peer.loss().detach())
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for turn in range(args.rounds + 1):
        ours.useful = ours.waited = 0.0
        seconds = {}
        for name, side, steps in (("ours", ours, args.steps), ("peer", peer, 1)):
            start = time.perf_counter()
            clips = side.run(steps)
            _synchronise()
            seconds[name] = time.perf_counter() - start
            if turn:
                rates[name].append(clips / seconds[name])
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "throughput_ratio": medians["ours"] / medians["peer"],
        "loss_difference": abs(losses[0] - losses[1]) / losses[1],
        "clips_per_s": medians,
        "rounds": rates,
        "losses": {"ours": losses[0], "peer": losses[1]},
        "data_wait": ours.waited / seconds["ours"],
        "tflops": ours.useful / seconds["ours"] / 1e12,
        **_utilisation(ours.useful / seconds["ours"], ours.device),
        "settings": vars(args),
    }


def _utilisation(rate: float, device: torch.device) -> dict[str, float]:
    """MFU on a GPU; the last round's."""
    if device.type != "cuda":
        return {}
    peak = flops.matrix_rate(device)
    return {
        "mfu": rate / peak,
        "peak_tflops": peak / 1e12,
        "memory_gib": torch.cuda.max_memory_allocated() / engine.GIB,
    }


def _synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()
