"""Write model folders (model.safetensors, config.json, README.md), complete or not at all.

Import and export foreign weights.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import ModelCard

from clip4vla.config import ImportConfig
from clip4vla.config_io import load
from clip4vla.errors import UserError
from clip4vla.export import model_card, official
from clip4vla.io.atomic import atomic_folder
from clip4vla.io.safe_load import save_tensors
from clip4vla.models.model import Model
from clip4vla.towers.config import resolve_clip_config
from clip4vla.towers.transformers_folder import PREFIX, copy_source
from clip4vla.towers.weights import read_weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def save_model_folder(
    model: Model,
    folder: str | Path,
    card: ModelCard | None = None,
    dtype: str = "fp32",
    step: int | None = None,
    onnx: bool = False,
    replace: bool = False,
) -> str:
    """Write a folder for from_checkpoint aside, sync it, rename it; return what was written, in one line.

    card: default model_card.card(model), unless a card is there; onnx: also *.onnx and onnx.json, in fp32; replace: the
    folder may be there, and keeps its other files. Raises UserError if it may not, and for weights not finite in dtype.
    """
    folder = Path(os.path.abspath(folder))
    must_be_new(folder, replace=replace)
    weights = _rounded(model.state_dict(), dtype, folder)

    def fill(aside: Path) -> None:
        aside.mkdir()
        save_tensors(weights, aside / "model.safetensors")
        (aside / "config.json").write_text(json.dumps(model.config() | {"step": step}, indent=1))
        if model.cfg.clip.startswith(PREFIX):
            copy_source(model.cfg.clip, aside)
        if card or not (folder / "README.md").exists():
            (card or model_card.card(model)).save(aside / "README.md")
        if onnx:
            from clip4vla.export.onnx_export import export_model  # its packages are an extra

            export_model(Model.from_checkpoint(aside), aside)  # of the weights as they are rounded

    atomic_folder(folder, fill)
    millions = sum(value.numel() for value in weights.values()) / 1e6
    size = (folder / "model.safetensors").stat().st_size / 1e6
    return f"{millions:.1f}M weights in {dtype}, {size:.0f} MB"


def import_weights(source: str, words: Sequence[str], allow_unknown: bool = False) -> tuple[Model, str, str]:
    """Import a checkpoint of the authors' or what model.clip takes.

    Returns (model, what became of the weights, the same in one sentence).

    words: KEY=VALUE of ImportConfig. The audio tower of a CLIP is a copy of its vision tower. UserError as official.py has it.
    """
    torch.manual_seed(0)  # fresh weights are the same each time
    if Path(source).is_dir():
        raise UserError(f"{source}: a folder; name a file of weights, or take launch/export.py for a run")
    if Path(source).is_file() and not source.endswith(".json"):
        state, _ = read_weights(source, "")
        if official.is_official(state):
            cfg = official.settings(state, words, source)
            model, account = official.from_official(state, cfg, source, allow_unknown)
            return model, str(account), f"A checkpoint of the authors' code, {Path(source).name}: {account.sum()}."
    cfg = load(ImportConfig, None, ["model.trainable_towers=text+vision", *words])
    cfg.model.clip = source
    model = Model(resolve_clip_config(source, cfg.model.quick_gelu), cfg.model, cfg.spectrogram, cfg.frames)
    model.must_have_positions()
    loaded = model.load_clip()
    model.start_audio()
    model.init_head()
    cfg.model.clip = source if not Path(source).is_file() else Path(source).name  # no folder of this machine's
    theirs = f"have the weights of {cfg.model.clip}" if loaded else f"are random: {cfg.model.clip} names no weights"
    outcome = f"Text and vision {theirs}; the audio tower is an untrained copy of the vision tower."
    return model.eval(), outcome, outcome


def export_official(folder: str | Path, file: Path, dtype: str = "fp32", like: str = "") -> str:
    """Write the model of a folder as a checkpoint of the authors': .safetensors, or else torch's format.

    Return what was written.
    like: such a checkpoint, which gives what the model lacks. UserError if `file` is there, and as official.to_official.
    """
    must_be_new(file, is_folder=False)
    other = read_weights(like, "--base-checkpoint ")[0] if like else None
    state, account = official.to_official(Model.from_checkpoint(folder), other)
    state = _rounded(state, dtype, file)
    atomic_folder(file.absolute(), lambda aside: save_tensors(state, aside))
    return str(account)


def must_be_new(place: Path, is_folder: bool = True, replace: bool = False) -> None:
    """Raise UserError if there is something already (an empty folder is nothing), or if it is below a file."""
    free = not place.exists() or (is_folder and place.is_dir() and (replace or not any(place.iterdir())))
    if not free or any(parent.is_file() for parent in place.parents):
        raise UserError(f"{place} is there already, or below a file; name another folder, or remove it")


def _rounded(weights: official.State, dtype: str, place: Path) -> official.State:
    """Convert weights to another precision; UserError if it cannot hold some."""
    weights = {name: value.to(DTYPES[dtype]).contiguous() for name, value in weights.items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"{place.name}: some weights are not finite in {dtype}; take another dtype or step")
    return weights
