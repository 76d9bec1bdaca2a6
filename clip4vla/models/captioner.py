"""Predict a caption's next word from the words before it, frames and segments: the Multimodal Caption Generator (6)(7).

The text tower, which is causal, reads the words so far; an encoder reads its outputs, frames and segments, where words
attend to the words before them and all media, and media never attend to words; a dense layer and a norm turn outputs at
words into what the token embeddings are compared with.

Notation: B clips, R captions, L words, M frames and segments, D width of the encoder, W of the text tower, V tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from clip4vla.config import ModelConfig
from clip4vla.data.batch import upload
from clip4vla.errors import UserError
from clip4vla.models.fusion import TEXT, FusionTransformer, PaddedSequence, concat
from clip4vla.towers.attention import Block, KVCache
from clip4vla.towers.text import projected


class Captioner(nn.Module):
    """Generates captions from the outputs of the text tower, whose token embeddings (V, W) are its output weights too."""

    def __init__(self, text: TextTransformer, cfg: ModelConfig, dim: int, segments: int):
        super().__init__()
        _must_be_causal(text)
        self.encoder = FusionTransformer(text, cfg, dim, segments, words=cfg.max_tokens)
        self.dense = nn.Linear(dim, text.width)
        self.activation = type(text.transformer.resblocks[0].mlp.gelu)()
        self.norm = nn.LayerNorm(text.width, eps=1e-12)  # as the authors
        self.bias = nn.Parameter(torch.zeros(text.vocab_size))

    def forward(self, words: PaddedSequence, parts: list[PaddedSequence], chosen: Tensor, embedding: Tensor) -> Tensor:
        """Score the tokens that may follow each of the n chosen words, (n, V), fp32; chosen (B, L) bool, on the CPU.

        words: outputs of the text tower; parts: of the frames and segments of their clips.
        """
        x = self.encode_words(words, parts)
        places = upload(chosen.flatten().nonzero()[:, 0], x.device)
        return self.scores(x.flatten(0, 1)[places], embedding)

    def encode_words(self, words: PaddedSequence, parts: list[PaddedSequence]) -> Tensor:
        """Encode the words (B, L, D) with the media of their clips to the encoder's outputs at the words, (B, L, D)."""
        embedded = concat(self.encoder.embed([words, *parts]))
        length, total = words.mask.shape[1], embedded.mask.shape[1]
        attn_mask = torch.ones(total, total, dtype=torch.bool, device=words.mask.device)
        attn_mask[:length, :length].tril_()
        attn_mask[length:, :length] = False
        return self.encoder(embedded.vectors, embedded.mask, attn_mask=attn_mask)[:, :length]

    def scores(self, outputs: Tensor, embedding: Tensor) -> Tensor:
        """Score all tokens (..., V), fp32, from the encoder's outputs at words (..., D)."""
        x = self.norm(self.activation(self.dense(outputs)))
        return F.linear(x, embedding.to(x.dtype), self.bias.to(x.dtype)).float()


class CaptionDecoder:
    """Lengthens R captions, `copies` of each clip, by a token at a time.

    Frames and segments are encoded once. Every block keeps keys and values of what it has read, so a step costs one word.
    """

    def __init__(self, text: TextTransformer, head: Captioner, parts: list[PaddedSequence], copies: int):
        self.text, self.head, self.length = text, head, 0
        # media's positions come after those of words
        no_words = PaddedSequence(TEXT, parts[0].vectors[:, :0], parts[0].mask[:, :0])
        media = concat(head.encoder.embed([no_words, *parts]))
        x, there = media.vectors, media.mask
        mask = there[:, None] | torch.eye(there.shape[1], dtype=torch.bool, device=there.device)  # B M M
        self.mask = there.repeat_interleave(copies, 0)
        self.encoded: list[KVCache] = []  # of each of the encoder's blocks
        block: Any  # a Block
        for block in head.encoder.blocks:
            x, (keys, values) = block.extend(x, x.shape[1], mask)
            self.encoded.append((keys.repeat_interleave(copies, 0), values.repeat_interleave(copies, 0)))
        self.read: list[KVCache | None] = [None] * len(text.transformer.resblocks)  # of each of the text tower's

    def step(self, token: Tensor) -> Tensor:
        """Score what may follow `token` (R,), the next one of each caption, (R, V), fp32; the first is [SOS]."""
        embedding = self.text.token_embedding.weight  # not the module, after which ZeRO-3 would take it away again
        x = F.embedding(token, embedding)[:, None].to(self.text.transformer.get_cast_dtype())
        x = x + self.text.positional_embedding[self.length].to(x.dtype)
        block: Any  # a Block
        for i, block in enumerate(self.text.transformer.resblocks):
            x, self.read[i] = block.extend(x, 1, None, self.read[i])
        encoder = self.head.encoder
        x = projected(self.text, x).to(encoder.type_embedding.dtype)
        x = x + encoder.positional_embedding[self.length] + encoder.type_embedding[TEXT]
        self.mask = F.pad(self.mask, (0, 1), value=True)
        for i, block in enumerate(encoder.blocks):
            x, self.encoded[i] = block.extend(x, 1, self.mask, self.encoded[i])
        self.length += 1
        return self.head.scores(x[:, 0], embedding)

    def reorder_cache(self, rows: Tensor) -> None:
        """Continue with those of the R captions that `rows` (R,) names, each of the clip that it was of."""
        self.encoded = [(keys[rows], values[rows]) for keys, values in self.encoded]
        self.read = [past and (past[0][rows], past[1][rows]) for past in self.read]


def _must_be_causal(text: TextTransformer) -> None:
    """Raise UserError for text towers whose words attend to the words after them, or whose blocks are not CLIP's own."""
    own = isinstance(text, TextTransformer) and text.attn_mask is not None and text.cls_emb is None
    if not own or any(type(block) is not Block for block in text.transformer.resblocks):
        raise UserError(
            "model.head=captioner: needs a CLIP whose text tower is causal, such as OpenAI's; this one's is not"
        )
