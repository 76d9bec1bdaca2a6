"""What steps cost on towers of every family, against torch's own counter."""

import hf_models
import pytest
from made_batch import batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip4vla.config import RunConfig, SpectrogramConfig
from clip4vla.config_io import load
from clip4vla.models.model import Model
from clip4vla.towers.config import resolve_clip_config
from clip4vla.training import flops

TEXT = {"layers": 6, "width": 64, "heads": 2, "vocab_size": 49408}
FAMILIES = {  # its text tower; ears of another name where its vision tower is no plain ViT
    "ViT-B-32": (TEXT, "vision"),
    "ViT-B-16-SigLIP": (TEXT, "vision"),
    "EVA02-B-16": (TEXT, "vision"),
    "PE-Core-T-16-384": (TEXT, "vision"),
    "coca_ViT-B-32": (TEXT, "vision"),
    "convnext_tiny": (TEXT, "vit_tiny_patch16_224"),
    "MobileCLIP2-S0": (TEXT, "vit_tiny_patch16_224"),
    "RN50": (TEXT, "vit_tiny_patch16_224"),
    "xlm-roberta-base-ViT-B-32": ({}, "vision"),
    "mt5-base-ViT-B-32": ({}, "vision"),
}


@pytest.fixture
def hub(monkeypatch):
    """Small models of transformers, and timm's with two blocks, or two of each stage."""
    hf_models.published(monkeypatch, blocks=2)["small"] = True


def counted(model, cfg, whole):
    """FLOPs of the towers, by torch's counter."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features = model(whole, cfg.loss, cfg.mask)
        sum(features[name].sum() for name in ("text", "vision", "audio")).backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trained", ["audio", "text+vision+audio"])
@pytest.mark.parametrize("name", FAMILIES)
def test_flops_of_a_family(hub, name, trained):
    text, ears = FAMILIES[name]
    config = resolve_clip_config(name)
    if not config["vision_cfg"].get("timm_model_name"):
        config["vision_cfg"]["layers"] = [1] * 4 if isinstance(config["vision_cfg"]["layers"], list) else 2
    config["text_cfg"] |= text
    words = [f"model.clip={name}", f"model.audio_tower={ears}", f"model.trainable_towers={trained}", "loss.aa=0"]
    cfg = load(RunConfig, None, [*words, "model.max_tokens=32"])
    model = Model(config, cfg.model, SpectrogramConfig())
    model.freeze()
    model.train()
    whole = batch(clips=2, segments=2, frames=2, length=config["text_cfg"].get("context_length", 77))
    whole.tokens %= text.get("vocab_size", 600)
    whole.frames = whole.frames.new_zeros(2, 3, *model.pictures.size)
    work = flops.FlopCounter(model, cfg)
    assert work.flops([whole]) - work._similarity_flops(2) == pytest.approx(counted(model, cfg, whole), rel=0.02)
