"""Export a whole model to ONNX, each file checked with onnxruntime against torch, and onnx.json, which says how to use them.

audio.onnx    segments (S, C, rows, mels) as spectrogram.normalise gives them, mix (1, T, 2) of type_token_weights
              -> vectors (S, D)
text.onnx     tokens (B, L) int64, L at most the tower's context length -> vectors (B, D); words (B, L, D) where a head reads them
vision.onnx   images (F, 3, H, W), RGB in 0..255 -> vectors (F, D)
head.onnx     of every head but global_global, which has no weights: see onnx_modules.HeadModule

Vectors are fp32 and not of unit length. All sizes but C, D, H, W, rows and mels are free.
"""

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clip4vla.config_io import to_dict
from clip4vla.errors import UserError, one_line
from clip4vla.export.onnx_modules import HeadModule, TextModule, VisionModule, reads_words
from clip4vla.models.fusion import GlobalToGlobal
from clip4vla.models.model import Model
from clip4vla.towers.space import NoTower

TOLERANCE = 1e-4  # of the largest value
LARGEST = 1_900_000_000  # bytes of weights that one ONNX file may hold; what is larger lies beside it


class _Part(NamedTuple):
    """Describes one file: its module, names and axes of its inputs, names and axes of its outputs, and inputs to try."""

    module: nn.Module
    inputs: dict[str, list[str | int]]
    outputs: dict[str, list[str | int]]
    tried: Sequence[tuple[Tensor, ...]]  # the first one is traced


def export_model(model: Model, folder: Path) -> None:
    """Write FOLDER/*.onnx and FOLDER/onnx.json; UserError for a part that cannot be exported, or differs there."""
    if model.cfg.audio_span != "segment":
        raise UserError(
            "--onnx: the audio tower reads whole clips (model.audio_span=clip): only one of segments is exported"
        )
    parts = {"audio.onnx": _audio(model)}
    if not isinstance(model.text, NoTower):
        parts |= {"text.onnx": _text(model), "vision.onnx": _vision(model)}
    if not isinstance(model.head, GlobalToGlobal):
        parts["head.onnx"] = _head(model)
    for name, part in parts.items():
        _export(part, folder / name)
    (folder / "onnx.json").write_text(json.dumps(_manual(model, parts), indent=1), encoding="utf-8")


def _audio(model: Model) -> _Part:
    sound = model.spectrogram
    size = [1 if sound.channels == "mono" else 3, sound.segment_rows, sound.n_mels]
    tried = [(torch.randn(s, *size), torch.rand(1, t, 2)) for s, t in ((3, 2), (1, 1), (5, 3))]
    inputs: dict[str, list[str | int]] = {"segments": ["S", *size], "mix": [1, "T", 2]}
    return _Part(model.audio, inputs, {"vectors": ["S", "D"]}, tried)


def _text(model: Model) -> _Part:
    room, words = model.text.context_length, model.text.vocab_size
    tried = [(torch.randint(0, words, shape),) for shape in ((3, min(9, room)), (1, room), (4, 2))]
    outputs: dict[str, list[str | int]] = {"vectors": ["B", "D"]}
    outputs |= {"words": ["B", "L", "D"]} if reads_words(model) else {}
    return _Part(TextModule(model), {"tokens": ["B", "L"]}, outputs, tried)


def _vision(model: Model) -> _Part:
    size = [3, *_pair(model.vision.image_size)]
    tried = [(255 * torch.rand(count, *size),) for count in (2, 1, 3)]
    return _Part(VisionModule(model), {"images": ["F", *size]}, {"vectors": ["F", "D"]}, tried)


def _head(model: Model) -> _Part:
    """Describe head.onnx; in what is tried, every second row of each kind is shorter by its last vector."""
    module, dim = HeadModule(model), model.clip_config["embed_dim"]
    room = {"words": model.cfg.max_tokens, "frames": model.cfg.max_frames, "segments": model.spectrogram.max_segments}
    axes = {"words": "L", "frames": "n", "segments": "m"}
    paired = model.cfg.head == "local_local"  # captions and clips are other numbers
    one = paired and not reads_words(model)  # word: the sentence's unit vector
    inputs: dict[str, list[str | int]] = {}
    for _, name in module.kinds:
        rows, length = "C" if paired and name == "words" else "B", 1 if one and name == "words" else axes[name]
        inputs |= {name: [rows, length, dim], f"{name}_mask": [rows, length]}
    tried = []
    for free in ({"C": 4, "B": 3, "L": 5, "n": 2, "m": 4}, {"C": 1, "B": 2, "L": 9, "n": 3, "m": 2}):
        sizes = {axes[name]: min(free[axes[name]], most) for name, most in room.items()} | {
            "C": free["C"],
            "B": free["B"],
        }
        shapes = [
            [sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in named] for named in inputs.values()
        ]
        tried.append(tuple(_rows(shape) for shape in shapes))
    last: list[str | int] = {"media": ["B", dim], "scores": ["C", "B"]}.get(module.output, ["B", len(model.cfg.labels)])
    if model.cfg.head == "captioner":
        last = ["B", "L", model.text.vocab_size]
    return _Part(module, inputs, {module.output: last}, tried)


def _rows(shape: list[Any]) -> Tensor:
    """Draw vectors (B, n, D), or a mask (B, n) whose odd rows are shorter by one where n > 1."""
    if len(shape) == 3:
        return torch.randn(shape)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[1::2, 1:][:, -1:] = False
    return mask


def _pair(size: Any) -> tuple[int, int]:
    return tuple(size) if isinstance(size, tuple | list) else (size, size)


def _export(part: _Part, file: Path) -> None:
    """Trace with the first of the inputs, check with all."""
    import onnxruntime
    import onnxscript  # noqa: F401  torch's exporter is built on it, and says less clearly that it is missing

    module = part.module.eval()
    large = sum(p.numel() * 4 for p in module.parameters()) > LARGEST
    free = tuple({i: axis for i, axis in enumerate(axes) if isinstance(axis, str)} for axes in part.inputs.values())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own use of what it has deprecated
        try:
            torch.onnx.export(
                module, part.tried[0], file, dynamo=True, dynamic_shapes=(free,) if isinstance(module, HeadModule) else free,
                external_data=large, verbose=False, input_names=list(part.inputs), output_names=list(part.outputs),
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            raise UserError(f"{file.name}: torch cannot export it ({one_line(error)}): leave out --onnx") from None
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for values in part.tried:
            want = module(*values)
            feed = {name: value.numpy() for name, value in zip(part.inputs, values, strict=True)}
            for here, there in zip(want if isinstance(want, tuple) else [want], session.run(None, feed), strict=True):
                off = (torch.from_numpy(there) - here).abs().max() / here.abs().max()
                if not off < TOLERANCE:
                    raise UserError(f"{file.name}: differs from torch by {off:.1e} of its largest value: not written")


def _manual(model: Model, parts: dict[str, _Part]) -> dict[str, Any]:
    """Describe the files for programs without this package: inputs, outputs, and what comes before them."""
    dim = model.clip_config["embed_dim"]
    files = {
        name: {
            "inputs": part.inputs,
            "outputs": {key: [dim if axis == "D" else axis for axis in axes] for key, axes in part.outputs.items()},
        }
        for name, part in parts.items()
    }
    tokens = {"clip": model.cfg.clip, "max_tokens": model.cfg.max_tokens}
    pictures = {"frames": to_dict(model.frames), "range": [0, 255], "color": "RGB"} | dataclasses.asdict(model.pictures)
    scale = model.logit_scale.float().exp().item() if model.cfg.learn_temperature else 1 / model.cfg.temperature
    sound = {"spectrogram": to_dict(model.spectrogram), "spectrogram_norm": model.cfg.spectrogram_norm}
    sound["mix"] = {"vb": [[[1, 0]]], "nb": [[[0, 1]]], "both": [[[1, 0], [0, 1]]], "default": model.cfg.audio_type}
    head = {"head": model.cfg.head, "modalities": model.cfg.modalities, "media_mean": model.cfg.media_mean}
    described = {
        "dim": dim,
        "scale": scale,
        "files": files,
        "audio": sound,
        "head": head | {"labels": model.cfg.labels},
    }
    return described if isinstance(model.text, NoTower) else described | {"tokenizer": tokens, "images": pictures}
