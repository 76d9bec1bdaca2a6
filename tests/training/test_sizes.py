"""Memory and FLOPs that --dry-run estimates, against steps simulated at full size (helpers/simulated_memory.py)."""

import functools
import hashlib
import tracemalloc

import hf_models
import pytest
import torch
from simulated_memory import Simulation, Step, as_on_cuda, fake_ranks

from clip4vla.data.sampler import TrainSampler
from clip4vla.data.shards import Shard
from clip4vla.losses import contrastive, objective
from clip4vla.training import flops, memory

RECOMPUTED = "train.activation_checkpointing=true"
IN_TWO, IN_EIGHT, IN_SIXTEEN = (f"train.gradient_accumulation_steps={n}" for n in (2, 8, 16))
ALL_TOWERS = "model.trainable_towers=text+vision+audio"
ONE_TERM = "loss.at=0", "loss.aa=0"
ONE_BUCKET = (("reduce_bucket_size", 500_000_000), ("contiguous_gradients", True))


@functools.cache
def simulated(clips, world, *words, zero=(), **options):
    return Step(clips, world, *words, zero=dict(zero), **options)


def headed(head, term, *words):
    """Words that train all towers and a head by one term."""
    return ("loss.at=0", "loss.av=0", "loss.aa=0", f"loss.{term}=1", f"model.head={head}", ALL_TOWERS, *words)


def case(clips, world, *words, **options):
    return pytest.param(clips, world, words, options, id="-".join(map(str, (clips, world, *words, *options.values()))))


PRETRAINING = [
    case(256, 1),
    case(256, 1, RECOMPUTED, layers=3),
    case(256, 1024),
    case(256, 1024, RECOMPUTED, layers=3),
    case(32, 4096, layers=1),
    case(4096, 64, *ONE_TERM, RECOMPUTED, layers=2),
    case(4096, 64, *ONE_TERM, layers=2),
    case(4, 1, layers=3),
    case(4, 1, RECOMPUTED, zero=ONE_BUCKET, layers=3),
    case(256, 8, IN_EIGHT, layers=2),
    case(256, 8, IN_SIXTEEN, "train.negatives=micro", layers=1),
    case(64, 8, IN_TWO, "train.negatives=micro", layers=2),
    case(64, 1024, IN_TWO, "train.negatives=micro", layers=1),
    case(64, 8, "model.freeze_layers={audio: 2}", layers=4),
    case(256, 1, "model.clip=ViT-L-14", layers=3),
    case(64, 8, "model.clip=ViT-H-14", RECOMPUTED, layers=3),
    case(64, 8, "model.audio_span=clip", layers=3),
    case(64, 8, "model.audio_pool=mean", layers=3),
]
HEADS = [
    case(128, 1, *headed("global_local", "tm"), layers=2),
    case(32, 1, *headed("local_local", "tm"), layers=2),
    case(128, 1, *headed("captioner", "caption"), layers=2),
    case(64, 8, *headed("captioner", "caption", RECOMPUTED), layers=2),
    case(128, 1, *headed("classifier", "label", "model.trainable_towers=vision+audio"), layers=2),
]
STAGES = [
    case(32, 8, ALL_TOWERS, ds="zero2", layers=2),
    case(32, 8, ALL_TOWERS, IN_TWO, "train.negatives=micro", ds="zero2", layers=1),
    case(32, 8, ALL_TOWERS, ds="zero3", layers=2),
    case(32, 8, ALL_TOWERS, ds="offload", layers=2),
    case(32, 8, ALL_TOWERS, zero=(("stage", 0),), layers=2),
    case(32, 8, ALL_TOWERS, dtype="fp32", layers=2),
]


@pytest.mark.parametrize("clips, world, words, options", [*PRETRAINING, *HEADS, *STAGES])
def test_memory_is_estimated_within_5_percent(clips, world, words, options):
    pictures = {"vectors": False} if ALL_TOWERS in words else {}
    step = simulated(clips, world, *words, **pictures, **options)
    with step.as_rank():
        estimate = memory.estimate(step.cfg, step.setup, step.micros)
    assert estimate.total == pytest.approx(step.sim.peak, rel=0.05)


@pytest.mark.parametrize("recomputed", [(), (RECOMPUTED,)], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "clip, ears",
    [
        ("ViT-B-16-SigLIP", "vision"),
        ("convnext_base", "vit_small_patch16_224"),
        ("xlm-roberta-base-ViT-B-32", "vision"),
    ],
)
def test_memory_of_other_families_is_estimated_within_5_percent(clip, ears, recomputed, monkeypatch):
    """Of timm's ViT and ConvNeXt, and of a text tower of transformers, with two blocks each."""
    hf_models.published(monkeypatch, blocks=2)
    words = (f"model.clip={clip}", f"model.audio_tower={ears}", ALL_TOWERS, *recomputed)
    step = Step(64, 1, *words, vectors=False)
    with step.as_rank():
        estimate = memory.estimate(step.cfg, step.setup, step.micros)
    assert estimate.total == pytest.approx(step.sim.peak, rel=0.05)


EVEN = [
    case(256, 1),
    case(256, 1024),
    case(256, 1, "model.clip=ViT-L-14", layers=3),
    case(64, 8, "model.audio_pool=mean", layers=3),
    case(8, 1, ALL_TOWERS, vectors=False, even=True, layers=3),
    *(
        case(8, 1, *headed(head, term), vectors=False, even=True, layers=2)
        for head, term in (("global_local", "tm"), ("captioner", "caption"), ("local_local", "tm"))
    ),
]


@pytest.mark.parametrize("clips, world, words, options", EVEN)
def test_flops_are_counted_within_1_percent(clips, world, words, options):
    step = simulated(clips, world, *words, **options)
    with step.as_rank():
        counter = flops.FlopCounter(step.setup.model, step.cfg)
        useful = counter.flops(step.micros)
        if "model.head=local_local" in words:  # runs the head again for its gradient
            useful += counter._head_flops(step.micros) / 3
    assert useful == pytest.approx(step.sim.flops, rel=0.01)


@pytest.mark.parametrize("clips, world, words, options", [case(256, 1024), case(4096, 64, *ONE_TERM, layers=2)])
def test_many_ranks_send_what_is_counted_and_hold_no_matrix_of_all_pairs(clips, world, words, options):
    step = simulated(clips, world, *words, **options)
    total, dim = clips * world, 512
    features = {name: tuple(x.shape) for name, x in step.features.items() if name != "scale"}
    assert features == dict.fromkeys(objective.required_features(step.cfg.loss), (clips, dim))
    assert step.losses["loss"].shape == ()
    assert step.sim.sent == objective.bytes_sent(step.cfg.loss, clips, total, dim)
    assert step.sim.largest["loss"] == max(
        len(features) * total * dim, contrastive.TILE["cuda"]
    )  # gathered features, or a tile
    assert max(step.sim.largest.values()) < total**2 / 10


def test_tiles_of_similarities_take_what_is_counted_for_a_pair():
    clips, world = 256, 1024
    sim, valid = Simulation(), torch.ones(clips, dtype=torch.bool)
    with fake_ranks(world), as_on_cuda(), sim:
        a, b = (sim.empty(clips, 4).requires_grad_() for _ in range(2))
        contrastive.info_nce(a, b, sim.empty(1), valid, torch.arange(clips)).sum().backward()
    assert memory.PAIR * contrastive.TILE["cuda"] == pytest.approx(sim.peak, rel=0.1)


def test_scores_of_all_pairs_take_what_is_counted_for_a_pair():
    clips, world = 8, 512
    sim, valid = Simulation(), torch.ones(clips, dtype=torch.bool)
    with fake_ranks(world), sim:
        scores, scale = sim.empty(clips, clips * world).requires_grad_(), sim.empty(1)
        contrastive.nce_from_scores(scores, scale, valid).sum().backward()
    assert memory.PAIR * (clips * world) ** 2 == pytest.approx(sim.peak, rel=0.1)


def test_a_rank_keeps_half_a_kilobyte_of_a_shard_in_memory_whatever_the_number_of_ranks():
    """With 256 samples in each, 2.3 bytes a sample: 230 MB of 100 million samples."""
    rows = [
        {"name": f"howto100m-train-{i:06d}.tar", "samples": 256, "bytes": 36_000_000 + i,
         "sha256": hashlib.sha256(str(i).encode()).hexdigest(), "entries": [60_000 * i, 60_000, i]}
        for i in range(5000)
    ]  # fmt: skip
    tracemalloc.start()
    try:
        shards = [Shard.of_json(row) for row in rows]
        order = TrainSampler([[shard.samples for shard in shards]], [1.0], 65_536, seed=0, window=8)
        order.batch(0, slice(0, None, 1024))
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    batches = 4 * 65_536 * 4 * 8  # that the order keeps
    assert held - batches < 600 * len(shards)
