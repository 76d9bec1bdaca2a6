"""Towers of several families from pre-training on two ranks to the vectors that the exported model gives in Python."""

import json

import pytest
import torch
import torch.nn.functional as F
from forks import ROOT
from running import NARROW, ranks, run, trace
from transformers_models import equal_to_theirs, made_tokenizer

from clip4vla import CLIP4VLA
from clip4vla.quick_imports import import_for_open_clip

TEXT = NARROW["text_cfg"] | {"layers": 1}
TIMM = {"image_size": 224, "timm_pool": "", "timm_proj": "linear"}
SIGLIP = TEXT | {"context_length": 32, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
FAMILIES = {  # (vision, text, preprocess_cfg, other settings)
    "siglip": (
        TIMM | {"timm_model_name": "test_vit"}, SIGLIP, {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"}, [],
    ),
    "resnet": ({"layers": [1, 1, 1, 1], "width": 16, "image_size": 96}, TEXT, {}, ["model.audio_tower=test_vit"]),
    "convnext": (
        TIMM | {"timm_model_name": "test_convnext"}, TEXT, {"mean": [0] * 3, "std": [1] * 3, "interpolation": "bilinear"},
        ["model.audio_tower=test_vit", "model.audio_span=clip"],
    ),
}  # fmt: skip


def _clip(name, folder):
    """What model.clip names: a configuration that is written here, or a folder of transformers with weights."""
    if name in FAMILIES:
        vision, text, pictures, _ = FAMILIES[name]
        config = {"embed_dim": 64, "vision_cfg": vision, "text_cfg": text, "preprocess_cfg": pictures}
        (folder / "clip.json").write_text(json.dumps(config))
        return f"{folder}/clip.json"
    config, kind, pictures = equal_to_theirs()[name.removeprefix("hf ")]
    for part in (import_for_open_clip("transformers").AutoModel.from_config(config), made_tokenizer(kind), pictures):
        part.save_pretrained(folder / "hf")
    return f"hf:{folder}/hf"


@pytest.mark.parametrize("name", [*FAMILIES, "hf siglip2"])
def test_from_training_to_vectors(tiny, sample_shards, tmp_path, name):
    vision, *_, words = FAMILIES.get(name, [{"image_size": 32}, ["model.audio_tower=test_vit", "model.max_tokens=9"]])
    words = [
        *tiny, f"model.clip={_clip(name, tmp_path)}", f"run_dir={tmp_path}/run", "train.max_steps=2", "model.max_tokens=24",
        f"data.test=[{sample_shards}/speech_fr/val]", "eval.audio_types=[both]", *words,
    ]  # fmt: skip
    done = ranks(2, "launch/pretrain.py", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(trace(tmp_path / "run")) == 2
    for line in (["launch/evaluate.py", *words], ["launch/export.py", tmp_path / "run", tmp_path / "model"]):
        done = run(*line)
        assert done.returncode == 0, done.stderr[-2000:]
    model, trained = (CLIP4VLA.from_pretrained(tmp_path / f) for f in ("model", "run/checkpoints/step-00000002"))
    assert model.pictures == trained.pictures and model.pictures.size == (vision["image_size"],) * 2
    picture = ROOT / "tests/sample/household/rubberduck.png"
    for call in ("encode_audio", "encode_video"):
        media = picture.with_suffix(".ogg") if call == "encode_audio" else picture
        assert torch.equal(getattr(model, call)(media), getattr(trained, call)(media))
    made = model.encode_text(["a rubber duck", "rain"])
    assert torch.equal(made, trained.encode_text(["a rubber duck", "rain"])) and made.isfinite().all()
    torch.testing.assert_close(F.normalize(made, dim=-1).norm(dim=-1), torch.ones(2))
