"""Count what towers take: parameters, FLOPs of a caption, a frame and a segment, FLOPs and activations of a clip in training.

A clip has a caption of 32 tokens (of as many as the tower was trained with, if it reads what follows a caption), 6 frames and 3
segments of sound. FLOPs and activations are those of --dry-run, in bf16, by training/flops.py and training/memory.py, on torch's
meta device: nothing is run. ears: the audio tower alone trains, and text and vision are precomputed; all: all three train.
"""

import argparse
import dataclasses
from typing import Any

import torch

from clip4vla.config import RunConfig, SpectrogramConfig
from clip4vla.config_io import load
from clip4vla.data.batch import Batch
from clip4vla.errors import UserError
from clip4vla.models.model import Model
from clip4vla.towers.config import resolve_clip_config
from clip4vla.towers.tokenizer import reads_padding
from clip4vla.training import flops, memory
from clip4vla.training.run_setup import RunSetup

CLIPS = [
    "ViT-B-32", "ViT-L-14", "coca_ViT-B-32", "ViT-L-14-CLIPA", "ViT-B-16-SigLIP2", "ViT-SO400M-14-SigLIP", "EVA02-B-16",
    "PE-Core-B-16", "convnext_base_w", "MobileCLIP2-S2", "RN50",
]  # fmt: skip
OTHER = "vit_small_patch16_224"  # ears of a CLIP whose vision tower has no patches of which sound could be
TOKENS, FRAMES, SEGMENTS = 32, 6, 3
BF16 = {"bf16": {"enabled": True}, "fp16": {"enabled": False}}
HEAD = [
    "`model.clip`", "`model.audio_tower`", "text, M", "vision, M", "audio, M", "caption, GFLOPs", "frame, GFLOPs",
    "segment, GFLOPs", "clip, ears, GFLOPs", "clip, ears, MiB", "clip, all, GFLOPs", "clip, all, MiB",
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("clips", nargs="*", default=CLIPS, metavar="CLIP", help="as model.clip")
    parser.add_argument("--markdown", action="store_true", help="print a table")


def main(args: argparse.Namespace) -> dict[str, Any] | str:
    """The figures of each CLIP, or a table of them."""
    rows = {clip: figures(clip) for clip in args.clips}
    return markdown(rows) if args.markdown else {"clips": rows}


def figures(clip: str) -> dict[str, Any]:
    """Count what the towers of a CLIP, and its ears, take."""
    cfg, model = build(clip)
    model.requires_grad_(False)
    micro, work = one_clip(model), flops.FlopCounter(model, cfg)
    row: dict[str, Any] = {"audio_tower": cfg.model.audio_tower}
    row |= {f"{name}_parameters": flops.elements(getattr(model, name)) for name in ("text", "vision", "audio")}
    row |= {"caption_flops": work.caption_flops(micro.tokens), "frame_flops": work.per_frame}
    row["segment_flops"] = work.sound_flops(micro) / SEGMENTS / len(work.type_tokens)
    for name, trained in (("ears", "audio"), ("all", "text+vision+audio")):
        model.cfg.trainable_towers = trained
        model.freeze()
        if name == "ears":
            step = dataclasses.replace(micro, text_vectors=torch.empty(1, device="meta"))
        else:
            step = micro
        setup = RunSetup(torch.device("cpu"), [], BF16, None, model, "", [] if name == "all" else [None])  # type: ignore[list-item]
        row[f"{name}_flops"] = flops.FlopCounter(model, cfg).flops([step])
        row[f"{name}_activations"] = sum(part.kept for part in memory.passes_of(cfg, setup, step))
    return row


def build(clip: str) -> tuple[RunConfig, Model]:
    """Build a CLIP and its ears on torch's meta device: its vision tower's copy, or OTHER."""
    config = resolve_clip_config(clip)
    for ears in ("vision", OTHER):
        cfg = load(RunConfig, None, [f"model.clip={clip}", f"model.audio_tower={ears}"])
        try:
            with torch.device("meta"):
                return cfg, Model(config, cfg.model, SpectrogramConfig()).train()
        except UserError as error:
            if ears == OTHER or not str(error).startswith("model.audio_tower=vision"):
                raise
    raise AssertionError


def one_clip(model: Model) -> Batch:
    """Make a clip of meta pictures and of real numbers."""
    text, padded = model.text, reads_padding(model.clip_config.get("text_cfg", {}))
    tokens = torch.arange(3, 3 + (text.context_length if padded else min(TOKENS, text.context_length)))
    tokens[-1] = text.eos_id if getattr(text, "pool_type", "") == "eos" else text.vocab_size - 1
    sound = torch.zeros(SEGMENTS, 224, dtype=torch.bool)
    there = torch.ones(1, dtype=torch.bool)
    return Batch(
        ids=[""], captions=[""], tokens=tokens[None], frames=torch.empty(FRAMES, 3, *model.pictures.size, device="meta"),
        frame_clip=torch.zeros(FRAMES, dtype=torch.int64), segments=torch.empty(SEGMENTS, 1, 224, 224, device="meta"),
        segment_clip=torch.zeros(SEGMENTS, dtype=torch.int64), segment_rows=torch.full((SEGMENTS,), 224), hidden_rows=sound,
        hidden_channels=sound, audio_type=torch.zeros(1, dtype=torch.int64), group=torch.zeros(1, dtype=torch.int64),
        has_text=there, has_frames=there, has_audio=there, meta=[{}],
    )  # fmt: skip


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Make a table of the figures."""
    units = {"parameters": 1e6, "flops": 1e9, "activations": 2**20}
    lines = [HEAD, ["---"] * len(HEAD)]
    for clip, row in rows.items():
        numbers = [f"{value / units[key.rpartition('_')[2]]:.3g}" for key, value in row.items() if key != "audio_tower"]
        lines.append([clip, row["audio_tower"], *numbers])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
