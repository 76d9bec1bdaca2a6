"""Build text and vision towers, randomly initialised, from a configuration; freeze parts of them."""

import functools
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CustomTextCLIP
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from clip4vla.errors import UserError, one_line
from clip4vla.quick_imports import import_for_open_clip
from clip4vla.towers import transformers_clip
from clip4vla.towers.attention import own_blocks
from clip4vla.towers.text import HFText

BLOCKS = ("resblocks", "blocks", "stages", "layers", "block", "layer")  # names of the list of a tower's blocks


def build_clip(config: dict[str, Any]) -> Any:
    """Build randomly initialised towers `.visual` and `.text` of a configuration; no weights are fetched."""
    if "transformers" in config:
        return transformers_clip.build(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    hf = text.get("hf_model_name")
    if vision.get("timm_model_name"):
        import_for_open_clip("timm")
    if hf:
        import_for_open_clip("transformers")
    try:
        _must_be_known(vision.get("timm_model_name"), hf)
        if hf:
            _must_be_there(hf)
        model = CustomTextCLIP(
            config["embed_dim"],
            {**vision, "timm_model_pretrained": False},
            {**text, "hf_model_pretrained": False},
            quick_gelu=config.get("quick_gelu", False),
        )
    except UserError:
        raise
    except Exception as error:  # open_clip and torch raise many kinds for sizes that cannot be
        raise UserError(f"model.clip: open_clip cannot build these towers: {one_line(error)}") from None
    if not isinstance(model.text, TextTransformer | HFTextEncoder):
        raise UserError(
            f"model.clip: its text_cfg makes a {type(model.text).__name__}: a TextTransformer, or a model of transformers, is "
            "required; take another CLIP"
        )
    if isinstance(model.text, HFTextEncoder):
        model.text = HFText(model.text, text.get("context_length", 77))
    if not isinstance(model.visual.image_size, tuple):
        model.visual.image_size = (model.visual.image_size,) * 2
    _must_read_pictures(model.visual)
    for module in list(model.modules()):
        for name, part in module.named_children():
            if type(part) is QuickGELU:
                setattr(module, name, LeanQuickGELU())
    own_blocks(model)
    return model


def _must_read_pictures(tower: Any) -> None:
    """Raise UserError for a tower of timm's whose pictures are said to have another size than its patches are laid for."""
    embed: Any = getattr(getattr(tower, "trunk", None), "patch_embed", None)
    if type(embed).__name__ != "PatchEmbed" or not embed.strict_img_size:
        return
    laid = embed.img_size
    if tuple(laid) != tuple(tower.image_size):
        raise UserError(
            f"model.clip: its vision_cfg has image_size={tower.image_size[0]}: {laid[0]} is required by its timm_model_name; "
            "correct one of them"
        )


class LeanQuickGELU(QuickGELU):
    """Computes open_clip's QuickGELU, x sigmoid(1.702 x); keeps x alone for the gradient, where that keeps the sigmoid too."""

    def forward(self, x: Tensor) -> Tensor:
        """Activate x, of any shape."""
        return _QuickGELU.apply(x)


class _QuickGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(1.702 * x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(
            grad, 1.702 * x
        )  # silu(u) = u sigmoid(u), of which this is silu(1.702 x) / 1.702


@functools.cache
def names_in_open_clip() -> set[str]:
    """Collect the models and tokenizers of other libraries that open_clip's own configurations name."""
    texts = [open_clip.get_model_config(name)["text_cfg"] for name in open_clip.list_models()]
    return {text[key] for text in texts for key in ("hf_model_name", "hf_tokenizer_name") if text.get(key)}


def _must_be_known(timm_name: str | None, hf_name: str | None) -> None:
    """Raise UserError for a name by which timm or transformers would fetch, or read, what the user has not named."""
    if timm_name:
        timm = import_for_open_clip("timm")
        if not timm.is_model(timm_name) or ":" in timm_name or "/" in timm_name:
            raise UserError(
                f"model.clip: its vision_cfg names {timm_name!r}: no architecture of timm {timm.__version__}"
            )
    if hf_name and hf_name not in names_in_open_clip():
        raise UserError(
            f"model.clip: its text_cfg names {hf_name!r}: a model of transformers that open_clip's own do not name"
        )


def _must_be_there(name: str) -> None:
    """Raise UserError if the configuration of a model of transformers is neither on this machine nor to be fetched."""
    try:
        import_for_open_clip("transformers").AutoConfig.from_pretrained(name)
    except Exception as error:  # transformers and the hub's libraries raise many kinds
        raise UserError(
            f"model.clip: the configuration of {name} cannot be had ({one_line(error, 200)}); fetch it where there is a "
            f"network: hf download {name} config.json"
        ) from None


class Undrawn(TorchFunctionMode):
    """Keeps new modules, in the block, at what their memory holds: drawing weights that will be loaded takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draws = (
            nn.init.normal_,
            nn.init.uniform_,
            nn.init.kaiming_uniform_,
            Tensor.normal_,
            Tensor.uniform_,
            Tensor.erfinv_,
        )
        if func in draws:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def freeze_first(tower: nn.Module, blocks: int, name: str) -> None:
    """Freeze the first `blocks` blocks of a tower and what lies before them."""
    path, held = _blocks_of(tower, name)
    if not 0 <= blocks <= len(held):
        raise UserError(f"model.freeze_layers: {name}: {blocks} is not between 0 and its {len(held)} blocks")
    part: Any = tower
    for step in path:
        for child, module in part.named_children():
            if child == step:  # what comes after the blocks is defined after them
                break
            module.requires_grad_(False)
        for own, parameter in part.named_parameters(recurse=False):
            if own not in ("proj", "text_projection"):
                parameter.requires_grad_(False)
        part = getattr(part, step)
    for block in held[:blocks]:
        block.requires_grad_(False)


def _blocks_of(tower: nn.Module, name: str) -> tuple[list[str], Any]:
    """Find (the path to, the modules of) a tower's blocks: its outermost list that is named as such lists are."""
    lists = [
        (path.split("."), module)
        for path, module in tower.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and path.rpartition(".")[2] in BLOCKS
    ]
    if not lists:
        raise UserError(
            f"model.freeze_layers: {name}: a {type(tower).__name__} has no list of blocks: freeze it as a whole, by "
            "model.trainable_towers"
        )
    return min(lists, key=lambda path_and_list: len(path_and_list[0]))


def hold_still(tower: nn.Module) -> None:
    """Set to evaluation what must not change by itself in training: frozen towers, and batch norms' statistics.

    Dropout would give frozen towers other vectors than embed.py's. Statistics of a batch would depend on its padding, and on
    how many ranks share it.
    """
    if not any(parameter.requires_grad for parameter in tower.parameters()):
        tower.eval()
    for module in tower.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
