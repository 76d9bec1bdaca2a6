"""What steps cost on towers of every family, against torch's own counter."""

import argparse
import json

import hf_models
import pytest
import torch
import transformers
import transformers_models
from forks import ROOT
from made_batch import batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clip4vla.config import RunConfig, SpectrogramConfig
from clip4vla.config_io import load
from clip4vla.models import tower_costs
from clip4vla.models.model import Model
from clip4vla.towers.config import resolve_clip_config
from clip4vla.training import flops
from launch.bench.models import towers

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


def counted_within_2_percent(config, words, tokens):
    """A step of two clips, whose captions are as long."""
    cfg = load(RunConfig, None, [*words, "loss.aa=0"])
    model = Model(config, cfg.model, SpectrogramConfig())
    model.freeze()
    model.train()
    whole = batch(clips=2, segments=2, frames=2, length=tokens)
    whole.tokens = whole.tokens.clamp(3, model.text.vocab_size - 1)
    whole.frames = whole.frames.new_zeros(2, 3, *model.pictures.size)
    work = flops.FlopCounter(model, cfg)
    assert work.flops([whole]) - work._similarity_flops(2) == pytest.approx(counted(model, cfg, whole), rel=0.02)


ALL, WITHOUT_VISION = "model.trainable_towers=text+vision+audio", "model.trainable_towers=text+audio"
GROUPS = ("convnext_tiny", "MobileCLIP2-S0")


@pytest.mark.parametrize("name, trained", [(name, WITHOUT_VISION if name in GROUPS else ALL) for name in FAMILIES])
def test_flops_of_a_family(hub, name, trained):
    """Where all towers train; but for vision towers of grouped convolutions, whose gradients torch miscounts."""
    text, ears = FAMILIES[name]
    config = resolve_clip_config(name)
    if not config["vision_cfg"].get("timm_model_name"):
        config["vision_cfg"]["layers"] = [1] * 4 if isinstance(config["vision_cfg"]["layers"], list) else 2
    config["text_cfg"] |= text
    words = [f"model.clip={name}", f"model.audio_tower={ears}", trained]
    counted_within_2_percent(config, words, config["text_cfg"].get("context_length", 77))


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2", "align"])
def test_flops_of_towers_of_transformers(name, tmp_path):
    config, kind, pictures = transformers_models.equal_to_theirs()[name]
    for part in (transformers.AutoModel.from_config(config), transformers_models.made_tokenizer(kind), pictures):
        part.save_pretrained(tmp_path)
    clip = f"hf:{tmp_path}"
    cfg = load(RunConfig, None, [f"model.clip={clip}", "model.audio_tower=vit_tiny_patch16_224", ALL])
    model = Model(resolve_clip_config(clip), cfg.model, SpectrogramConfig())
    model.freeze()
    model.vision.requires_grad_(name != "align")  # whose convolutions have groups
    work, tokens = flops.FlopCounter(model, cfg), torch.randint(3, 30, (2, 7))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as of_text:
        model.encode_tokens(tokens)[0].sum().backward()
    assert work.caption_flops(tokens) == pytest.approx(of_text.get_total_flops(), rel=0.02)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as of_frames:
        vectors = model.encode_frames(torch.zeros(3, 3, *model.pictures.size))
        if vectors.requires_grad:
            vectors.sum().backward()
    assert 3 * work.per_frame == pytest.approx(of_frames.get_total_flops(), rel=0.02)
    most = [tower_costs.picture_memory(model, count, torch.bfloat16, False).forward for count in (2, 4)]
    assert 0 < 2 * most[0] == pytest.approx(most[1], rel=0.02)
    assert tower_costs.text_memory(model, 2, 7, torch.bfloat16, False).kept > 0


def test_a_space_of_vectors_has_the_costs_of_its_audio_tower_alone():
    """Its text and vision are vectors."""
    cfg = load(RunConfig, None, ["model.clip=vectors:own", "model.audio_tower=vit_tiny_patch16_224", "loss.aa=0"])
    model = Model({"embed_dim": 8, "space": {"name": "own"}}, cfg.model, SpectrogramConfig())
    model.freeze()
    step = batch(clips=2, segments=2)
    step.text_vectors, step.frame_vectors = torch.zeros(2, 8), torch.zeros(9, 8)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(step, cfg.loss, cfg.mask)["audio"].sum().backward()
    work = flops.FlopCounter(model, cfg)
    assert work.flops([step]) - work._similarity_flops(2) == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("name, ears", [("tiny.json", "vision"), ("convnext.json", "vit_small_patch16_224")])
def test_bench_towers(name, ears, hub, tmp_path):
    """A clip's step is three times its parts, but for patches, in two views; the table in docs is that of the saved figures."""
    config = json.loads((ROOT / "configs/clip/tiny.json").read_text())
    if name == "convnext.json":
        config["vision_cfg"] = resolve_clip_config("convnext_tiny")["vision_cfg"]
    (tmp_path / name).write_text(json.dumps(config))
    clip = str(tmp_path / name)
    row = towers.main(argparse.Namespace(clips=[clip], markdown=False))["clips"][clip]
    assert row["audio_tower"] == ears
    parts = row["caption_flops"] + towers.FRAMES * row["frame_flops"] + 2 * towers.SEGMENTS * row["segment_flops"]
    assert row["all_flops"] == pytest.approx(3 * parts, rel=0.3 if ears == "vision" else 0.05)
    assert 0 < row["ears_activations"] < row["all_activations"]
    assert towers.main(argparse.Namespace(clips=[clip], markdown=True)).count("\n") == 2
    saved = json.loads((ROOT / "docs/bench_towers.json").read_text())["clips"]
    assert towers.markdown(saved) in (ROOT / "docs/towers.md").read_text()
