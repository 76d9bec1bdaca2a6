"""Export the audio and text towers to ONNX, each checked with onnxruntime against torch.

audio.onnx   segments (S, C, 224, 224) as spectrogram.normalise gives them, mix (1, T, 2) of type_token_weights
             -> vectors (S, D)
text.onnx    tokens (B, L) int64, L at most the tower's context length -> sentence vectors (B, D)

Vectors are fp32 and not of unit length. S, T, B and L are free.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from clip4vla.errors import UserError
from clip4vla.models.model import Model
from clip4vla.towers.text import encode_text

TOLERANCE = 1e-4  # of the largest value
LARGEST = 1_900_000_000  # bytes of weights that one ONNX file may hold; what is larger lies beside it


class _Text(nn.Module):
    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = tower

    def forward(self, tokens: Tensor) -> Tensor:
        return encode_text(self.tower, tokens)[0]


def export_towers(model: Model, folder: Path) -> None:
    """Write FOLDER/audio.onnx and FOLDER/text.onnx; UserError for a tower that differs there."""
    if model.cfg.audio_span != "segment":
        raise UserError(
            "--onnx: the audio tower reads whole clips (model.audio_span=clip): only one of segments is exported"
        )
    rows = (model.spectrogram.segment_rows, model.spectrogram.n_mels)
    channels = 1 if model.spectrogram.channels == "mono" else 3
    audio_inputs = [(torch.randn(s, channels, *rows), torch.rand(1, t, 2)) for s, t in ((3, 2), (1, 1), (5, 3))]
    room, words = model.text.context_length, model.text.vocab_size
    text_inputs = [(torch.randint(0, words, shape),) for shape in ((3, min(9, room)), (1, room), (4, 2))]
    _export(model.audio, audio_inputs, {"segments": {0: "S"}, "mix": {1: "T"}}, folder / "audio.onnx")
    _export(_Text(model.text), text_inputs, {"tokens": {0: "B", 1: "L"}}, folder / "text.onnx")


def _export(
    tower: nn.Module, inputs: Sequence[tuple[Tensor, ...]], free: dict[str, dict[int, str]], file: Path
) -> None:
    """Trace with the first of the inputs, check with all."""
    import onnxruntime
    import onnxscript  # noqa: F401  torch's exporter is built on it, and says less clearly that it is missing

    large = sum(p.numel() * 4 for p in tower.parameters()) > LARGEST
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own use of what it has deprecated
        torch.onnx.export(
            tower, inputs[0], file, dynamo=True, dynamic_shapes=free, external_data=large, verbose=False,
            input_names=list(free), output_names=["vectors"],
        )  # fmt: skip
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for values in inputs:
            want = tower(*values)
            feed = {name: value.numpy() for name, value in zip(free, values, strict=True)}
            error = (torch.from_numpy(session.run(None, feed)[0]) - want).abs().max() / want.abs().max()
            if not error < TOLERANCE:
                raise UserError(f"{file.name}: differs from torch by {error:.1e} of its largest value: not written")
