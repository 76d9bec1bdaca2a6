"""ONNX files of towers and heads, run by onnxruntime, against torch, in shapes that the export did not try; onnx.json."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from running import TINY

from clip4vla.config import ModelConfig, SpectrogramConfig
from clip4vla.errors import UserError
from clip4vla.export import onnx_export
from clip4vla.models import fusion
from clip4vla.models.audio_encoder import type_token_weights
from clip4vla.models.fusion import PaddedSequence
from clip4vla.models.model import Model

SMALLEST = {key: value | {"layers": 1} if key.endswith("cfg") else value for key, value in TINY.items()}
D = TINY["embed_dim"]


def tiny_model(quick_gelu=True, channels="mono", clip=(), **settings) -> Model:
    torch.manual_seed(0)
    cfg = ModelConfig(**{"clip": "tiny.json", "head_layers": 1} | settings)
    return Model(SMALLEST | {"quick_gelu": quick_gelu, **dict(clip)}, cfg, SpectrogramConfig(channels=channels)).eval()


def same(got, want) -> None:
    want = want.detach().numpy()
    assert got.shape == want.shape and np.abs(got - want).max() / np.abs(want).max() < 1e-5


@torch.no_grad()
def test_towers_give_torchs_vectors_in_all_shapes(tmp_path):
    fitted = {"interpolation": "bilinear", "resize_mode": "squash", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.1]}
    model = tiny_model(channels="lmr", clip={"preprocess_cfg": fitted})
    onnx_export.export_model(model, tmp_path)
    manual = json.loads((tmp_path / "onnx.json").read_text())
    opened = {name: onnxruntime.InferenceSession(tmp_path / name) for name in manual["files"]}
    assert set(opened) == {"audio.onnx", "text.onnx", "vision.onnx"}
    for name, session in opened.items():
        assert manual["files"][name]["inputs"] == {x.name: x.shape for x in session.get_inputs()}
        outputs = {x.name: len(x.shape) for x in session.get_outputs()}
        assert {key: len(axes) for key, axes in manual["files"][name]["outputs"].items()} == outputs
    sounds_agree(opened["audio.onnx"], model, 3)
    for shape in ((1, 77), (6, 1), (2, 30)):
        tokens = torch.randint(0, TINY["text_cfg"]["vocab_size"], shape)
        same(opened["text.onnx"].run(None, {"tokens": tokens.numpy()})[0], model.encode_tokens(tokens)[0])
    for count in (1, 5):
        frames = torch.randint(0, 256, (count, 3, 224, 224), dtype=torch.uint8)
        same(opened["vision.onnx"].run(None, {"images": frames.float().numpy()})[0], model.encode_frames(frames))
    assert manual["dim"] == D and manual["tokenizer"]["max_tokens"] == 32 and manual["images"]["range"] == [0, 255]
    assert manual["images"].items() >= (fitted | {"size": [224, 224]}).items()
    assert manual["scale"] == pytest.approx(100)
    assert manual["audio"]["mix"]["both"] == type_token_weights("both").tolist()
    assert manual["audio"]["spectrogram"]["channels"] == "lmr"


@torch.no_grad()
def test_sounds_of_one_channel_and_gelu(tmp_path):
    model = tiny_model(quick_gelu=False)
    onnx_export._export(onnx_export._audio(model), tmp_path / "audio.onnx")
    sounds_agree(onnxruntime.InferenceSession(tmp_path / "audio.onnx"), model, 1)


def sounds_agree(audio: onnxruntime.InferenceSession, model: Model, channels: int) -> None:
    for count, token in ((7, "both"), (1, "vb"), (2, "0.3"), (4, "none")):
        segments, mix = torch.randn(count, channels, 224, 224), type_token_weights(token)
        (got,) = audio.run(None, {"segments": segments.numpy(), "mix": mix.numpy()})
        same(got, model.audio(segments, mix))


def exported_head(model: Model, folder) -> onnxruntime.InferenceSession:
    onnx_export._export(onnx_export._head(model), folder / "head.onnx")
    return onnxruntime.InferenceSession(folder / "head.onnx")


def part(kind: int, rows: int, lengths: list[int]) -> PaddedSequence:
    """Random vectors of these lengths, what is padding drawn too."""
    mask = torch.arange(max(lengths)) < torch.tensor([lengths[i % len(lengths)] for i in range(rows)])[:, None]
    return PaddedSequence(kind, torch.randn(rows, max(lengths), D), mask)


def feed(session: onnxruntime.InferenceSession, *parts: PaddedSequence):
    names = [x.name for x in session.get_inputs()]
    values = [x.numpy() for each in parts for x in (each.vectors, each.mask)]
    return session.run(None, dict(zip(names, values, strict=True)))[0]


@torch.no_grad()
def test_global_local_gives_torchs_media_vectors(tmp_path):
    model = tiny_model(head="global_local")
    session = exported_head(model, tmp_path)
    for rows, frames, segments in ((1, [3], [10]), (5, [1, 12, 0], [2, 1]), (2, [4], [0, 3])):
        parts = [part(fusion.VISION, rows, frames), part(fusion.AUDIO, rows, segments)]
        same(feed(session, *parts), model.head(parts))


@torch.no_grad()
def test_local_local_gives_torchs_scores_of_all_pairs(tmp_path):
    model = tiny_model(head="local_local")
    session = exported_head(model, tmp_path)
    for captions, clips, lengths in ((1, 1, [2]), (5, 3, [7, 1, 32]), (2, 6, [4, 0])):
        words = part(fusion.TEXT, captions, [max(1, n) for n in lengths])
        parts = [part(fusion.VISION, clips, [2, 1]), part(fusion.AUDIO, clips, [3])]
        same(feed(session, words, *parts), model.head(words, parts))


@torch.no_grad()
def test_the_captioner_scores_each_next_token_as_the_decoder_does_step_by_step(tmp_path):
    model = tiny_model(head="captioner", modalities="a")
    head, sounds = exported_head(model, tmp_path), part(fusion.AUDIO, 3, [4, 2, 1])
    tokens = torch.randint(0, TINY["text_cfg"]["vocab_size"], (3, 6))
    (_, words), outputs = onnx_export.TextModule(model)(tokens), onnx_export._text(model).outputs
    assert list(outputs) == ["vectors", "words"]
    every = PaddedSequence(fusion.TEXT, words, torch.ones(3, 6, dtype=torch.bool))
    got, decoder = feed(head, every, sounds), model.start_decoding([sounds], 1)
    for i in range(6):
        same(got[:, i], decoder.step(tokens[:, i]))


@torch.no_grad()
def test_a_classifier_gives_torchs_logits(tmp_path):
    model = tiny_model(head="classifier", modalities="v", labels=["a", "b", "c"])
    session = exported_head(model, tmp_path)
    for rows, frames in ((1, [3]), (4, [1, 0, 12])):
        frames = part(fusion.VISION, rows, frames)
        same(feed(session, frames), model.head([frames]))


@torch.no_grad()
@pytest.mark.parametrize("name, pool, size", [("resnet18", "avg", 64), ("test_vit", "", 224)])
def test_a_vision_tower_of_timm(tmp_path, name, pool, size):
    """test_vit resizes its positions in each pass, from those of pictures of 160."""
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": "linear", "image_size": size}
    cfg = ModelConfig(clip="tiny.json", audio_tower="tiny.json")
    model = Model(SMALLEST | {"vision_cfg": vision}, cfg, SpectrogramConfig(), audio=SMALLEST).eval()
    onnx_export._export(onnx_export._vision(model), tmp_path / "vision.onnx")
    frames = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx")
    same(session.run(None, {"images": frames.float().numpy()})[0], model.encode_frames(frames))


def test_what_torch_cannot_export_is_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise torch.onnx.errors.OnnxExporterError("no such\noperator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(UserError, match=r"audio.onnx: torch cannot export it \(no such operator\): leave out --onnx$"):
        onnx_export.export_model(tiny_model(), tmp_path)
