"""Sounds and pictures of the sample, and models that encode them."""

import torch
from forks import ROOT
from running import TINY

from clip4vla import CLIP4VLA
from clip4vla.config import ModelConfig, SpectrogramConfig

SAMPLE = ROOT / "tests/sample"
SOUNDS = sorted(map(str, SAMPLE.rglob("*.ogg")))
STILLS = sorted(map(str, SAMPLE.rglob("*.png")))


def make(seed=0, **settings) -> CLIP4VLA:
    torch.manual_seed(seed)
    cfg = ModelConfig(clip="ViT-B-32-quickgelu", head_layers=2, **settings)
    return CLIP4VLA(TINY, cfg, SpectrogramConfig()).eval()
