"""Run blocks of CLIP's transformers with key masks, for the first outputs alone where no others are used."""

from open_clip.transformer import (
    ResidualAttentionBlock,
)
from torch import Tensor


def run_block(block: ResidualAttentionBlock, x: Tensor, kept: int, ignored: Tensor | None = None) -> Tensor:
    """Run a block of CLIP's on tokens (B, L, W) for its outputs (B, kept, W) at the first `kept`.

    ignored: keys that are not attended to, True: (B, L) by any token, or (B, kept, L) by each.
    """
    keys = block.ln_1(x)
    queries = keys if kept == x.shape[1] else keys[:, :kept]
    masks: dict[str, Tensor | None] = {"key_padding_mask": ignored}
    if ignored is not None and ignored.ndim == 3:
        masks = {"attn_mask": ignored.repeat_interleave(block.attn.num_heads, 0)}
    x = x[:, :kept] + block.ls_1(block.attn(queries, keys, keys, need_weights=False, **masks)[0])
    return x + block.ls_2(block.mlp(block.ln_2(x)))
