"""Count what one step costs a rank: its useful FLOPs, and the bytes that it sends into collectives.

A product of (m, k) by (k, n) is 2 m k n FLOPs. Useful is what the gradient of the batch takes once, of what is packed:

    a transformer, t tokens   2 t * (elements of its weight matrices) + 4 * layers * t^2 * width  (QK^T and AV)
    a frame, a segment        convolution of its P patches, transformer over P + [CLS] + type tokens, projection; where [CLS] is
                              pooled, the last block gives that alone; of a clip read at once, of its valid patches
    a caption                 transformer over its tokens up to [EOS], projection
    a tower                   once if it is frozen, three times if it trains (its convolution twice: pixels get no gradient),
                              not at all where frozen vectors stand for it; segments again for their masked view
    a similarity matrix       3 * 2 b N D; one for each term, two more for NCE_aa
    a head                    transformer over the frames and segments of each clip; or over those and the words of each pair of
                              a caption and a clip of the global batch, whose last block gives the first place alone; of
                              average length; or over words, frames and segments, and the scores of all tokens at each
                              word; or a linear layer; it always trains

Left out: norms, activations and softmax. Not useful: padding, activations and tiles computed again, the second forward pass
of accumulation. MFU = useful FLOPs / (seconds * FLOP/s of a large bf16 matrix product, measured when the run starts).
"""

import functools
import math
from typing import Any, TypeVar

import torch
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from clip4vla.config import RunConfig
from clip4vla.data.batch import Batch
from clip4vla.distributed import collectives
from clip4vla.losses import objective
from clip4vla.models import tower_costs
from clip4vla.models.audio_encoder import type_token_weights
from clip4vla.models.audio_trunk import OpenClipVit, TimmVit, vit_of
from clip4vla.models.classifier import Classifier
from clip4vla.models.fusion import GlobalToGlobal, LocalToLocal
from clip4vla.models.model import Model, needed_towers, uses_head
from clip4vla.towers.text import token_mask
from clip4vla.towers.tokenizer import reads_padding

Number = TypeVar("Number", float, Tensor)


def shape(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, also where ZeRO-3 has split it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def elements(module: nn.Module, trained: bool = False) -> int:
    """Count the elements of a module's parameters, or of those that train."""
    return sum(math.prod(shape(p)) for p in module.parameters() if p.requires_grad or not trained)


def towers_run(cfg: RunConfig, vectors: bool) -> list[str]:
    """List the towers that a step runs; vectors: precomputed embeddings replace text and vision."""
    needed = needed_towers(cfg.loss, cfg.model.modalities)
    return [name for name in needed if name == "audio" or not vectors]


def type_tokens(cfg: RunConfig) -> list[int]:
    """Count the type tokens of each view of the sound that the losses and the head need."""
    audio_types: list[str] = []
    if cfg.loss.aa or cfg.loss.at or cfg.loss.av:
        audio_types.append(cfg.model.pretrain_audio_type)
    if cfg.loss.aa:
        audio_types.append(cfg.model.pretrain_audio_type)  # masked
    if uses_head(cfg.loss) and "a" in cfg.model.modalities:
        audio_types.append(cfg.model.audio_type)
    return [type_token_weights(kind, torch.zeros(1, dtype=torch.int64)).shape[1] for kind in audio_types]


class FlopCounter:
    """Counts the useful FLOPs of a run's steps."""

    def __init__(self, model: Model, cfg: RunConfig):
        self.cfg, self.loss, self.head = cfg, cfg.loss, model.head
        self.dim = model.clip_config["embed_dim"]
        # parts of a global batch that are compared each on its own; 1: the whole batch is
        self.batch_parts = cfg.train.gradient_accumulation_steps if cfg.train.negatives == "micro" else 1
        self.audio, self.channels = model.audio, 1 if model.spectrogram.channels == "mono" else 3
        self.type_tokens, self.model = type_tokens(cfg), model

    @functools.cached_property
    def per_frame(self) -> float:
        """FLOPs of a frame."""
        vision = self.model.vision
        if not has_formula(vision):
            return tower_costs.picture_flops(self.model)
        vit = vit_of(vision)
        return float(_picture(vit, 3, torch.tensor(math.prod(vit.grid)), 0))

    @functools.cached_property
    def per_caption(self) -> tuple[float, float, float]:
        """FLOPs of a caption of L tokens, a + b L + c L^2: (a, b, c)."""
        text = self.model.text
        if not has_formula(text):
            return tower_costs.text_flops(self.model)
        passes = 3 if elements(text, trained=True) else 1
        per_token, per_token_pair = _transformer(text.transformer.resblocks)
        return passes * 2 * text.transformer.width * self.dim, passes * per_token, passes * per_token_pair

    def sound_flops(self, micro: Batch) -> float:
        """Count the FLOPs of the audio tower in all views: of each segment, or of the valid patches of each clip at once."""
        vit = self.audio.vit
        if self.cfg.model.audio_span == "segment":
            patches = torch.full((_count_owned(micro.segment_clip, micro),), math.prod(vit.grid))
        else:
            used = (micro.segment_rows / vit.kernel.kernel_size[0]).ceil().long() * vit.grid[1]
            patches = used.new_zeros(len(micro) + 1).index_add(0, micro.segment_clip, used)[:-1]
            patches = patches[patches > 0]
        whole = self.cfg.model.audio_pool == "mean"
        views = (_picture(vit, self.channels, patches.double(), extra, whole) for extra in self.type_tokens)
        projection = 2 * elements(self.audio.projection) * len(patches) * len(self.type_tokens)
        return sum(float(view.sum()) for view in views) + 3 * projection

    def flops(self, micros: list[Batch]) -> float:
        """Count the useful FLOPs of one step's micro-batches on this rank."""
        towers = towers_run(self.cfg, micros[0].text_vectors is not None)
        total = self._similarity_flops(sum(map(len, micros))) + self._head_flops(micros)
        for micro in micros:
            if "audio" in towers:
                total += self.sound_flops(micro)
            if "vision" in towers:
                total += self.per_frame * _count_owned(micro.frame_clip, micro)
            if "text" in towers:
                total += self.caption_flops(micro.on_host.tokens)
        return total

    def caption_flops(self, tokens: Tensor) -> float:
        """Count the FLOPs of the text tower for captions, tokens (B, L)."""
        length, (once, per_token, per_token_pair) = self._read(tokens), self.per_caption
        return once * len(tokens) + per_token * int(length.sum()) + per_token_pair * int(length.square().sum())

    def _read(self, tokens: Tensor) -> Tensor:
        """Count the tokens of each caption (B, L) that its vector depends on, (B,)."""
        text = self.model.text
        if reads_padding(self.model.clip_config.get("text_cfg", {})):
            return tokens.new_full((len(tokens),), tokens.shape[1] + (text.cls_emb is not None))
        return token_mask(text, tokens).sum(1)

    def _similarity_flops(self, rows: int) -> float:
        """Count the FLOPs of the losses' similarity matrices, of `rows` rows on this rank and the columns of all ranks."""
        loss = self.loss
        matrices = bool(loss.at) + bool(loss.av) + 3 * bool(loss.aa) + bool(loss.tv)
        if loss.tm and not isinstance(self.head, LocalToLocal):
            matrices += 1
        return matrices * 6 * rows * (rows * collectives.world_size() / self.batch_parts) * self.dim

    def _head_flops(self, micros: list[Batch]) -> float:
        """Count the FLOPs of the head."""
        if not uses_head(self.loss) or isinstance(self.head, GlobalToGlobal):
            return 0.0
        clips = sum(map(len, micros))
        if isinstance(self.head, Classifier):
            return 3 * 2 * clips * math.prod(shape(self.head.linear.weight))
        media_length = self._count_media(micros) / clips  # frames and segments, on average
        words = sum(int(token_mask(self.model.text, micro.on_host.tokens).sum()) for micro in micros) / clips
        if isinstance(self.head, LocalToLocal):
            length = media_length + (1 if self.head.eos else words)
            pairs = clips * clips * collectives.world_size() / self.batch_parts
            return 3 * pairs * _first_place(self.head.encoder.blocks, length)
        written = max(0, words - 1) if self.loss.caption else 0
        length = media_length + written
        per_token, per_token_pair = _transformer(self.head.encoder.blocks)
        encoder = 3 * (per_token * length + per_token_pair * length**2)
        embedding = self.model.text.token_embedding.weight  # of the captioner too, whose gradient it may not need
        scores = 2 * shape(embedding)[1] * (3 * self.dim + (2 + embedding.requires_grad) * shape(embedding)[0])
        return clips * (encoder + scores * written)

    def _count_media(self, micros: list[Batch]) -> int:
        """Count the frames and segments that the head reads."""
        count = 0
        for micro in micros:
            if "v" in self.cfg.model.modalities:
                count += _count_owned(micro.frame_clip, micro)
            if "a" in self.cfg.model.modalities:
                count += _count_owned(micro.segment_clip, micro)
        return count


def has_formula(tower: nn.Module) -> bool:
    """Tell whether a text or vision tower is one whose structure is known here; what others take is measured."""
    return isinstance(tower, TextTransformer) or (isinstance(tower, VisionTransformer) and tower.attn_pool is None)


def _count_owned(owner: Tensor, micro: Batch) -> int:
    """Count the frames or segments, of clip owner (n,), that are no padding."""
    return int((owner < len(micro)).sum())


def _transformer(blocks: nn.ModuleList | nn.Sequential) -> tuple[float, float]:
    """Count forward FLOPs of a sequence: (for each token, for each pair of tokens)."""
    weights = sum(math.prod(shape(p)) for p in blocks.parameters() if len(shape(p)) == 2)
    each: list[Any] = list(blocks)
    return 2 * weights, 4 * sum(block.attn.num_heads * block.attn.head_dim for block in each)


def _first_place(blocks: Any, tokens: Number) -> Number:
    """Count forward FLOPs of sequences of `tokens` tokens, of which the last block computes the first one's output alone."""
    per_token, per_pair = _transformer(blocks[:-1])
    last: Any = blocks[-1]
    width = last.attn.num_heads * last.attn.head_dim
    keys_and_values = 4 * width * (width + 1) * tokens
    return per_token * tokens + per_pair * tokens**2 + keys_and_values + _transformer(blocks[-1:])[0] - 4 * width**2


def _picture(vit: OpenClipVit | TimmVit, channels: int, patches: Tensor, extra: int, whole: bool = False) -> Tensor:
    """Count FLOPs of each of n pictures of `channels` channels and patches (n,), with `extra` tokens after them.

    With gradients if the tower trains. whole: all outputs of the last block are needed, not [CLS] alone.
    """
    width, _, *patch = shape(vit.kernel.weight)
    first = 2 * patches * width * channels * math.prod(patch)
    blocks, tokens = vit.blocks, patches + vit.prefix_tokens + extra
    per_token, per_pair = _transformer(blocks)
    if vit.first_only and not whole:
        rest = _first_place(blocks, tokens)
    else:
        rest = per_token * tokens + per_pair * tokens**2
    rest = rest + _pooled(vit, tokens - extra)
    return 2 * first + 3 * rest if elements(vit.tower, trained=True) else first + rest


def _pooled(vit: OpenClipVit | TimmVit, tokens: Tensor) -> Tensor:
    """Count forward FLOPs of what comes after the blocks: attention pooling of `tokens` tokens, if there is one, projection."""
    if isinstance(vit, OpenClipVit):
        pooling = 0 * tokens if vit.tower.attn_pool is None else _pooler(vit.tower.attn_pool, tokens)
        return pooling + (0 if vit.tower.proj is None else 2 * math.prod(shape(vit.tower.proj)))
    weights = {
        n: shape(m.weight) for n, m in vit.tower.named_modules() if isinstance(m, nn.Linear) and ".blocks." not in n
    }
    keys = sum(2 * math.prod(size) + 4 * size[1] for name, size in weights.items() if name.endswith("attn_pool.kv"))
    return keys * tokens + 2 * sum(
        math.prod(size) for name, size in weights.items() if not name.endswith("attn_pool.kv")
    )


def _pooler(pooler: Any, tokens: Tensor) -> Tensor:
    """Count forward FLOPs of CoCa's attention of learned queries (n, D) to `tokens` tokens of W numbers."""
    (count, dim), width = shape(pooler.query), shape(pooler.ln_k.weight)[0]
    return 4 * count * dim**2 + 4 * (dim * width + count * dim) * tokens


def bytes_sent(model: Model, cfg: RunConfig, stage: int, width: int, sent_width: int, vectors: bool) -> int:
    """Count bytes that a rank passes into collectives in one step (all-gathers and reductions: their input); 0 on one rank.

    The losses' are those of losses/objective.py. T trained parameters give T `sent_width` of gradients, under ZeRO-2 and 3
    for each micro-batch. Weights have w = `width` bytes: ZeRO-1 and 2 gather T w / W of new ones; ZeRO-3 gathers A w / W of
    the A parameters of the towers that run: once a micro-batch as long as A fits into stage3_max_live_parameters and
    stage3_max_reuse_distance; where all micro-batches are embedded first, twice, and what trains a third time (to 3%:
    DeepSpeed also fetches ahead in vain).
    The few bytes of norms, overflows and agreements are left out.
    """
    world, micros = collectives.world_size(), cfg.train.gradient_accumulation_steps
    if world == 1:
        return 0
    trained = elements(model, trained=True)
    batch, dim = cfg.train.batch_size, model.clip_config["embed_dim"]
    scored = bool(cfg.loss.tm) and isinstance(model.head, LocalToLocal)
    total = objective.bytes_sent(cfg.loss, batch // world, batch, dim, scored)
    total += trained * sent_width * (micros if stage >= 2 else 1)
    total += _sequence_bytes(model, cfg, batch, width) if scored else 0
    if stage < 3:
        return total + (trained * width // world if stage else 0)
    run = towers_run(cfg, vectors) + ["head"] * uses_head(cfg.loss)
    weights = sum(elements(getattr(model, name)) for name in run) * width
    twice = micros > 1 and cfg.train.negatives == "global" and bool(objective.required_features(cfg.loss))
    return total + micros * (2 * weights + trained * width if twice else weights) // world


def _sequence_bytes(model: Model, cfg: RunConfig, n: int, width: int) -> int:
    """Count bytes that local_local gathers: own clips' vectors and how many, and the gradient of all ranks' vectors."""
    room = {"v": cfg.model.max_frames, "a": model.spectrogram.max_segments}
    places = sum(room[kind] for kind in cfg.model.modalities)
    vectors = places * model.clip_config["embed_dim"] * width
    return n // collectives.world_size() * (vectors + 8 * len(cfg.model.modalities)) + n * vectors


def matrix_rate(device: torch.device, side: int = 8192, repeats: int = 20) -> float:
    """Measure FLOP/s of bf16 products of (side, side) matrices on a GPU, in about a tenth of a second."""
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        x @ x
    start.record()
    for _ in range(repeats):
        x @ x
    end.record()
    end.synchronize()
    return repeats * 2 * side**3 / (start.elapsed_time(end) / 1000)
