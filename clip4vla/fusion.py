"""Heads that compare captions with the frames and segments of clips: the three fusions of Figure 3.

GlobalToGlobal   sentence vector x^g with the mean of the pooled vision and audio vectors
GlobalToLocal    x^g with a Video Temporal Encoding Module over frames and segments, pooled
LocalToLocal     a Fine-grained Cross-modality Fusion Module over words, frames and segments; its first output gives the score

Notation: B clips, C captions, n things of one kind (the most of any clip or caption here), T of all kinds, D width.
"""

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clip4vla.config import ModelConfig, UserError

TEXT, VISION, AUDIO = range(3)  # rows of the type embedding
TOKENS = {"cpu": 1 << 12, "cuda": 1 << 17}  # of a tile of caption-clip pairs


class Sequence(NamedTuple):
    """Vectors (B, n, D), not normalised, of one kind: of the words of captions, or the frames or segments of clips."""

    kind: int
    vectors: Tensor
    there: Tensor  # B n bool: the others are padding

    def pick(self, rows: Tensor) -> "Sequence":
        """These rows, without what is padding in all of them."""
        there = self.there[rows]
        most = int(there.sum(1).max()) if len(rows) else 0
        return Sequence(self.kind, self.vectors[rows, :most], there[:, :most])


def sequence(kind: int, packed: Tensor, owner: Tensor, count: int, most: int | None = None) -> Sequence:
    """Vectors (N, D) packed one behind the other, owner (N,) ascending, as `count` rows of `most` places (default: as needed).

    Vectors of owner `count` are padding (Batch.padded).
    """
    each = owner.bincount(minlength=count + 1)
    most = int(each[:count].max()) if most is None else most
    place = torch.arange(len(owner), device=owner.device) - (each.cumsum(0) - each)[owner]
    kept = owner < count
    out = packed.new_zeros(count, most, packed.shape[1])
    out = out.index_put((owner[kept], place[kept]), packed[kept])
    return Sequence(kind, out, torch.arange(most, device=owner.device) < each[:count, None])


def not_empty(part: Sequence) -> Sequence:
    """The same, with a place of padding if there is none at all, which an encoder cannot read."""
    if part.there.shape[1]:
        return part
    vectors = part.vectors.new_zeros(len(part.there), 1, part.vectors.shape[2])
    return Sequence(part.kind, vectors, part.there.new_zeros(len(part.there), 1))


def pooled(part: Sequence) -> Tensor:
    """Unit vectors (B, D), fp32: each thing to unit length, mean, to unit length again; zero where there is none."""
    return F.normalize((F.normalize(part.vectors.float(), dim=-1) * part.there[..., None]).sum(1), dim=-1)


def mean(vectors: list[Tensor], how: str) -> Tensor:
    """Mean (B, D) of unit vectors (B, D) of several kinds, over the kinds that a clip has (the others are zero).

    how: `unit` brings it to unit length, so that scores are cosines; `raw` leaves it (the authors' code).
    """
    total = torch.stack(vectors)
    if how == "unit":
        return F.normalize(total.sum(0), dim=-1)
    return total.sum(0) / total.any(-1).sum(0).clamp(min=1)[:, None]


class GlobalToGlobal(nn.Module):
    """No parameters: what a clip shows and sounds like, on average."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.how = cfg.mean

    def forward(self, parts: list[Sequence]) -> Tensor:
        """Media vectors (B, D) to compare with x^g."""
        return mean([pooled(part) for part in parts], self.how)


class Encoder(nn.Module):
    """A transformer over things of several kinds, each with a position in its kind and a type.

    It starts as the first blocks of the text tower, where that has the same width and enough of them, else fresh.
    """

    def __init__(self, text: TextTransformer, cfg: ModelConfig, dim: int, segments: int, words: int):
        super().__init__()
        if dim % 64:
            raise UserError(
                f"model.fusion={cfg.fusion}: the head needs a width that divides by 64, and model.clip's is {dim}"
            )
        self.room = {TEXT: words, VISION: cfg.max_frames, AUDIO: segments}  # positions of each kind
        old, rows = text.transformer.resblocks, sum(self.room.values())
        if text.transformer.width == dim and len(old) >= cfg.fusion_layers:
            self.blocks = nn.ModuleList(copy.deepcopy(block) for block in old[: cfg.fusion_layers])
            positions = text.positional_embedding.detach()[:rows]
        else:
            self.blocks = _fresh_blocks(old[0], dim, cfg.fusion_layers)
            positions = torch.zeros(0, dim)
        self.positional_embedding = nn.Parameter(torch.cat([positions, 0.01 * torch.randn(rows - len(positions), dim)]))
        self.type_embedding = nn.Parameter(0.01 * torch.randn(3, dim))
        self.dropout = nn.Dropout(cfg.fusion_dropout)

    def embed(self, parts: list[Sequence]) -> list[Sequence]:
        """The same with positions and types added; a kind's positions follow those of the kinds before it."""
        out, start = [], 0
        for part in parts:
            assert part.vectors.shape[1] <= self.room[part.kind], part.vectors.shape
            places = self.positional_embedding[start : start + part.vectors.shape[1]]
            vectors = part.vectors.to(places.dtype) + places + self.type_embedding[part.kind]
            out.append(part._replace(vectors=vectors))
            start += self.room[part.kind]
        return out

    def forward(self, x: Tensor, there: Tensor, first_only: bool = False, unseen: Tensor | None = None) -> Tensor:
        """Outputs (B, T, D), or those of the first place (B, 1, D), of embedded x (B, T, D).

        unseen (T, T) bool: places (rows) that do not see others (columns); without it all see what is there.
        """
        absent = ~there if unseen is None else ~there[:, None] | unseen
        blind = absent.all(-1, keepdim=True)  # what sees nothing sees its padding, or itself: no NaN
        absent = absent & ~(
            blind if unseen is None else blind & torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        )
        x = self.dropout(x)
        for block in self.blocks[:-1]:
            x = _attend(block, x, x, absent)
        return _attend(self.blocks[-1], x[:, :1] if first_only else x, x, absent)


class GlobalToLocal(nn.Module):
    """Video Temporal Encoding Module."""

    def __init__(self, text: TextTransformer, cfg: ModelConfig, dim: int, segments: int):
        super().__init__()
        self.how, self.encoder = cfg.mean, Encoder(text, cfg, dim, segments, words=0)

    def forward(self, parts: list[Sequence]) -> Tensor:
        """Media vectors (B, D) to compare with x^g: outputs pooled by kind, and their mean."""
        embedded = self.encoder.embed(parts)
        x = self.encoder(*joined(embedded)[1:])
        outputs = x.split([part.there.shape[1] for part in parts], 1)
        return mean([pooled(part._replace(vectors=y)) for part, y in zip(parts, outputs, strict=True)], self.how)


class LocalToLocal(nn.Module):
    """Fine-grained Cross-modality Fusion Module."""

    def __init__(self, text: TextTransformer, cfg: ModelConfig, dim: int, segments: int):
        super().__init__()
        self.eos = cfg.words == "eos"
        self.encoder = Encoder(text, cfg, dim, segments, words=1 if self.eos else cfg.max_tokens)
        self.score = nn.Linear(dim, 1)

    def words(self, sentence: Tensor, words: Sequence | None) -> Sequence:
        """What of captions is read: all their word outputs, or x^g (C, D) alone, brought to unit length as the authors do."""
        if self.eos:
            vectors = F.normalize(sentence, dim=-1)[:, None]
            return Sequence(TEXT, vectors, torch.ones_like(vectors[..., 0], dtype=torch.bool))
        assert words is not None
        return words

    def forward(self, words: Sequence, parts: list[Sequence]) -> Tensor:
        """Scores (C, B) of captions and clips, to be divided by the temperature like cosines.

        In tiles of some TOKENS, whose activations are computed again for the gradient: what grows with C B is their inputs.
        """
        lengths = torch.stack([part.there.sum(1) for part in parts]).sum(0)
        captions, clips = words.there.sum(1).argsort(), lengths.argsort()
        pairs = max(
            1, TOKENS.get(words.there.device.type, TOKENS["cpu"]) // sum(self.encoder.room.values())
        )  # as many tiles on any rank: ZeRO-3
        height = max(1, math.isqrt(pairs))
        strips = [
            torch.cat([self._pick(words, parts, rows, columns) for columns in clips.split(pairs // height)], 1)
            for rows in captions.split(height)
        ]
        return torch.cat(strips)[captions.argsort()][:, clips.argsort()]

    def _pick(self, words: Sequence, parts: list[Sequence], rows: Tensor, columns: Tensor) -> Tensor:
        """The tile of these captions and clips, which are of like length, so that little of it is padding."""
        chosen = [words.pick(rows), *(part.pick(columns) for part in parts)]
        flat, kinds = [tensor for part in chosen for tensor in part[1:]], [part.kind for part in chosen]
        if not torch.is_grad_enabled():
            return self._tile(*flat, kinds=kinds)
        return checkpoint(self._tile, *flat, kinds=kinds, use_reentrant=False)

    def _tile(self, *flat: Tensor, kinds: list[int]) -> Tensor:
        """Scores (c, b) of all pairs of c captions and b clips; flat: vectors and there of the words and of each part."""
        words, *parts = (Sequence(kind, *flat[2 * i : 2 * i + 2]) for i, kind in enumerate(kinds))
        c, b = len(words.there), len(parts[0].there)
        words, *parts = self.encoder.embed([words, *parts])
        _, media, there = joined(parts)
        x = torch.cat([_pairs(words.vectors[:, None], b, 1), _pairs(media[None], c, 0)], 2).flatten(0, 1)  # cb T D
        seen = torch.cat([_pairs(words.there[:, None], b, 1), _pairs(there[None], c, 0)], 2).flatten(0, 1)
        return self.score(self.encoder(x, seen, first_only=True)[:, 0]).float().view(c, b)


Head = GlobalToGlobal | GlobalToLocal | LocalToLocal


def build(text: TextTransformer, cfg: ModelConfig, dim: int, segments: int) -> Head:
    """The head that cfg.fusion names, for clips of so many segments at most."""
    if cfg.fusion == "global_global":
        return GlobalToGlobal(cfg)
    return (GlobalToLocal if cfg.fusion == "global_local" else LocalToLocal)(text, cfg, dim, segments)


def _attend(block: ResidualAttentionBlock, x: Tensor, keys: Tensor, absent: Tensor) -> Tensor:
    """A block of CLIP's for the places x (B, q, D) of a sequence keys (B, T, D), of which they are the first.

    absent: keys that are not seen, (B, T) by all places or (B, q, T).
    """
    y = block.ln_1(keys)
    if absent.ndim == 2:
        mask = {"key_padding_mask": absent}
    else:
        mask = {"attn_mask": absent.repeat_interleave(block.attn.num_heads, 0)}
    x = x + block.ls_1(block.attn(y[:, : x.shape[1]], y, y, need_weights=False, **mask)[0])
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _fresh_blocks(like: ResidualAttentionBlock, dim: int, layers: int) -> nn.ModuleList:
    """Blocks as open_clip initialises them, with the activation of another one."""
    blocks = [ResidualAttentionBlock(dim, dim // 64, act_layer=type(like.mlp.gelu)) for _ in range(layers)]
    for block in blocks:
        nn.init.normal_(block.attn.in_proj_weight, std=dim**-0.5)
        nn.init.normal_(block.attn.out_proj.weight, std=(2 * dim * layers) ** -0.5)
        nn.init.normal_(block.mlp.c_fc.weight, std=(2 * dim) ** -0.5)
        nn.init.normal_(block.mlp.c_proj.weight, std=(2 * dim * layers) ** -0.5)
    return nn.ModuleList(blocks)


def joined(parts: list[Sequence]) -> Sequence:
    """All kinds, one behind the other; it has the first one's name."""
    return Sequence(parts[0].kind, *(torch.cat(tensors, 1) for tensors in list(zip(*parts, strict=True))[1:]))


def _pairs(x: Tensor, count: int, along: int) -> Tensor:
    return x.expand(*(count if i == along else -1 for i in range(x.ndim)))
