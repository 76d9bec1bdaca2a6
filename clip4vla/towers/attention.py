"""CLIP's transformer block on F.scaled_dot_product_attention: the weights of open_clip's blocks, under their names.

open_clip 3 attends by nn.MultiheadAttention and open_clip 4 by a module of its own, whose arguments and masks differ. Both
become these. A mask is True at keys that are attended to: (B, L) by any query, or (B, q, L) by each; a float mask is added to
the scores, (q, L) or (B heads, q, L), as open_clip gives it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

KVCache = tuple[Tensor, Tensor]  # keys and values (B, heads, L, width of a head)


class Attention(nn.Module):
    """Attends with several heads, (4)-(5) of Attention Is All You Need; a head has W / heads numbers."""

    def __init__(self, like: Any):
        super().__init__()
        self.num_heads: int = like.num_heads
        self.head_dim: int = like.head_dim
        self.in_proj_weight, self.in_proj_bias, self.out_proj = like.in_proj_weight, like.in_proj_bias, like.out_proj

    def forward(
        self, x: Tensor, kept: int, mask: Tensor | None = None, past: KVCache | None = None
    ) -> tuple[Tensor, KVCache]:
        """Attend from the first `kept` of x (B, L, W) to keys of `past` and of x: ((B, kept, W), all keys and values)."""
        width = x.shape[2]
        if kept == x.shape[1]:
            parts = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        else:  # of the others only keys and values are needed
            (w, *_), (b, *_) = cut = [
                part.split([width, 2 * width]) for part in (self.in_proj_weight, self.in_proj_bias)
            ]
            parts = F.linear(x[:, :kept], w, b), *F.linear(x, cut[0][1], cut[1][1]).chunk(2, -1)
        query, keys, values = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        if past:
            keys, values = (torch.cat(pair, 2) for pair in zip(past, (keys, values), strict=True))
        y = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=None if mask is None else self._of_heads(mask)
        )
        return self.out_proj(y.transpose(1, 2).flatten(2)), (keys, values)

    def _of_heads(self, mask: Tensor) -> Tensor:
        """Shape a mask for scores (B, heads, q, L)."""
        if mask.dtype == torch.bool:
            return mask[:, None, None] if mask.ndim == 2 else mask[:, None]
        mask = mask.to(self.in_proj_weight.dtype)
        return mask if mask.ndim == 2 else mask.unflatten(0, (-1, self.num_heads))


class Block(nn.Module):
    """Runs attention and a network of two layers, each after a norm and beside a way past it, on the modules of another block."""

    def __init__(self, like: ResidualAttentionBlock):
        super().__init__()
        self.ln_1, self.attn, self.ls_1 = like.ln_1, Attention(like.attn), like.ls_1
        self.ln_2, self.mlp, self.ls_2 = like.ln_2, like.mlp, like.ls_2

    def forward(self, x: Tensor, k_x: None = None, v_x: None = None, attn_mask: Tensor | None = None) -> Tensor:
        """Encode tokens (B, L, W) to (B, L, W), with the arguments of open_clip's block."""
        return self.run(x, x.shape[1], attn_mask)

    def run(self, x: Tensor, kept: int, mask: Tensor | None = None) -> Tensor:
        """Encode the first `kept` of tokens (B, L, W): (B, kept, W). Keys and values are gone when the second part runs."""
        x = x[:, :kept] + self.ls_1(self.attn(self.ln_1(x), kept, mask)[0])
        return x + self.ls_2(self.mlp(self.ln_2(x)))

    def extend(
        self, x: Tensor, kept: int, mask: Tensor | None = None, past: KVCache | None = None
    ) -> tuple[Tensor, KVCache]:
        """Encode the first `kept` of tokens (B, L, W) that come after those of `past`: ((B, kept, W), keys and values of all)."""
        attended, cache = self.attn(self.ln_1(x), kept, mask, past)
        x = x[:, :kept] + self.ls_1(attended)
        return x + self.ls_2(self.mlp(self.ln_2(x))), cache

    def get_weight_dtype(self) -> torch.dtype:
        """Return the type of the weights, for which open_clip's Transformer asks its first block."""
        return self.mlp.c_fc.weight.dtype


def own_blocks(model: nn.Module) -> None:
    """Replace open_clip's blocks in a model by Blocks of the same weights."""
    for module in list(model.modules()):
        for name, part in module.named_children():
            if type(part) is ResidualAttentionBlock and not hasattr(part, "ln_1_kv"):
                setattr(module, name, Block(part))
