"""The authors' released code: its weights, its values, and models with its heads."""

import functools
import tempfile
from pathlib import Path

import torch
from running import TINY
from safetensors.torch import load_file

from clip4vla.config import ModelConfig
from clip4vla.export import model_folder
from clip4vla.models import fusion
from clip4vla.models.audio_encoder import type_token_weights
from clip4vla.models.fusion import AUDIO, TEXT, VISION, PaddedSequence
from clip4vla.models.model import Model
from clip4vla.towers.build import build_clip
from clip4vla.towers.text import token_mask

REFERENCE = Path(__file__).parents[1] / "reference/official_small.safetensors"
POSITIONS = (  # of the reference's heads, and its pictures
    "model.max_tokens=12", "model.max_frames=3", "spectrogram.segment_rows=64", "spectrogram.n_mels=64",
)  # fmt: skip


def same(got, want, tolerance=1e-5):
    assert ((got - want).abs().max() / want.abs().max()).item() < tolerance


@functools.cache
def reference() -> tuple[dict, dict]:
    """(what the authors' code gave, their weights)."""
    state = load_file(REFERENCE)
    ref = {key[4:]: value for key, value in state.items() if key.startswith("ref.")}
    return ref, {key: value for key, value in state.items() if not key.startswith("ref.")}


def checkpoint(folder, **changes) -> str:
    """The authors' file; changes: other values of keys, None takes one away."""
    state = reference()[1] | {key.replace("__", "."): value for key, value in changes.items()}
    torch.save({key: value for key, value in state.items() if value is not None}, folder / "pytorch_model.bin.7")
    return str(folder / "pytorch_model.bin.7")


@functools.cache
def imported(*words) -> Model:
    """The authors' model after the converter: a checkpoint, a folder, and the model that is loaded from it."""
    with tempfile.TemporaryDirectory() as folder:
        model, _, _ = model_folder.import_weights(checkpoint(Path(folder)), [*POSITIONS, *words])
        model_folder.save_model_folder(model, f"{folder}/imported")
        return Model.from_checkpoint(f"{folder}/imported")


def reference_model(head="global_global", words="all"):
    """(reference values, the authors' model with a head, its words and media parts by modality)."""
    ref, model = reference()[0], imported(f"model.head={head}", f"model.text_tokens={words}")
    own = ref["in.audio_type"].repeat_interleave(3)
    audio = model.encode_segments(ref["in.segments"].float().flatten(0, 1), type_token_weights("both", own)).view(
        5, 3, -1
    )
    seen = model.vision(ref["in.frames"].float().flatten(0, 1)).view(5, 3, -1)
    parts = {
        "v": PaddedSequence(VISION, seen, ref["in.frame_mask"].bool()),
        "a": PaddedSequence(AUDIO, audio, ref["in.segment_mask"].bool()),
    }
    sentence, tokens = model.encode_tokens(ref["in.tokens"])
    return ref, model, sentence, PaddedSequence(TEXT, tokens, token_mask(model.text, ref["in.tokens"])), parts


def head(name, text=None, **settings):
    """A head of tiny towers, whose words, positions and types matter."""
    torch.manual_seed(0)
    cfg = ModelConfig(head=name, head_layers=2, head_dropout=0.0, max_tokens=6, max_frames=4, **settings)
    made = fusion.build(text or build_clip(TINY).text, cfg, 64, 3)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.double()
