"""Run a text tower: sentence vectors, word outputs, and which tokens are words."""

import torch
from open_clip.transformer import (
    TextTransformer,
    text_global_pool,
)
from torch import Tensor, nn


def encode_text(tower: TextTransformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Encode token numbers (B, L) to (sentence vector at [EOS] (B, D), projected outputs of all tokens (B, L, D))."""
    if not isinstance(tower, TextTransformer):
        return tower.encode(tokens)
    x, mask = tower._embeds(tokens)
    length = x.shape[1]
    x = projected(tower, tower.transformer(x, attn_mask=mask[..., :length, :length] if mask is not None else None))
    return text_global_pool(x, tokens, tower.pool_type, eos_token_id=tower.eos_id), x


def projected(tower: TextTransformer, x: Tensor) -> Tensor:
    """Project outputs (..., W) of the text tower's blocks to the tower's outputs (..., D)."""
    x = tower.ln_final(x)
    if isinstance(tower.text_projection, nn.Linear):
        return tower.text_projection(x)
    return x if tower.text_projection is None else x @ tower.text_projection


def token_mask(tower: TextTransformer, tokens: Tensor) -> Tensor:
    """Mark which of token numbers (B, L) are words of the captions, [SOS] and [EOS] included, (B, L) bool."""
    if tower.pool_type in ("argmax", "eos"):  # what follows the [EOS] is padding, whatever its number
        end = tokens.argmax(1) if tower.pool_type == "argmax" else (tokens == tower.eos_id).int().argmax(1)
        return torch.arange(tokens.shape[1], device=tokens.device) <= end[:, None]
    return tokens != tower.pad_id
