"""Model folders (model.safetensors, config.json, README.md), complete or not there, and foreign weights in and out."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import save_file

from clip4vla import model_card, official, towers
from clip4vla.config import ImportConfig, UserError
from clip4vla.model import Model
from clip4vla.settings import load
from clip4vla.universal import fsync

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def write(
    model: Model,
    folder: str | Path,
    card: ModelCard | None = None,
    dtype: str = "fp32",
    step: int | None = None,
    onnx: bool = False,
    replace: bool = False,
) -> str:
    """Write a folder for from_checkpoint aside, sync it, rename it; what was written, in one line.

    card: default model_card.card(model), unless a card is there; onnx: also audio.onnx and text.onnx, in fp32; replace: the
    folder may be there, and keeps its other files. Raises UserError if it may not, and for weights not finite in dtype.
    """
    folder = Path(os.path.abspath(folder))
    must_be_new(folder, replace=replace)
    weights = _rounded(model.state_dict(), dtype, folder)

    def fill(aside: Path) -> None:
        aside.mkdir()
        save_tensors(weights, aside / "model.safetensors")
        (aside / "config.json").write_text(json.dumps(model.config() | {"step": step}, indent=1))
        if card or not (folder / "README.md").exists():
            (card or model_card.card(model)).save(aside / "README.md")
        if onnx:
            from clip4vla.onnx_export import export_towers  # its packages are an extra

            export_towers(Model.from_checkpoint(aside), aside)  # of the weights as they are rounded

    _whole(folder, fill)
    millions = sum(value.numel() for value in weights.values()) / 1e6
    size = (folder / "model.safetensors").stat().st_size / 1e6
    return f"{millions:.1f}M weights in {dtype}, {size:.0f} MB"


def bring(source: str, words: Sequence[str], allow_unknown: bool = False) -> tuple[Model, str, str]:
    """(model, what became of the weights, the same in one sentence) of a checkpoint of the authors' or what model.clip takes.

    words: KEY=VALUE of ImportConfig. The audio tower of a CLIP is a copy of its vision tower. UserError as official.py has it.
    """
    torch.manual_seed(0)  # fresh weights are the same each time
    if Path(source).is_dir():
        raise UserError(f"{source}: a folder; name a file of weights, or take launch/export.py for a run")
    if Path(source).is_file() and not source.endswith(".json"):
        state, _ = towers.read_weights(source, "")
        if official.is_official(state):
            cfg = official.settings(state, words, source)
            model, account = official.from_official(state, cfg, source, allow_unknown)
            return model, str(account), f"A checkpoint of the authors' code, {Path(source).name}: {account.sum()}."
    cfg = load(ImportConfig, None, ["model.train_towers=text+vision", *words])
    cfg.model.clip = source
    model = Model(towers.describe_clip(source, cfg.model.quick_gelu), cfg.model, cfg.spectrogram, cfg.frames)
    model.must_have_positions()
    found = model.load_clip()
    model.start_audio()
    model.start_head()
    cfg.model.clip = source if not Path(source).is_file() else Path(source).name  # no folder of this machine's
    theirs = f"have the weights of {cfg.model.clip}" if found else f"are random: {cfg.model.clip} names no weights"
    said = f"Text and vision {theirs}; the audio tower is an untrained copy of the vision tower."
    return model.eval(), said, said


def take_out(folder: str | Path, file: Path, dtype: str = "fp32", like: str = "") -> str:
    """Write the model of a folder as a checkpoint of the authors': .safetensors, or else torch's format; what was written.

    like: such a checkpoint, which gives what the model lacks. UserError if `file` is there, and as official.to_official.
    """
    must_be_new(file, is_folder=False)
    other = towers.read_weights(like, "--like ")[0] if like else None
    state, account = official.to_official(Model.from_checkpoint(folder), other)
    state = _rounded(state, dtype, file)
    _whole(file.absolute(), lambda aside: save_tensors(state, aside))
    return str(account)


def must_be_new(place: Path, is_folder: bool = True, replace: bool = False) -> None:
    """UserError if there is something already (an empty folder is nothing), or if it is below a file."""
    free = not place.exists() or (is_folder and place.is_dir() and (replace or not any(place.iterdir())))
    if not free or any(parent.is_file() for parent in place.parents):
        raise UserError(f"{place} is there already, or below a file; name another folder, or remove it")


def _rounded(weights: official.State, dtype: str, place: Path) -> official.State:
    """In another precision; UserError if it cannot hold some."""
    weights = {name: value.to(DTYPES[dtype]).contiguous() for name, value in weights.items()}
    if not all(value.isfinite().all() for value in weights.values()):
        raise UserError(f"{place.name}: some weights are not finite in {dtype}; take another dtype or step")
    return weights


def save_tensors(weights: official.State, file: Path) -> None:
    """Tensors by name as a file, .safetensors or torch's, that those may read who may read others of this user's files.

    Raises UserError if the disk does not take them.
    """
    file.touch()
    rights = file.stat().st_mode  # safetensors would leave it to its owner alone
    try:
        (save_file if file.suffix == ".safetensors" else torch.save)(weights, file)
    except (SafetensorError, RuntimeError) as error:  # what both make of a full disk
        why = " ".join(str(error).split())[:100]
        raise UserError(f"{file.name}: cannot be written ({why}): make room, or choose another folder") from None
    file.chmod(rights)


def _whole(place: Path, fill: Callable[[Path], object]) -> None:
    """A file or folder that is complete or absent: filled aside, synced, renamed; into a filled folder, file by file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f"{place.name}.partial-") as temporary:
        aside = Path(temporary, place.name)
        fill(aside)
        for file in (*aside.glob("*"), aside):
            fsync(file)
        if place.is_dir() and any(place.iterdir()):
            for file in aside.iterdir():
                file.replace(place / file.name)
        else:
            aside.rename(place)
    fsync(place.parent)
