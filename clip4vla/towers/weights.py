"""Read files of weights, infer the configuration from their shapes, and fill towers with them."""

import itertools
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import pretrained
from open_clip.convert import convert_state_dict
from open_clip.factory import _find_checkpoint_in_dir
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, convert_to_custom_text_state_dict
from torch import Tensor, nn

from clip4vla.config_io import expand_path
from clip4vla.data.precomputed_embeddings import SPACE
from clip4vla.errors import UserError, one_line
from clip4vla.io import safe_load
from clip4vla.towers import transformers_clip
from clip4vla.towers.build import build_clip

WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
HUB, FOLDER = "hf-hub:", "local-dir:"  # open_clip's own prefixes
CONFIG = "open_clip_config.json"  # of a model in a folder or on the hub
NO_TOWER = ("logit_scale", "logit_bias", "text_decoder.", "text.transformer.embeddings.position_ids")


def architecture(clip: str) -> str:
    """Return NAME where `model.clip` is NAME/FILE, weights for an architecture of open_clip's; else ""."""
    name, _, file = clip.partition("/")
    known = clip.endswith(WEIGHTS) and not Path(clip).is_file() and name in open_clip.list_models()
    return name if known and file else ""


def weights_file(clip: str) -> str:
    """Find the file of weights that `model.clip` names, fetched if it is on the hub; "" for a tag or an architecture alone."""
    if clip.startswith(HUB):
        return download(clip)
    if clip.startswith(FOLDER):
        folder = Path(expand_path(clip.removeprefix(FOLDER), "model.clip"))
        file = _find_checkpoint_in_dir(folder) if (folder / CONFIG).is_file() else None
        if not file:
            raise UserError(f"model.clip={clip}: needs a folder with {CONFIG} and weights, .safetensors or .bin")
        return file
    if clip.endswith(WEIGHTS):
        return clip.partition("/")[2] if architecture(clip) else clip
    return ""


def download(clip: str, name: str | None = None) -> str:
    """Fetch a file of a CLIP on the Hugging Face hub, its weights if not named, or find it in the hub's cache: its path."""
    try:
        return pretrained.download_pretrained_from_hf(clip.removeprefix(HUB), filename=name)
    except Exception as error:  # the hub's libraries raise many kinds
        raise UserError(
            f"model.clip={clip}: cannot be had from the hub ({one_line(error, 200)}); fetch it where there is a network, "
            f"and give {FOLDER}PATH"
        ) from None


def names_weights(clip: str) -> bool:
    """Tell whether `model.clip` names weights, in a file or by a tag, or an architecture alone."""
    if transformers_clip.is_named(clip) or clip.startswith((HUB, FOLDER)) or clip.endswith(WEIGHTS):
        return True
    return not clip.endswith(".json") and not clip.startswith(SPACE) and bool(clip.partition("/")[2])


def load_clip_weights(model: Any, clip: str) -> bool:
    """Fill the towers, which may be on torch's meta device, with the weights that `model.clip` names; False if none."""
    if not names_weights(clip):
        return False
    if transformers_clip.is_named(clip):
        transformers_clip.load_weights(model, clip)
        return True
    name, _, tag = clip.partition("/")
    if path := weights_file(clip):
        state = convert_to_custom_text_state_dict(convert_state_dict(model, read_weights(path)[0]))
    else:
        try:
            state = open_clip.create_model(name, pretrained=tag, force_custom_text=True).state_dict()
        except Exception as error:  # open_clip raises whatever its download libraries raise
            raise UserError(
                f"model.clip: cannot get the weights of {clip!r} ({one_line(error)}); "
                "give a local weights file, or the name alone for random towers"
            ) from None
    own = {key: value for key, value in state.items() if not key.startswith(NO_TOWER)}
    _load(model, own | {"logit_scale": model.logit_scale}, clip)
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
        raise UserError(
            f"{where}: not the weights of a CLIP with a vision transformer: no {error}; of another one give the architecture "
            "too, model.clip=NAME/FILE"
        ) from None
    except (ValueError, TypeError, IndexError, ArithmeticError) as error:  # tensors of other shapes than a CLIP's
        raise UserError(f"{where}: not the weights of a CLIP with a vision transformer: {error}") from None


def _blocks(state: dict[str, Tensor], prefix: str) -> int:
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def check_size_claims(config: dict[str, Any], state: dict[str, Tensor], blocks: int = 0, positions: int = 0) -> None:
    """Raise ValueError for a configuration of more weights than there are: what is built of it could fill any memory.

    blocks, positions: of a head, of width D.
    """
    if "transformers" in config:
        return transformers_clip.check_size_claims(config, state, blocks, positions)
    sizes = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    vision = sizes[0].layers if isinstance(sizes[0].layers, list) else [sizes[0].layers]  # a ResNet has four stages
    layers = [*vision] * (not sizes[0].timm_model_name) + [sizes[1].layers] * (not sizes[1].hf_model_name)
    if sum(layers) + blocks > len(state) or min(layers, default=1) < 1:
        raise ValueError(f"towers of more blocks than the file's {len(state)} tensors")
    with torch.device("meta"):  # counts without memory
        clip = build_clip(config)
    width = config["embed_dim"]
    ratio = sizes[1].mlp_ratio if sizes[1].width == width and not sizes[1].hf_model_name else 4
    head = width * (width * (4 + 2 * ratio) * blocks + positions)
    wanted = head + sum(value.numel() for value in itertools.chain(clip.parameters(), clip.buffers()))
    weights, buffers = sum(value.numel() for value in state.values()), [value.numel() for value in clip.buffers()]
    numbers = weights + sum(buffers)
    if wanted > numbers or max(buffers, default=0) > weights:
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
