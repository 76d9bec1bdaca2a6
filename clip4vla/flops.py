"""What one step costs a rank: its useful FLOPs, and the bytes that it sends into collectives.

A product of (m, k) by (k, n) is 2 m k n FLOPs. Useful is what the gradient of the batch takes once, of what is packed:

    a transformer, t tokens   2 t * (elements of its weight matrices) + 4 * layers * t^2 * width  (QK^T and AV)
    a frame, a segment        convolution of its P patches, transformer over P + [CLS] + type tokens, projection; where [CLS] is
                              pooled, the last block gives that alone
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

import math
from typing import Any

import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from clip4vla import distributed, losses
from clip4vla.audio_encoder import type_mix
from clip4vla.batch import Batch
from clip4vla.classifier import Classifier
from clip4vla.config import RunConfig
from clip4vla.fusion import GlobalToGlobal, LocalToLocal
from clip4vla.model import Model, needed_towers, uses_head
from clip4vla.towers import pools_first


def shape(parameter: Tensor) -> torch.Size:
    """Of the whole parameter, also where ZeRO-3 has split it."""
    return getattr(parameter, "ds_shape", parameter.shape)


def elements(module: nn.Module, trained: bool = False) -> int:
    """Of all parameters, or of those that train."""
    return sum(math.prod(shape(p)) for p in module.parameters() if p.requires_grad or not trained)


def towers_run(cfg: RunConfig, vectors: bool) -> list[str]:
    """The towers that a step runs; vectors: those of embed.py stand for text and vision."""
    needed = needed_towers(cfg.loss, cfg.model.modalities)
    return [name for name in needed if name == "audio" or not vectors]


class Work:
    """Counts the useful FLOPs of a run's steps."""

    def __init__(self, model: Model, cfg: RunConfig):
        self.cfg, self.loss, self.dim, self.head = cfg, cfg.loss, model.clip_config["embed_dim"], model.head
        self.parts = cfg.train.accumulate if cfg.train.negatives == "micro" else 1
        channels = 1 if model.spectrogram.channels == "mono" else 3
        self.segment = 0.0  # each view of it
        views = [cfg.model.pretrain_type] * (2 if cfg.loss.aa else bool(cfg.loss.at or cfg.loss.av))
        headed = uses_head(cfg.loss) and "a" in cfg.model.modalities
        for audio_type in views + [cfg.model.audio_type] * headed:
            types = type_mix(audio_type, torch.zeros(1, dtype=torch.int64)).shape[1]
            self.segment += _picture(model.audio.trunk, channels, types)
        self.frame = _picture(model.vision, 3, 0)
        passes = 3 if elements(model.text, trained=True) else 1
        self.per_token, self.per_pair = (passes * x for x in _transformer(model.text.transformer.resblocks))
        width = model.text.transformer.width
        self.per_caption = passes * 2 * width * self.dim
        embedding = model.text.token_embedding.weight  # of the captioner too, whose gradient it may not need
        self.per_score = 2 * width * (3 * self.dim + (2 + embedding.requires_grad) * shape(embedding)[0])

    def flops(self, micros: list[Batch]) -> float:
        """Of this rank's micro-batches of one step."""
        run = towers_run(self.cfg, micros[0].text_vectors is not None)
        total = self._nce(sum(map(len, micros))) + self._media(micros)
        for micro in micros:
            total += self.segment * int((micro.segment_clip < len(micro)).sum()) * ("audio" in run)
            total += self.frame * int((micro.frame_clip < len(micro)).sum()) * ("vision" in run)
            total += self._captions(micro.tokens) * ("text" in run)
        return total

    def _captions(self, tokens: Tensor) -> float:
        """tokens (B, L), 0 where there is none."""
        length = (tokens != 0).sum(1)
        blocks = self.per_token * int(length.sum()) + self.per_pair * int(length.square().sum())
        return blocks + self.per_caption * len(tokens)

    def _nce(self, rows: int) -> float:
        loss = self.loss
        matrices = bool(loss.at) + bool(loss.av) + 3 * bool(loss.aa) + bool(loss.tv)
        matrices += bool(loss.tm) * (not isinstance(self.head, LocalToLocal))
        return matrices * 6 * rows * (rows * distributed.world() / self.parts) * self.dim

    def _media(self, micros: list[Batch]) -> float:
        """Of the head."""
        if not uses_head(self.loss) or isinstance(self.head, GlobalToGlobal):
            return 0.0
        if isinstance(self.head, Classifier):
            return 3 * 2 * sum(map(len, micros)) * math.prod(shape(self.head.linear.weight))
        kinds = {"v": "frame_clip", "a": "segment_clip"}
        owners = [(getattr(m, kinds[kind]), len(m)) for m in micros for kind in self.cfg.model.modalities]
        clips = sum(map(len, micros))
        length = sum(int((owner < count).sum()) for owner, count in owners) / clips
        blocks = self.head.encoder.blocks
        words = sum(int((m.tokens != 0).sum()) for m in micros) / clips
        if not isinstance(self.head, LocalToLocal):
            written = max(0, words - 1) if self.loss.caption else 0
            length += written
            per_token, per_pair = _transformer(blocks)
            return clips * (3 * (per_token * length + per_pair * length**2) + self.per_score * written)
        length += 1 if self.head.eos else words
        pairs = clips * clips * distributed.world() / self.parts
        return 3 * pairs * _first_place(blocks, length)


def _transformer(blocks: nn.ModuleList) -> tuple[float, float]:
    """Forward FLOPs (for each token, for each pair of tokens) of a sequence."""
    matrices = sum(math.prod(shape(p)) for p in blocks.parameters() if len(shape(p)) == 2)
    each: list[Any] = list(blocks)
    return 2 * matrices, 4 * sum(block.attn.embed_dim for block in each)


def _first_place(blocks: nn.ModuleList, tokens: float) -> float:
    """Forward FLOPs of a sequence of so many tokens, of which the last block gives the first place alone."""
    per_token, per_pair = _transformer(blocks[:-1])
    last: Any = blocks[-1]
    width = last.attn.embed_dim
    keys_and_values = 4 * width * (width + 1) * tokens
    return per_token * tokens + per_pair * tokens**2 + keys_and_values + _transformer(blocks[-1:])[0] - 4 * width**2


def _picture(tower: VisionTransformer, channels: int, extra: int) -> float:
    """FLOPs of one picture of so many channels, with `extra` tokens behind the patches, gradients included if it trains."""
    patches = math.prod(tower.grid_size)
    width, _, *patch = shape(tower.conv1.weight)
    first = 2 * patches * width * channels * math.prod(patch)
    blocks, tokens = tower.transformer.resblocks, patches + 1 + extra
    per_token, per_pair = _transformer(blocks)
    all_places = per_token * tokens + per_pair * tokens**2
    rest = _first_place(blocks, tokens) if pools_first(tower) else all_places
    rest += 2 * math.prod(shape(tower.proj)) if tower.proj is not None else 0
    return 2 * first + 3 * rest if elements(tower, trained=True) else first + rest


def bytes_sent(model: Model, cfg: RunConfig, stage: int, width: int, vectors: bool) -> int:
    """Bytes that a rank passes into collectives in one step (all-gathers and reductions count their own input); 0 on one rank.

    The losses' are those of losses.py. T trained parameters of `width` bytes give T w of gradients, under ZeRO-2 and 3 for
    each micro-batch; ZeRO-1 and 2 gather T w / W of new weights; ZeRO-3 gathers A w / W of the A parameters of the towers
    that run: once a micro-batch as long as A fits into stage3_max_live_parameters and stage3_max_reuse_distance; where all
    micro-batches are embedded first, twice, and what trains a third time (to 3%: DeepSpeed also fetches ahead in vain).
    The few bytes of norms, overflows and agreements are left out.
    """
    world, micros = distributed.world(), cfg.train.accumulate
    if world == 1:
        return 0
    gradients = elements(model, trained=True) * width
    batch, dim = cfg.train.batch_size, model.clip_config["embed_dim"]
    scored = bool(cfg.loss.tm) and isinstance(model.head, LocalToLocal)
    total = losses.bytes_sent(cfg.loss, batch // world, batch, dim, scored) + gradients * (micros if stage >= 2 else 1)
    total += _sequence_bytes(model, cfg, batch, width) if scored else 0
    if stage < 3:
        return total + (gradients // world if stage else 0)
    run = towers_run(cfg, vectors) + ["head"] * uses_head(cfg.loss)
    weights = sum(elements(getattr(model, name)) for name in run) * width
    twice = micros > 1 and cfg.train.negatives == "global" and bool(losses.features_used(cfg.loss))
    return total + micros * (2 * weights + gradients if twice else weights) // world


def _sequence_bytes(model: Model, cfg: RunConfig, n: int, width: int) -> int:
    """What local_local gathers of own clips, vectors and which of them are there, and the gradient of everybody's vectors."""
    room = {"v": cfg.model.max_frames, "a": model.spectrogram.max_segments}
    places = sum(room[kind] for kind in cfg.model.modalities)
    vectors = places * model.clip_config["embed_dim"] * width
    return n // distributed.world() * (vectors + places) + n * vectors


def matrix_rate(device: torch.device, side: int = 8192, repeats: int = 20) -> float:
    """FLOP/s of bf16 products of (side, side) matrices on a GPU, as measured in about a tenth of a second."""
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
