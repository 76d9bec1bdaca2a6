"""Read files of weights, infer the configuration from their shapes, and fill towers with them."""

import itertools
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, convert_to_custom_text_state_dict
from torch import Tensor, nn

from clip4vla.data.precomputed_embeddings import SPACE
from clip4vla.errors import UserError, one_line
from clip4vla.io import safe_load
from clip4vla.towers.build import build_clip

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")


def names_weights(clip: str) -> bool:
    """Tell whether `model.clip` names weights, in a file or by a tag, or an architecture alone."""
    if clip.startswith(SPACE):
        return False
    return clip.endswith(WEIGHTS) or (not clip.endswith(".json") and bool(clip.partition("/")[2]))


def load_clip_weights(model: CustomTextCLIP, clip: str) -> bool:
    """Fill the towers, which may be on torch's meta device, with the weights that `model.clip` names; False if none."""
    if not names_weights(clip):
        return False
    name, _, tag = clip.partition("/")
    if clip.endswith(WEIGHTS):
        state = convert_to_custom_text_state_dict(read_weights(clip)[0])
    else:
        try:
            state = open_clip.create_model(name, pretrained=tag, force_custom_text=True).state_dict()
        except Exception as error:  # open_clip raises whatever its download libraries raise
            raise UserError(
                f"model.clip: cannot get the weights of {clip!r} ({one_line(error)}); "
                "give a local weights file, or the name alone for random towers"
            ) from None
    _load(model, {key: value for key, value in state.items() if key != "logit_bias"}, clip)
    return True


def infer_config(state: dict[str, Tensor], where: str = "weights") -> dict[str, Any]:
    """Infer the open_clip configuration of a ViT CLIP from the shapes of its weights, in OpenAI's names or open_clip's."""
    state = {key.removeprefix("text."): value for key, value in state.items()}
    try:
        width, _, patch, _ = state["visual.conv1.weight"].shape
        positions, _ = state["visual.positional_embedding"].shape
        text_width = state["ln_final.weight"].shape[0]
        config = {
            "embed_dim": state["text_projection"].shape[1],
            "vision_cfg": {
                "layers": _blocks(state, "visual.transformer.resblocks."),
                "width": width,
                "patch_size": patch,
                "image_size": patch * round((positions - 1) ** 0.5),
            },
            "text_cfg": {
                "context_length": state["positional_embedding"].shape[0],
                "vocab_size": state["token_embedding.weight"].shape[0],
                "width": text_width,
                "heads": text_width // 64,
                "layers": _blocks(state, "transformer.resblocks."),
            },
        }
        check_size_claims(config, state)
        return config
    except KeyError as error:
        raise UserError(f"{where}: not the weights of a CLIP with a vision transformer: no {error}") from None
    except (ValueError, TypeError, IndexError, ArithmeticError) as error:  # tensors of other shapes than a CLIP's
        raise UserError(f"{where}: not the weights of a CLIP with a vision transformer: {error}") from None


def _blocks(state: dict[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def check_size_claims(config: dict[str, Any], state: dict[str, Tensor], blocks: int = 0, positions: int = 0) -> None:
    """Raise ValueError for a configuration of more weights than there are: what is built of it could fill any memory.

    blocks, positions: of a head, of the text tower's width.
    """
    sizes = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    if sum(size.layers for size in sizes) + blocks > len(state) or min(size.layers for size in sizes) < 1:
        raise ValueError(f"towers of more blocks than the file's {len(state)} tensors")
    with torch.device("meta"):  # counts without memory
        clip = build_clip(config)
    width = sizes[1].width
    head = width * (width * (4 + 2 * sizes[1].mlp_ratio) * blocks + positions)
    wanted = head + sum(value.numel() for value in itertools.chain(clip.parameters(), clip.buffers()))
    numbers = sum(value.numel() for value in state.values()) + sum(value.numel() for value in clip.buffers())
    if wanted > numbers:
        raise ValueError(f"towers of {wanted:.0f} weights, the file has {numbers}")


def read_weights(path: str, key: str = "model.clip: ") -> tuple[dict[str, Tensor], bool]:
    """Read a file: (state dict in fp32 on the CPU, whether it is OpenAI's TorchScript archive); no code in it is run."""
    if not Path(path).is_file():
        raise UserError(f"{key}no weights file {path}")
    try:
        state, jit = safe_load.read(path)
    except Exception as error:  # torch and safetensors raise many kinds for corrupt files
        raise _unreadable(key, path, error) from None
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    extra = {"input_resolution", "context_length", "vocab_size", "attn_mask"}  # archives carry these beside the weights
    flat = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not state or not flat:
        raise UserError(f"{key}{path}: not one flat dictionary of weights; save the model's state_dict() alone")
    state = {k.removeprefix("module."): v for k, v in state.items() if k not in extra}
    try:
        safe_load.must_be_plain(state, Path(path).stat().st_size)
        return {name: value.float() for name, value in state.items()}, jit
    except (ValueError, RuntimeError) as error:  # torch has no way from some types to fp32
        raise _unreadable(key, path, error) from None


def _unreadable(key: str, path: str, error: Exception) -> UserError:
    return UserError(f"{key}{path}: unreadable weights ({one_line(error)})")


def _load(model: nn.Module, state: dict[str, Tensor], where: str) -> None:
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise UserError(f"{where}: these weights do not fit the towers: {one_line(error, 300)}") from None
