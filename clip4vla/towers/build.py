"""Build open_clip's text and vision towers, randomly initialised, from a configuration; freeze parts of them."""

from typing import Any

import torch
from open_clip.model import CustomTextCLIP
from open_clip.transformer import (
    QuickGELU,
    TextTransformer,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from clip4vla.errors import UserError, one_line


def build_clip(config: dict[str, Any]) -> CustomTextCLIP:
    """Build randomly initialised towers `.visual` and `.text` of an open_clip configuration."""
    try:
        _must_be_own(config)
        model = CustomTextCLIP(**config)
    except Exception as error:  # open_clip and torch raise many kinds for sizes that cannot be
        reason = one_line(error)
        raise UserError(f"model.clip: open_clip cannot build these towers: {reason}") from None
    for tower, kind in ((model.visual, VisionTransformer), (model.text, TextTransformer)):
        if not isinstance(tower, kind):
            raise UserError(f"model.clip: needs open_clip's {kind.__name__}, this model has a {type(tower).__name__}")
    for module in list(model.modules()):
        for name, part in module.named_children():
            if type(part) is QuickGELU:
                setattr(module, name, LeanQuickGELU())
    return model


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


def _must_be_own(config: dict[str, Any]) -> None:
    """Raise ValueError for towers that open_clip has from other libraries, which may fetch and run code that a name asks for."""
    for cfg, names in (("vision_cfg", ("timm_model_name",)), ("text_cfg", ("hf_model_name", "hf_tokenizer_name"))):
        if any(config[cfg].get(name) for name in names):
            raise ValueError(f"{cfg} names a model of another library")


class Undrawn(TorchFunctionMode):
    """Keeps new modules, in the block, at what their memory holds: drawing weights that will be loaded takes a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draws = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_, Tensor.normal_, Tensor.uniform_)
        if func in draws:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def freeze_first(tower: TextTransformer | VisionTransformer, blocks: int, name: str) -> None:
    """Freeze the first `blocks` blocks of a tower and what lies before them."""
    held = tower.transformer.resblocks
    if not 0 <= blocks <= len(held):
        raise UserError(f"model.freeze_layers: {name}: {blocks} is not between 0 and its {len(held)} blocks")
    last = {"ln_post", "proj", "ln_final", "text_projection"}  # what comes after the blocks
    for part, module in tower.named_children():
        if part not in last and part != "transformer":
            module.requires_grad_(False)
    for part, parameter in tower.named_parameters(recurse=False):
        if part not in last:
            parameter.requires_grad_(False)
    for block in held[:blocks]:
        block.requires_grad_(False)
