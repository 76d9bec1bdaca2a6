"""Benchmark `fusion`: scoring pairs of captions and clips with Local to Local, at ViT-B/32 size, as an evaluation does.

Ours against the plain way: a batch of pairs, each padded to 32 words, 12 frames and 6 segments, through every layer for
every place, as the paper's code does. Same weights, same pairs, alternated; `difference` is the largest one of their scores.
Captions have 5-32 words, clips 4-12 frames and 1-6 segments, uniformly. `seconds` is for all --captions and --clips, and
grows with the number of captions, which are scored in groups.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from clip4vla.cli import path_word
from clip4vla.config import ModelConfig
from clip4vla.evaluation.text_video import CAPTIONS
from clip4vla.models.fusion import AUDIO, TEXT, VISION, LocalToLocal, PaddedSequence
from clip4vla.towers.build import build_clip
from clip4vla.towers.config import resolve_clip_config
from launch.bench.common import count

ROOM = {TEXT: (5, 32), VISION: (4, 12), AUDIO: (1, 6)}  # fewest and most of a caption or clip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("--captions", type=count, default=32)
    parser.add_argument("--clips", type=count, default=1000)
    parser.add_argument("--compared", type=count, default=128, help="clips of which the plain way scores the captions")
    parser.add_argument("--rounds", type=count, default=3, help="rounds to take medians over")
    parser.add_argument(
        "--clip", type=path_word, default="ViT-B-32-quickgelu", help="open_clip's name, or its configuration as .json"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def main(args: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    torch.manual_seed(0)
    config = resolve_clip_config(args.clip)
    cfg = ModelConfig(head="local_local", head_layers=min(4, config["text_cfg"]["layers"]))
    dim = config["embed_dim"]
    head = LocalToLocal(build_clip(config).text, cfg, dim, ROOM[AUDIO][1]).eval().to(args.device)
    words, *parts = (
        random_parts(kind, args.captions if kind == TEXT else args.clips, dim, args.device) for kind in ROOM
    )
    few = [part.select(torch.arange(min(args.compared, args.clips))) for part in parts]
    sides = {"ours": lambda: score(head, words, few), "plain": lambda: plain(head, words, few)}
    scores = {name: side() for name, side in sides.items()}
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            rounds[name].append(seconds(side, args.device))
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    whole = seconds(lambda: score(head, words, parts), args.device)
    return {
        "time_ratio": medians["ours"] / medians["plain"],
        "difference": float((scores["ours"] - scores["plain"]).abs().max()),
        "seconds": whole,
        "pairs_per_s": args.captions * args.clips / whole,
        "minutes_for_1000_x_1000": 1e6 / (args.captions * args.clips) * whole / 60,
        "median": medians,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "settings": vars(args) | {"layers": cfg.head_layers, "width": dim},
    }


def score(head: LocalToLocal, words: PaddedSequence, parts: list[PaddedSequence]) -> Tensor:
    """Score as text_video.py does on one rank, (C, B): captions of like length in groups."""
    groups = words.row_lengths().argsort(stable=True).split(CAPTIONS)
    scores = torch.cat([head(words.select(group), parts) for group in groups])
    return scores[torch.cat(groups).argsort()]


def plain(head: LocalToLocal, words: PaddedSequence, parts: list[PaddedSequence]) -> Tensor:
    """Scores (C, B), a caption with all clips at a time."""
    absent = ~torch.cat([part.mask for part in parts], 1)
    rows = []
    for vectors, there in zip(words.vectors, words.mask, strict=True):
        one = PaddedSequence(TEXT, vectors.expand(len(absent), -1, -1), there.expand(len(absent), -1))
        x = torch.cat([part.vectors for part in head.encoder.embed([one, *parts])], 1)
        mask = torch.zeros(x.shape[:2], device=x.device).masked_fill_(torch.cat([~one.mask, absent], 1), -torch.inf)
        heads = x.shape[2] // 64
        mask = mask[:, None, None].expand(-1, heads, x.shape[1], -1).flatten(0, 1)
        for block in head.encoder.blocks:
            x = block(x, attn_mask=mask)
        rows.append(head.score(x[:, 0])[:, 0])
    return torch.stack(rows)


def random_parts(kind: int, rows: int, dim: int, device: str) -> PaddedSequence:
    """Words of captions, frames or segments of clips: vectors of noise, as many as ROOM says."""
    low, most = ROOM[kind]
    there = torch.arange(most) < torch.randint(low, most + 1, (rows, 1))
    return PaddedSequence(kind, torch.randn(rows, most, dim).to(device), there.to(device))


def seconds(call: Any, device: str) -> float:
    """That a call takes, a GPU's work included."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
