"""Run a text tower: sentence vectors, word outputs, and which tokens are words.

A tower is open_clip's TextTransformer, or a module with encode(tokens (B, L)) -> (sentence (B, D), words (B, L, D) or None),
word_mask(tokens) -> (B, L) bool, set_grad_checkpointing(enable), and context_length, vocab_size, gives_words.
"""

import functools
from typing import Any

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import (
    TextTransformer,
    text_global_pool,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def encode_text(tower: Any, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Encode token numbers (B, L) to (sentence vector (B, D), projected outputs of all tokens (B, L, D), None if not given)."""
    if not isinstance(tower, TextTransformer):
        return tower.encode(tokens)
    if tower.use_pad_mask or tower.cls_emb is not None:
        x, mask = tower._embeds(tokens)
    else:  # whose causal mask open_clip 3 leaves whole, and 4 cuts as torch.export cannot
        length = tokens.shape[1]
        x = tower.token_embedding(tokens) + tower.positional_embedding[:length]
        mask = None if tower.attn_mask is None else tower.attn_mask[..., :length, :length]
    x = projected(tower, tower.transformer(x, attn_mask=mask))
    if tower.cls_emb is not None:  # CoCa's, which comes after the tokens
        return x[:, -1], x[:, :-1]
    return text_global_pool(x, tokens, tower.pool_type, eos_token_id=tower.eos_id), x


def projected(tower: TextTransformer, x: Tensor) -> Tensor:
    """Project outputs (..., W) of the text tower's blocks to the tower's outputs (..., D)."""
    x = tower.ln_final(x)
    if isinstance(tower.text_projection, nn.Linear):
        return tower.text_projection(x)
    return x if tower.text_projection is None else x @ tower.text_projection


def token_mask(tower: Any, tokens: Tensor) -> Tensor:
    """Mark which of token numbers (B, L) are words of the captions, [SOS] and [EOS] included, (B, L) bool."""
    if not isinstance(tower, TextTransformer):
        return tower.word_mask(tokens)
    if tower.pool_type in ("argmax", "eos"):  # what follows the [EOS] is padding, whatever its number
        end = tokens.argmax(1) if tower.pool_type == "argmax" else (tokens == tower.eos_id).int().argmax(1)
        return torch.arange(tokens.shape[1], device=tokens.device) <= end[:, None]
    padding = tokens == tower.pad_id
    if tower.pad_id == tower.eos_id:  # SigLIP's padding is [EOS] over and over: the first is a word
        return padding.cumsum(1) <= 1
    return ~padding


def gives_words(tower: Any) -> bool:
    """Tell whether a text tower has outputs of all tokens, which local_local and the captioner read."""
    return isinstance(tower, TextTransformer) or tower.gives_words


class HFText(nn.Module):
    """Encodes texts by open_clip's tower of a model of transformers, whose weights keep their names.

    context_length: of the captions that it was trained with.
    """

    gives_words = True

    def __init__(self, tower: HFTextEncoder, context_length: int):
        super().__init__()
        self.transformer: Any = tower.transformer.float()  # a config may say another type
        if hasattr(self.transformer, "layerdrop"):
            self.transformer.layerdrop = 0.0  # each rank would skip other blocks, and ZeRO-3 hang
        self.pooler, self.proj = tower.pooler, tower.proj
        self.pad_id: int = tower.config.pad_token_id
        self.vocab_size, self.context_length = tower.vocab_size, context_length

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode token numbers (B, L) to (sentence vector (B, D), projected outputs of all tokens (B, L, D)).

        The mask of keys is given whole: of one of tokens transformers would ask, and wait for, whether it hides any.
        """
        words = self.word_mask(tokens)
        hidden = torch.finfo(next(self.transformer.parameters()).dtype).min
        mask = torch.where(words, 0.0, hidden)[:, None, None].expand(-1, -1, tokens.shape[1], -1)  # B 1 L L
        out = self.transformer(input_ids=tokens, attention_mask=mask.to(next(self.transformer.parameters()).dtype))
        return self.proj(self.pooler(out, words.long())), self.proj(out.last_hidden_state)

    def word_mask(self, tokens: Tensor) -> Tensor:
        """Mark which of token numbers (B, L) are no padding, (B, L) bool."""
        return tokens != self.pad_id

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the blocks' activations again in the backward pass, or keep them."""
        recompute_blocks(self.transformer, enable)


def recompute_blocks(model: nn.Module, enable: bool) -> None:
    """Have the blocks of a model of transformers compute their activations again in the backward pass, or keep them.

    Its own switch asks for parts that a tower alone lacks, and raises where no block can: such towers keep them.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = enable
            module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
