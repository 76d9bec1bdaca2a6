"""Estimate the memory that a training step takes of a rank's device, in bytes, by what it is for.

    state         weights, gradients, optimizer. ZeRO divides by the ranks: the optimizer's state from stage 1 on, gradients
                  from 2 on, weights in 3 (Rajbhandari et al. 2020, figure 1)
    activations   what the backward pass needs of the towers that train and of the head; what a pass makes on its way; pictures
    buckets       in which ZeRO reduces gradients: reduce_bucket_size, twice with overlap_comm; several ranks send a copy
    gathered      features of all ranks, and tiles of the similarity matrices
    runtime       on a GPU, outside of torch's allocator: CUDA's context, NCCL, DALI; and the batches made ahead

A step takes the most in its forward pass, in the loss, in the backward pass, or in the optimizer's step: `moments` has all of
them. tests/training/test_sizes.py holds the largest to 5% of steps simulated at full size.
"""

import itertools
import math
from typing import Any, NamedTuple

import torch
from open_clip.transformer import QuickGELU

from clip4vla.config import RunConfig
from clip4vla.data.batch import Batch
from clip4vla.distributed import collectives
from clip4vla.losses import contrastive, objective
from clip4vla.models import tower_costs
from clip4vla.models.audio_trunk import OpenClipVit, TimmVit, vit_of
from clip4vla.models.classifier import Classifier
from clip4vla.models.fusion import GlobalToGlobal, LocalToLocal
from clip4vla.models.model import uses_head
from clip4vla.towers.text import token_mask
from clip4vla.training import engine, flops, train_step
from clip4vla.training.run_setup import RunSetup

# Activations, in widths of a token. A block keeps inputs and outputs of norms, attention and the MLP's activation
BLOCK = 16
LAST_BLOCK = 4  # kept by one that gives the first token's output alone: input, norm, key and value
FORWARD, QUICK_FORWARD = 11, 15  # made on the way through a block without gradient; QuickGELU has an MLP's width more
BACKWARD, QUICK_BACKWARD = 5, 9  # made on the way through a block's MLP, backward; QuickGELU multiplies its input again
LAST_BACKWARD = 2  # made by that of the last block, beside what it keeps: gradients of key and value
POOLED = 12  # around a head's blocks: dropout, sums with embeddings, and fp32 vectors that are pooled
# bytes of a pair of clips whose scores are there: logits with and without a mask, their exp or the scores, the mask. Of a tile
# that is where torch.compile has no compiler; what it makes of losses/tiles.py takes 4
PAIR = 13
# MiB outside of torch's allocator on a GPU; a dry run shows beside them what is really taken
CONTEXT = 600  # CUDA's context with the kernels of torch, cuBLAS and cuDNN
NCCL = 400  # a communicator's buffers: up to 32 channels, of 4 MiB and more to each neighbour
DALI = 600  # nvJPEG's state and the pictures that it decodes


class Memory(NamedTuple):
    """Holds the bytes that a rank's device needs at one moment of a step, by what they are for."""

    moment: str
    state: float
    activations: float
    buckets: float
    gathered: float
    runtime: float

    @property
    def total(self) -> float:
        """Sum all parts."""
        return sum(self[1:])


class _State(NamedTuple):
    """Holds bytes of weights, gradients and optimizer as DeepSpeed 0.19 allocates them (stage_1_and_2.py, stage3.py)."""

    lasting: float  # weights and the optimizer's state
    earlier: float  # gradients that micro-batches before left
    reduced: float  # gradients at the end of the backward pass
    growing: (
        float  # gradients of all that trains, which come one by one where ZeRO does not reduce them on the way; else 0
    )
    stepping: float  # gradients and their copies in the optimizer's step
    waiting: float  # buckets outside of the backward pass
    buckets: float
    sent: float  # copies of them
    largest: float  # of all gradients


class Pass(NamedTuple):
    """Holds bytes of one module's passes, and how many parameters they give gradients."""

    kept: float  # from the forward pass to the backward pass
    forward: float  # most in the forward pass
    backward: float  # most in the backward pass beside `kept`
    trained: int


def state(setup: RunSetup) -> float:
    """Count bytes of weights, gradients and the optimizer's state on a rank's device, by ZeRO's stage and offloading."""
    world, stage, width = collectives.world_size(), setup.stage, setup.width
    gradients = 0.0 if _offloads(setup, "optimizer") else flops.elements(setup.model, trained=True) * width
    return _lasting(setup) + gradients / (world if stage >= 2 else 1)


def _lasting(setup: RunSetup) -> float:
    """Count bytes of weights and of the optimizer's state: two moments, and fp32 weights beside those of 16 bits."""
    world, stage, width = collectives.world_size(), setup.stage, setup.width
    weights = flops.elements(setup.model) * width / (world if stage == 3 else 1)
    moments = flops.elements(setup.model, trained=True) * (12 if width == 2 or stage else 8) / (world if stage else 1)
    sums = flops.elements(setup.model, trained=True) * 4 if _sums_whole(setup) else 0
    return weights * (not _offloads(setup, "param")) + moments * (not _offloads(setup, "optimizer")) + sums


def _sums_whole(setup: RunSetup) -> bool:
    """Tell whether each rank sums whole gradients in fp32, as DeepSpeed's BF16_Optimizer does under ZeRO-1."""
    sums = setup.ds.get("data_types", {}).get("grad_accum_dtype")
    return setup.precision == "bf16" and setup.stage == 1 and sums == "fp32" and not _offloads(setup, "optimizer")


def _offloads(setup: RunSetup, what: str) -> bool:
    return f"offload_{what}" in setup.ds.get("zero_optimization", {})


def estimate(cfg: RunConfig, setup: RunSetup, micros: list[Batch]) -> Memory:
    """Estimate what a step of these micro-batches takes of a rank at the moment that takes the most."""
    return max(moments(cfg, setup, micros), key=lambda memory: memory.total)


def moments(cfg: RunConfig, setup: RunSetup, micros: list[Batch]) -> list[Memory]:
    """Estimate what a step of these micro-batches takes of a rank at each moment."""
    zero, passes = _zero(cfg, setup), passes_of(cfg, setup, max(micros, key=_pictures))
    kept = [sum(p.kept for p in passes[:i]) for i in range(len(passes) + 1)]  # by the passes before each
    forward = max(before + p.forward for before, p in zip(kept, passes, strict=False))
    alone = len(micros) > 1 and train_step.embeds_first(cfg)  # the loss, before any pass with gradient
    gathered, tiles = _loss(cfg, setup, sum(map(len, micros)) if alone else len(micros[0]))
    inputs, resident = float(sum(map(_pictures, micros))), zero.lasting + zero.earlier
    rows = [
        ("forward pass", resident, forward, zero.waiting, 0.0),
        ("loss", resident, 0.0 if alone else kept[-1], zero.waiting, max(2 * gathered, gathered + tiles)),
    ]
    done, trained = 0, sum(p.trained for p in passes)
    for i, p in reversed(list(enumerate(passes))):
        gradients = max(zero.earlier, zero.growing * done / max(1, trained))
        if done and not zero.growing:
            gradients = zero.reduced
        rows.append(("backward pass", zero.lasting + gradients, kept[i + 1] + p.backward, zero.buckets, 0.0))
        done += p.trained
    last = float(zero.largest)  # a gradient beside those in the buckets
    rows.append(("backward pass", zero.lasting + max(zero.growing, zero.reduced), last, zero.buckets, 0.0))
    rows.append(("backward pass", zero.lasting + zero.reduced, last, zero.buckets + zero.sent, 0.0))
    rows.append(("optimizer's step", zero.lasting + zero.stepping, 0.0, zero.waiting, 0.0))
    runtime = _runtime(cfg, setup, inputs)
    return [Memory(name, held, inputs + acts, buckets, more, runtime) for name, held, acts, buckets, more in rows]


def _pictures(micro: Batch) -> int:
    """Count the bytes of a micro-batch's segments and frames."""
    return micro.segments.nbytes + micro.frames.nbytes


def _zero(cfg: RunConfig, setup: RunSetup) -> _State:
    """Count what the merged ds.json makes of weights, gradients, optimizer and buckets."""
    zero, world, width = setup.ds.get("zero_optimization", {}), collectives.world_size(), setup.width
    several = cfg.train.gradient_accumulation_steps > 1
    trained = flops.elements(setup.model, trained=True)
    own = trained * (4 if setup.ds.get("data_types", {}).get("grad_accum_dtype") == "fp32" else width)
    groups = [[math.prod(flops.shape(p)) for p in g["params"]] for g in engine.parameter_groups(setup.model, {})]
    group, largest = max(map(sum, groups)) / world, max(map(max, groups)) * width
    bucket = int(zero.get("reduce_bucket_size", 5e8)) * width
    contiguous = zero.get("contiguous_gradients", True)
    sent = min(bucket, own) * (3 if setup.ds.get("communication_data_type") == "fp32" else 1)
    sent *= world > 1 or not contiguous
    copied = group * (width + 4) if width == 2 else group * 4  # a group's gradients side by side, and in fp32
    lasting, part = _lasting(setup), own / world
    if _sums_whole(setup):  # beside bf16 gradients that stay; reduced in copies of up to 500 million
        own, sent = trained * width, 4 * min(trained, 500_000_000)
        return _State(lasting, own, own, own, own, 0, 0, sent, largest)
    if setup.stage == 0:
        return _State(lasting, own * several, own, own, own + trained * 4 * (width == 2), 0, 0, sent, largest)
    if setup.stage == 3:
        fetched = 0 if world == 1 else min(_elements_run(cfg, setup), int(zero.get("stage3_max_live_parameters", 1e9)))
        part = 0 if _offloads(setup, "optimizer") else part
        return _State(
            lasting + fetched * width, part, part, 0, part + copied * (part > 0), bucket, bucket, sent, largest
        )
    part = sum(map(_touched, groups)) * own / trained
    buckets = bucket * contiguous * (2 if zero.get("overlap_comm") else 1)
    if _offloads(setup, "optimizer"):  # gradients go to the CPU, through memory for the largest parameter's
        return _State(lasting + largest, 0, 0, 0, 0, 0, buckets, sent, largest)
    if setup.stage == 2:
        return _State(lasting, part * several, part * (1 + several), 0, part + copied, 0, buckets, sent, largest)
    if contiguous and zero.get("overlap_comm") and not several:  # reduced on the way
        return _State(lasting, 0, part, 0, part + copied, 0, buckets, sent, largest)
    reduced = part + own - min(bucket, own) if contiguous else own
    return _State(lasting, own * several, reduced, own, part + copied, buckets * several, buckets, sent, largest)


def _touched(sizes: list[int]) -> int:
    """Count the elements of those of a group's parameters that lie in this rank's part of it, wholly or not."""
    part = -(-sum(sizes) // collectives.world_size())
    start, ends = collectives.rank() * part, itertools.accumulate(sizes)
    return sum(size for size, end in zip(sizes, ends, strict=True) if start < end and end - size < start + part)


def _elements_run(cfg: RunConfig, setup: RunSetup) -> int:
    """Count the parameters of what a step runs."""
    run = flops.towers_run(cfg, bool(setup.vectors)) + ["head"] * uses_head(cfg.loss)
    return sum(flops.elements(getattr(setup.model, name)) for name in run)


def _loss(cfg: RunConfig, setup: RunSetup, clips: int) -> tuple[float, float]:
    """Count bytes of (features gathered from all ranks, tiles of their products) for `clips` clips of this rank."""
    total, dim = clips * collectives.world_size(), setup.model.clip_config["embed_dim"]
    names = objective.required_features(cfg.loss)
    if isinstance(setup.model.head, LocalToLocal) and cfg.loss.tm:
        return 0.0, float(PAIR * total**2)
    if not names:
        return 0.0, 0.0
    gathered = 4 * total * dim * len(names) * (collectives.world_size() > 1)
    return float(gathered), float(PAIR * min(clips * total, contrastive.TILE[setup.device.type]))


def _runtime(cfg: RunConfig, setup: RunSetup, inputs: float) -> float:
    """Count bytes outside of torch's allocator on a GPU, and of the batches that the loader has there ahead; 0 on a CPU."""
    if setup.device.type != "cuda":
        return 0.0
    ahead = inputs / cfg.train.gradient_accumulation_steps * (cfg.data.prefetch + 1)
    return float((CONTEXT + DALI + NCCL * (collectives.world_size() > 1)) << 20) + ahead


def passes_of(cfg: RunConfig, setup: RunSetup, micro: Batch) -> list[Pass]:
    """Count what the modules that a micro-batch runs keep and make, in the order of the forward pass."""
    model, run = setup.model, flops.towers_run(cfg, bool(setup.vectors))
    count = {"text": _text, "vision": _vision, "audio": _audio}
    passes = [count[name](cfg, setup, micro) for name in ("text", "vision", "audio") if name in run]
    if uses_head(cfg.loss) and not isinstance(model.head, GlobalToGlobal | Classifier):
        passes.append(_head(cfg, setup, micro))
    return passes


def _text(cfg: RunConfig, setup: RunSetup, micro: Batch) -> Pass:
    tower = setup.model.text
    length = setup.model.cfg.max_tokens if cfg.loss.train_on_padding else micro.tokens.shape[1]
    if not flops.has_formula(tower):
        return _measured(cfg, setup, tower, tower_costs.text_memory, len(micro), length)
    return _blocks(cfg, setup, tower, len(micro) * length, masked=True)


def _vision(cfg: RunConfig, setup: RunSetup, micro: Batch) -> Pass:
    """Count of frames (F, 3, 224, 224): normalised in fp32, twice at once, before they have a weight's width."""
    tower, numbers = setup.model.vision, math.prod(micro.frames.shape)
    if not flops.has_formula(tower):
        measured = _measured(cfg, setup, tower, tower_costs.picture_memory, len(micro.frames))
        return measured._replace(forward=max(8.0 * numbers, measured.forward))
    vit = vit_of(tower)
    tokens = len(micro.frames) * (math.prod(vit.grid) + vit.prefix_tokens)
    blocks = _blocks(cfg, setup, vit, tokens, vit.first_only)
    pixels = numbers * setup.width
    patches = pixels * vit.kernel.weight.requires_grad  # kept for its gradient
    return blocks._replace(kept=blocks.kept + patches, forward=max(8 * numbers, blocks.forward + pixels + patches))


def _measured(cfg: RunConfig, setup: RunSetup, tower: Any, measure: Any, *items: Any) -> Pass:
    """Measure a tower's passes over these items."""
    dtype = torch.float32 if setup.width == 4 else torch.bfloat16
    taken = measure(setup.model, *items, dtype, cfg.train.activation_checkpointing)
    return Pass(taken.kept, taken.forward, taken.backward, flops.elements(tower, trained=True))


def _audio(cfg: RunConfig, setup: RunSetup, micro: Batch) -> Pass:
    """Count of segments (S, C, 224, 224) in all views: decibels, views, and views side by side, fp32, outlast the blocks."""
    vit, extra = setup.model.audio.vit, flops.type_tokens(cfg)
    numbers = math.prod(micro.segments.shape)
    decibels = 4 * numbers * (1 + 2 * len(extra))
    if not flops.has_formula(vit.tower):
        measured = _measured(cfg, setup, vit.tower, tower_costs.audio_memory, micro, extra)
        return measured._replace(forward=measured.forward + decibels)
    patches = math.prod(vit.grid)
    sequences, length = len(micro.segments), patches
    if cfg.model.audio_span == "clip":
        sequences, length = len(micro), patches * _longest(micro.segment_clip, micro)
    tokens = sequences * sum(length + vit.prefix_tokens + count for count in extra)
    first_only = vit.first_only and cfg.model.audio_pool == "tower"
    blocks = _blocks(cfg, setup, vit, tokens, first_only, masked=cfg.model.audio_span == "clip")
    pixels = numbers * len(extra) * setup.width
    kept = pixels * vit.kernel.weight.requires_grad
    forward = blocks.forward + kept + pixels + decibels
    return blocks._replace(kept=blocks.kept + kept, forward=forward)


def _blocks(
    cfg: RunConfig, setup: RunSetup, tower: Any, tokens: int, first_only: bool = False, masked: bool = False
) -> Pass:
    """Count of a tower's, or a head's, blocks over `tokens` tokens.

    first_only: the last block gives each sequence's first output alone. masked: attention's output is there twice.
    """
    if isinstance(tower, OpenClipVit | TimmVit):
        tower, blocks = tower.tower, tower.blocks
    else:
        blocks = tower.encoder.blocks if tower is setup.model.head else tower.transformer.resblocks
    learning = [block for block in blocks if flops.elements(block, trained=True)]
    trained = flops.elements(tower, trained=True)
    first: Any = blocks[0]
    one = float(first.attn.num_heads * first.attn.head_dim * setup.width * tokens)  # one width
    quick = any(isinstance(module, QuickGELU) for module in first.modules())
    there, way = (QUICK_FORWARD * one, QUICK_BACKWARD * one) if quick else (FORWARD * one, BACKWARD * one)
    if not learning:
        return Pass(0.0, there, 0.0, trained)
    each = (BLOCK + masked) * one + (4 * first.attn.num_heads + 16) * tokens  # statistics of softmax and norms are fp32
    last, after = (LAST_BLOCK * one, 0.0) if first_only else (each, 2 * one)
    if cfg.train.activation_checkpointing and tower is not setup.model.head:
        kept = (1 + len(learning)) * one + after
        return Pass(kept, kept + there - one, each - 2 * one + way - after, trained)
    kept = one + (len(learning) - 1) * each + last + after
    back = max(LAST_BACKWARD * one, way - last) if first_only else way - after
    return Pass(kept, kept + (1 if first_only else 2) * one, back, trained)


def _head(cfg: RunConfig, setup: RunSetup, micro: Batch) -> Pass:
    """Count of a head's transformer over words, frames and segments, of which each sequence has as many as the longest."""
    model, width, lengths = setup.model, setup.width, _lengths(cfg, micro)
    if isinstance(model.head, LocalToLocal):
        return _tiles(cfg, setup, micro, lengths)
    targets = model.caption_targets(micro, cfg.loss)[1] if cfg.loss.caption else None
    length = int(lengths.amax(1).sum()) + (0 if targets is None else targets.shape[1])
    blocks = _blocks(cfg, setup, model.head, len(micro) * length, masked=True)
    kept = blocks.kept + POOLED * model.clip_config["embed_dim"] * width * len(micro) * length
    if targets is None:
        return blocks._replace(kept=kept, forward=kept)
    layers = model.head.encoder.blocks
    masks = len(layers) * layers[0].attn.num_heads * len(micro) * length**2 * width  # one for each head
    scores = 4.0 * int(targets.sum()) * model.text.vocab_size  # log-probabilities of all tokens at each word
    kept += masks + scores
    return Pass(kept, kept + 1.5 * scores, max(scores, blocks.backward - scores), blocks.trained)


def _lengths(cfg: RunConfig, micro: Batch) -> torch.Tensor:
    """Count the frames and the segments that the head reads of each clip, as cfg.model.modalities says: (kinds, B)."""
    owners = {"v": micro.frame_clip, "a": micro.segment_clip}
    counts = [owners[kind].bincount(minlength=len(micro) + 1)[: len(micro)] for kind in cfg.model.modalities]
    if "a" in cfg.model.modalities and cfg.model.audio_span == "clip":
        counts[-1] = counts[-1].clamp(max=1)
    return torch.stack(counts)


def _tiles(cfg: RunConfig, setup: RunSetup, micro: Batch, lengths: torch.Tensor) -> Pass:
    """Count of local_local: clips of all ranks, inputs of all tiles of pairs, and activations of the largest tile."""
    head, world = setup.model.head, collectives.world_size()
    words = torch.ones(len(micro), dtype=torch.int64) if head.eos else token_mask(setup.model.text, micro.tokens).sum(1)
    media = lengths.repeat(1, world)[:, lengths.repeat(1, world).sum(0).argsort()]
    height, across = head._tile_size(setup.device)
    rows = [(len(part), int(part.max())) for part in words.sort().values.split(height)]
    columns = [(part.shape[1], int(part.amax(1).sum())) for part in media.split(across, 1)]
    tiles = [(c, b, n, m) for c, n in rows for b, m in columns]  # captions, clips, their lengths
    blocks = _blocks(cfg, setup, head, max(c * b * (n + m) for c, b, n, m in tiles), first_only=True, masked=True)
    inputs = sum(c * n + b * m for c, b, n, m in tiles) + int(media.amax(1).sum()) * media.shape[1]
    inputs *= setup.model.clip_config["embed_dim"] * setup.width
    return Pass(inputs, blocks.kept + inputs, blocks.kept + blocks.backward, blocks.trained)


def _longest(owner: torch.Tensor, micro: Batch) -> int:
    """Count the segments, of clips owner (S,), of the clip that has the most."""
    return int(owner.bincount(minlength=len(micro) + 1)[: len(micro)].max())
