"""Heads that compare captions with the frames and segments of clips: the three fusions of Figure 3.

GlobalToGlobal   sentence vector x^g with the mean of the pooled vision and audio vectors
GlobalToLocal    x^g with a Video Temporal Encoding Module over frames and segments, pooled
LocalToLocal     a Fine-grained Cross-modality Fusion Module over words, frames and segments; its first output gives the score

Notation: B clips, C captions, n vectors of one kind (the most of any clip or caption here), T of all kinds, D width.
A key mask is True where there is a vector, and False where there is padding.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip4vla.config import ModelConfig
from clip4vla.data.batch import unpack, upload
from clip4vla.distributed import collectives
from clip4vla.errors import UserError
from clip4vla.towers.attention import own_blocks

TEXT, VISION, AUDIO = range(3)  # rows of the type embedding
TOKENS = {"cpu": 1 << 12, "cuda": 1 << 17}  # in a tile of caption-clip pairs


def must_have_room(cfg: ModelConfig, fingerprint: dict[str, Any]) -> None:
    """Raise UserError if a head has too few positions for the frames of shards with this fingerprint."""
    frames = fingerprint["frames"]["max_frames"]
    if cfg.head != "global_global" and frames > cfg.max_frames:
        raise UserError(f"model.max_frames={cfg.max_frames}: the shards have up to {frames} frames in a clip")


class PaddedSequence(NamedTuple):
    """Holds vectors (B, n, D), not normalised, of one kind: the words of captions, or the frames or segments of clips."""

    kind: int
    vectors: Tensor
    mask: Tensor  # B n bool: False where a vector is padding
    lengths: Tensor | None = None  # B int64, on the CPU: vectors of each row; None: the mask has to be asked

    def row_lengths(self) -> Tensor:
        """Count the vectors of each row, (B,) int64 on the CPU."""
        return self.mask.sum(1).cpu() if self.lengths is None else self.lengths

    def select(self, rows: Tensor) -> "PaddedSequence":
        """Return the rows that `rows` (n,) int64, on the CPU, names, cut after the longest of them."""
        there = upload(rows, self.mask.device)
        chosen = PaddedSequence(self.kind, self.vectors[there], self.mask[there], self.row_lengths()[rows])
        return chosen.cut(0, len(rows))

    def cut(self, first: int, stop: int) -> "PaddedSequence":
        """Return the rows first..stop-1, cut after the longest of them."""
        lengths = self.row_lengths()[first:stop]
        length = int(lengths.max()) if len(lengths) else 0
        return PaddedSequence(self.kind, self.vectors[first:stop, :length], self.mask[first:stop, :length], lengths)


def pad_packed(kind: int, packed: Tensor, lengths: Tensor, most: int | None = None) -> PaddedSequence:
    """Unpack vectors (N, D) of B clips into rows of `most` positions each (default: as needed); see batch.unpack.

    lengths (B,) int64, on the CPU: vectors of each clip.
    """
    most = int(lengths.max()) if most is None else most
    return PaddedSequence(kind, unpack(packed, lengths, most), length_mask(lengths, most, packed.device), lengths)


def length_mask(lengths: Tensor, most: int, device: torch.device) -> Tensor:
    """Mark the first lengths (B,), on the CPU, of `most` positions: (B, most) bool, on the device."""
    return upload(torch.arange(most) < lengths[:, None], device)


def ensure_nonempty(part: PaddedSequence) -> PaddedSequence:
    """Add one position of padding to a sequence (B, 0, D), which an encoder cannot read; return others as they are."""
    if part.mask.shape[1]:
        return part
    vectors = part.vectors.new_zeros(len(part.mask), 1, part.vectors.shape[2])
    return PaddedSequence(part.kind, vectors, part.mask.new_zeros(len(part.mask), 1), part.lengths)


def gather_sequence(part: PaddedSequence) -> PaddedSequence:
    """Gather sequences (B, n, D), n the same on all ranks; their lengths through the CPU, which needs them for tiles."""
    vectors, lengths = collectives.all_gather_with_grad(part.vectors), collectives.all_gather(part.row_lengths())
    mask = length_mask(lengths, vectors.shape[1], vectors.device)
    return PaddedSequence(part.kind, vectors, mask, lengths)


def mean_pool_padded(part: PaddedSequence) -> Tensor:
    """Pool vectors (B, n, D) to unit vectors (B, D), fp32: the mean of unit vectors, normalised; zero where all is padding."""
    unit = F.normalize(part.vectors.float(), dim=-1)
    return F.normalize((unit * part.mask[..., None]).sum(1), dim=-1)


def mean(vectors: list[Tensor], how: str) -> Tensor:
    """Average unit vectors (B, D) of several kinds to (B, D), over the kinds that a clip has (the others are zero).

    how: `normalized` brings the mean to unit length, so that scores are cosines; `raw` leaves it (the authors' code).
    """
    stacked = torch.stack(vectors)
    if how == "normalized":
        return F.normalize(stacked.sum(0), dim=-1)
    kinds = stacked.any(-1).sum(0)
    return stacked.sum(0) / kinds.clamp(min=1)[:, None]


class GlobalToGlobal(nn.Module):
    """Averages the vectors of a clip, without parameters."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.how = cfg.media_mean

    def forward(self, parts: list[PaddedSequence]) -> Tensor:
        """Pool the parts (B, n, D) to media vectors (B, D), which are compared with x^g."""
        return mean([mean_pool_padded(part) for part in parts], self.how)


class FusionTransformer(nn.Module):
    """Encodes sequences of vectors of several kinds, each with an embedding of its position in its kind and of its kind.

    Its blocks start as copies of the text tower's first ones if that has the same width and enough of them, else fresh.
    """

    def __init__(self, text: Any, cfg: ModelConfig, dim: int, segments: int, words: int):
        super().__init__()
        if dim % 64:
            raise UserError(
                f"model.head={cfg.head}: the head needs a width that divides by 64, and model.clip's is {dim}"
            )
        self.max_positions = {TEXT: words, VISION: cfg.max_frames, AUDIO: segments}  # of each kind
        total = sum(self.max_positions.values())
        text_blocks = text.transformer.resblocks if isinstance(text, TextTransformer) else []
        if len(text_blocks) >= cfg.head_layers and text.transformer.width == dim:
            self.blocks = nn.ModuleList(copy.deepcopy(block) for block in text_blocks[: cfg.head_layers])
            copied = text.positional_embedding.detach()[:total]
        else:
            activation = type(text_blocks[0].mlp.gelu) if len(text_blocks) else nn.GELU
            self.blocks = _fresh_blocks(activation, dim, cfg.head_layers)
            copied = torch.zeros(0, dim)
        fresh = 0.01 * torch.randn(total - len(copied), dim)
        self.positional_embedding = nn.Parameter(torch.cat([copied, fresh]))
        self.type_embedding = nn.Parameter(0.01 * torch.randn(3, dim))
        self.dropout = nn.Dropout(cfg.head_dropout)

    def embed(self, parts: list[PaddedSequence]) -> list[PaddedSequence]:
        """Add the embeddings of positions and kinds to parts (B, n, D); each kind has its own range of positions."""
        out, start = [], 0
        for part in parts:
            length = part.vectors.shape[1]
            assert length <= self.max_positions[part.kind], part.vectors.shape
            positions = self.positional_embedding[start : start + length]
            vectors = part.vectors.to(positions.dtype) + positions + self.type_embedding[part.kind]
            out.append(part._replace(vectors=vectors))
            start += self.max_positions[part.kind]
        return out

    def forward(self, x: Tensor, key_mask: Tensor, first_only: bool = False, attn_mask: Tensor | None = None) -> Tensor:
        """Encode embedded x (B, T, D) to outputs (B, T, D), or (B, 1, D) of the first position alone.

        key_mask (B, T) bool: False at padding, which no position attends to.
        attn_mask (T, T) bool: True where a position (row) may attend to another (column).
        """
        rows, length = key_mask.shape
        if not rows or not length:  # attention fails on none, and under ZeRO-3 all ranks must run the head
            mask = key_mask.new_zeros(max(1, rows), max(1, length))
            outputs = self.forward(x.new_zeros(*mask.shape, x.shape[2]), mask, first_only, attn_mask)[:rows]
            return outputs if first_only else outputs[:, :length]
        mask = _attended_keys(key_mask, attn_mask)
        x = self.dropout(x)
        blocks: list[Any] = list(self.blocks)
        *first, last = blocks
        for block in first:
            x = block.run(x, x.shape[1], mask)
        return last.run(x, 1 if first_only else x.shape[1], mask)


class GlobalToLocal(nn.Module):
    """Video Temporal Encoding Module: encodes frames and segments together, and averages the outputs."""

    def __init__(self, text: Any, cfg: ModelConfig, dim: int, segments: int):
        super().__init__()
        self.how = cfg.media_mean
        self.encoder = FusionTransformer(text, cfg, dim, segments, words=0)

    def forward(self, parts: list[PaddedSequence]) -> Tensor:
        """Encode the parts (B, n, D) and pool them by kind to media vectors (B, D), which are compared with x^g."""
        media = concat(self.encoder.embed(parts))
        outputs = self.encoder(media.vectors, media.mask).split([part.mask.shape[1] for part in parts], 1)
        encoded = [part._replace(vectors=output) for part, output in zip(parts, outputs, strict=True)]
        return mean([mean_pool_padded(part) for part in encoded], self.how)


class LocalToLocal(nn.Module):
    """Fine-grained Cross-modality Fusion Module: scores a caption and a clip by encoding their vectors together."""

    def __init__(self, text: Any, cfg: ModelConfig, dim: int, segments: int):
        super().__init__()
        self.eos = cfg.text_tokens == "eos"
        self.encoder = FusionTransformer(text, cfg, dim, segments, words=1 if self.eos else cfg.max_tokens)
        self.score = nn.Linear(dim, 1)

    def words(self, sentence: Tensor, words: PaddedSequence | None) -> PaddedSequence:
        """Choose the vectors of captions to encode: all word outputs (C, n, D), or the unit vector of x^g (C, D) alone."""
        if self.eos:
            vectors = F.normalize(sentence, dim=-1)[:, None]  # as the authors do
            lengths = torch.ones(len(vectors), dtype=torch.int64)
            return PaddedSequence(TEXT, vectors, torch.ones_like(vectors[..., 0], dtype=torch.bool), lengths)
        assert words is not None
        return words

    def forward(self, words: PaddedSequence, parts: list[PaddedSequence]) -> Tensor:
        """Score all pairs of C captions and B clips: (C, B), to be divided by the temperature like cosines.

        Pairs are encoded in tiles of captions and clips of similar length, so that little of a tile is padding. A tile's
        activations are computed again for the gradient: only its inputs stay in memory.
        """
        caption_order = words.row_lengths().argsort()
        clip_order = torch.stack([part.row_lengths() for part in parts]).sum(0).argsort()
        words, parts = words.select(caption_order), [part.select(clip_order) for part in parts]
        device = words.mask.device
        height, width = self._tile_size(device)
        rows = []
        for top in range(0, max(1, len(caption_order)), height):
            tiles = [
                self._score_recomputed(words.cut(top, top + height), [part.cut(left, left + width) for part in parts])
                for left in range(0, max(1, len(clip_order)), width)
            ]
            rows.append(torch.cat(tiles, 1))
        return torch.cat(rows)[upload(caption_order.argsort(), device)][:, upload(clip_order.argsort(), device)]

    def _tile_size(self, device: torch.device) -> tuple[int, int]:
        """Choose how many captions and clips a tile has; the same on all ranks, as ZeRO-3 gathers weights for each tile."""
        tokens = TOKENS.get(device.type, TOKENS["cpu"])
        pairs = max(1, tokens // sum(self.encoder.max_positions.values()))
        captions = max(1, math.isqrt(pairs))
        return captions, pairs // captions

    def _score_recomputed(self, words: PaddedSequence, parts: list[PaddedSequence]) -> Tensor:
        """Score a tile (c, b), whose activations are computed again in the backward pass."""
        if not torch.is_grad_enabled():
            return self._score_tile(words, parts)
        return checkpoint(self._score_tile, words, parts, use_reentrant=False)

    def _score_tile(self, words: PaddedSequence, parts: list[PaddedSequence], first_only: bool = True) -> Tensor:
        """Score all pairs of c captions and b clips at once: (c, b); first_only: the last block gives the first place alone."""
        words, *parts = self.encoder.embed([words, *parts])
        media = concat(parts)
        x = _pair_up(words.vectors, media.vectors)  # cb T D
        key_mask = _pair_up(words.mask, media.mask)  # cb T
        first = self.encoder(x, key_mask, first_only)[:, 0]
        return self.score(first).float().view(words.mask.shape[0], media.mask.shape[0])


Head = GlobalToGlobal | GlobalToLocal | LocalToLocal


def build(text: Any, cfg: ModelConfig, dim: int, segments: int) -> Head:
    """Build the head that cfg.head names, for vectors of width `dim` and clips of up to `segments` segments."""
    if cfg.head == "global_global":
        return GlobalToGlobal(cfg)
    if cfg.head == "global_local":
        return GlobalToLocal(text, cfg, dim, segments)
    return LocalToLocal(text, cfg, dim, segments)


def concat(parts: list[PaddedSequence]) -> PaddedSequence:
    """Concatenate sequences (B, n, D) of several kinds to one (B, T, D), which is given the kind of the first."""
    vectors = torch.cat([part.vectors for part in parts], 1)
    return PaddedSequence(parts[0].kind, vectors, torch.cat([part.mask for part in parts], 1))


def _pair_up(words: Tensor, media: Tensor) -> Tensor:
    """Concatenate each of (c, L, ...) with each of (b, M, ...) to (c * b, L + M, ...); the clip changes fastest."""
    c, b = words.shape[0], media.shape[0]  # len() would be a constant in an exported graph
    words = words[:, None].expand(c, b, *words.shape[1:])
    media = media[None].expand(c, b, *media.shape[1:])
    return torch.cat([words, media], 2).flatten(0, 1)


def _attended_keys(key_mask: Tensor, attn_mask: Tensor | None) -> Tensor:
    """Combine the masks to the keys that are attended to, True: (B, T) by all positions, or with attn_mask (B, T, T).

    A softmax over no key would be NaN: where all is padding it attends to the padding, with attn_mask each to itself.
    """
    if attn_mask is None:
        return key_mask | ~key_mask.any(-1, keepdim=True)
    attended = key_mask[:, None] & attn_mask
    itself = torch.eye(key_mask.shape[1], dtype=torch.bool, device=key_mask.device)
    return attended | (~attended.any(-1, keepdim=True) & itself)


def _fresh_blocks(activation: type[nn.Module], dim: int, layers: int) -> nn.ModuleList:
    """Make blocks of width `dim` as open_clip initialises them."""
    blocks = [ResidualAttentionBlock(dim, dim // 64, act_layer=activation) for _ in range(layers)]
    for block in blocks:
        nn.init.normal_(block.attn.in_proj_weight, std=dim**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=(2 * dim * layers) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * dim) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=(2 * dim * layers) ** -0.5)
    made = nn.ModuleList(blocks)
    own_blocks(made)
    return made
