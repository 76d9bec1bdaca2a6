"""Run a vision tower on pictures, or on what the audio encoder embeds as patches.

A tower is open_clip's VisionTransformer, or a module with forward(images (F, 3, H, W), normalised) -> (F, D),
set_grad_checkpointing(enable), and image_size (H, W).
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import (
    VisionTransformer,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip4vla.towers.attention import Block


def encode_images(tower: nn.Module, images: Tensor) -> Tensor:
    """Encode normalised pictures (F, 3, H, W) into vectors (F, D), not normalised."""
    if not isinstance(tower, VisionTransformer):
        return tower(images)
    x = embed_patches(images, tower.conv1.weight)
    x = torch.cat([tower.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)
    x = tower.ln_pre(tower.patch_dropout(x + tower.positional_embedding.to(x.dtype)))
    x = tower._pool(pooled_places(tower, x))[0]
    return x @ tower.proj if tower.proj is not None else x


def embed_patches(images: Tensor, weight: Tensor) -> Tensor:
    """Embed the patches of images (n, C, H, W) by a kernel (D, C, h, w) whose stride is its size: (n, P, D), row by row.

    A product does what the convolution would: cuDNN plans that again for each new n, and on a CPU it takes longer.
    """
    (n, channels, *_), (height, width) = images.shape, weight.shape[2:]
    rows, columns = images.shape[2] // height, images.shape[3] // width
    images = images[:, :, : rows * height, : columns * width]  # a rest is left out
    patches = images.reshape(n, channels, rows, height, columns, width).permute(0, 2, 4, 1, 3, 5)
    return F.linear(patches.flatten(3).flatten(1, 2), weight.flatten(1))


def pooled_places(
    tower: VisionTransformer, x: Tensor, ignored: Tensor | None = None, all_places: bool = False
) -> Tensor:
    """Run the blocks of a vision tower on tokens (B, L, W): outputs (B, L, W), or (B, 1, W) where only [CLS] is pooled.

    ignored (B, L) bool: True at padding, which no token attends to. all_places: (B, L, W) in any case.
    """
    first_only = pools_first(tower) and not all_places
    if not first_only and ignored is None:
        return tower.transformer(x)
    blocks: Any = tower.transformer.resblocks
    mask = None if ignored is None else ~ignored
    for number, block in enumerate(blocks):
        last = number == len(blocks) - 1 and first_only
        run = functools.partial(block.run, kept=1 if last else x.shape[1], mask=mask)
        x = checkpoint(run, x, use_reentrant=False) if tower.transformer.grad_checkpointing else run(x)
    return x


def pools_first(tower: VisionTransformer) -> bool:
    """Tell whether a vision tower's vector is the output at [CLS] alone, so that its last block need not give the others."""
    plain = isinstance(tower.transformer.resblocks[-1], Block)
    return plain and tower.pool_type == "tok" and tower.attn_pool is None
