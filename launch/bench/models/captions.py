"""Benchmark `captions`: writing captions at ViT-B/32 size, frames and segments encoded by their towers already.

Ours (media once, keys and values kept, so a word costs one step) against the plain way: for each word all words so far and all
media again, for every beam, as the paper's code does. Same weights, same clips, same search, alternated; `same` is whether
both wrote the same captions, `difference` the largest one of their log-probabilities. All captions have --words tokens. Clips
have 4-12 frames and 1-6 segments, uniformly; weights are random.
"""

import argparse
import statistics
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from clip4vla.cli import path_word
from clip4vla.config import DecodeConfig, ModelConfig
from clip4vla.models import generation
from clip4vla.models.captioner import CaptionDecoder, Captioner
from clip4vla.models.fusion import AUDIO, TEXT, VISION, PaddedSequence
from clip4vla.towers.build import build_clip
from clip4vla.towers.config import resolve_clip_config
from clip4vla.towers.text import encode_text
from launch.bench.common import count
from launch.bench.models.fusion import ROOM, random_parts, seconds

WAYS: tuple[Literal["greedy", "beam"], ...] = ("greedy", "beam")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("--clips", type=count, default=16)
    parser.add_argument("--words", type=count, default=20, help="tokens of every caption")
    parser.add_argument("--beams", type=count, default=5)
    parser.add_argument("--rounds", type=count, default=3, help="rounds to take medians over")
    parser.add_argument(
        "--clip", type=path_word, default="ViT-B-32-quickgelu", help="open_clip's name, or its configuration as .json"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


class NoCacheDecoder:
    """Decode as captioner.CaptionDecoder does, but from scratch for every word."""

    def __init__(self, text: Any, head: Captioner, parts: list[PaddedSequence], copies: int):
        self.text, self.head = text, head
        self.parts = [
            replace_rows(part, torch.arange(len(part.mask), device=part.mask.device).repeat_interleave(copies))
            for part in parts
        ]
        self.mask = torch.cat([part.mask for part in self.parts], 1)
        self.words = torch.zeros(len(self.mask), 0, dtype=torch.int64, device=self.mask.device)

    def step(self, token: Tensor) -> Tensor:
        """Scores (R, V) of what may follow."""
        self.words = torch.cat([self.words, token[:, None]], 1)
        _, read = encode_text(self.text, self.words)
        assert read is not None
        there = torch.ones_like(self.words, dtype=torch.bool)
        last = (torch.arange(there.shape[1]) == there.shape[1] - 1).expand(there.shape)  # on the CPU
        return self.head(PaddedSequence(TEXT, read, there), self.parts, last, self.text.token_embedding.weight)

    def reorder_cache(self, rows: Tensor) -> None:
        """The captions go on as these."""
        self.words = self.words[rows]


def replace_rows(part: PaddedSequence, rows: Tensor) -> PaddedSequence:
    """A Sequence of these rows, some of them several times."""
    return part._replace(vectors=part.vectors[rows], mask=part.mask[rows])


@torch.no_grad()
def main(args: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    torch.manual_seed(0)
    config = resolve_clip_config(args.clip)
    layers = min(4, config["text_cfg"]["layers"])
    cfg = ModelConfig(head="captioner", head_layers=layers, max_tokens=max(32, args.words + 1))
    text = build_clip(config).text.eval().to(args.device)
    head = Captioner(text, cfg, config["embed_dim"], ROOM[AUDIO][1]).eval().to(args.device)
    parts = [random_parts(kind, args.clips, config["embed_dim"], args.device) for kind in (VISION, AUDIO)]
    tokens, ids = generation.special_tokens(args.clip)[0], [str(i) for i in range(args.clips)]
    base = DecodeConfig(num_beams=args.beams, min_new_tokens=args.words - 1, max_new_tokens=args.words)
    figures: dict[str, Any] = {}
    for way in WAYS:
        decode = replace(base, method=way)

        def write(side: type, decode: DecodeConfig = decode) -> generation.GeneratedCaptions:
            return generation.generate(lambda copies: side(text, head, parts, copies), ids, decode, tokens, 0)

        ours, plain = write(CaptionDecoder), write(NoCacheDecoder)
        rounds: dict[str, list[float]] = {"ours": [], "plain": []}
        for _ in range(args.rounds):
            for name, side in (("ours", CaptionDecoder), ("plain", NoCacheDecoder)):
                rounds[name].append(seconds(lambda side=side, write=write: write(side), args.device))
        medians = {name: statistics.median(values) for name, values in rounds.items()}
        figures[way] = {
            "time_ratio": medians["ours"] / medians["plain"],
            "captions_per_s": args.clips / medians["ours"],
            "same": bool((ours.tokens == plain.tokens).all()),
            "difference": float((ours.score - plain.score).abs().max()),
            "median": medians,
            "rounds": rounds,
        }
    ratios = {f"time_ratio_{way}": figures[way]["time_ratio"] for way in WAYS}
    return ratios | figures | {"threads": torch.get_num_threads(), "settings": vars(args) | {"layers": layers}}
