"""Benchmark `scale`: a model of the step time on W ranks, checked against 1 and 2 real ranks, and its table for GPUs.

    step(W) = towers + optimizer / W + loss + gradients + features + messages

towers     forward and backward of b clips on the rank that drew the most: clips differ in length, of W sums of b of them
           the largest is expected deviation / sqrt(b) * the normal quantile of (W - 3/8) / (W + 1/4) above the mean
optimizer  fused AdamW on the rank's part of the state (ZeRO-1 to 3)
loss       PRODUCTS products of b N D, N = b W, for the three terms, and PASSES over b N numbers in memory (losses/tiles.py)
gradients  2 (W - 1) / W of them reduced, (W - 1) / W of the weights gathered again, over the bandwidth
features   (W - 1) / W of 4 N D 4 bytes gathered, 2 (W - 1) / W of 24 N bytes of log-sum-exps reduced
messages   MESSAGES collectives, each log2(W) steps of the latency

Nothing is taken to overlap, so the model errs on the slow side. model_error compares the step predicted for 2 ranks, from
the parts of one rank (of two that run at once and know nothing of each other) and the bandwidth and latency between two,
with the measured one. The table is for GPUs of the rate, MFU and bandwidths that the command line states: assumptions.
"""

import argparse
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clip4vla.cli import path_word
from clip4vla.config import RunConfig
from clip4vla.config_io import load
from clip4vla.data.batch import Batch
from clip4vla.distributed import collectives
from clip4vla.losses.contrastive import info_nce
from clip4vla.training import engine, flops, train_step
from clip4vla.training.run_setup import prepare, train_loader
from launch.bench.common import count, free_port, run_ranks, timed_on_all_ranks
from launch.bench.training.step import configure

DIM = 512  # of the space
# of the three terms on one rank, and on several
PRODUCTS = (18, 21)  # 4 a term, 5 on several; NCE_aa has 6 more
PASSES = (18, 24)  # reads and writes of the tiles of logits, compiled: tests/losses/test_loss_traffic.py counts them
MESSAGES = (
    12  # collectives of a step: features, valid, log-sum-exps (two reduced and one gathered a term), gradients, weights
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("--rounds", type=count, default=3, help="steps to take medians over")
    parser.add_argument("--batch", type=count, default=4, help="clips of a rank in the check")
    parser.add_argument(
        "--clip", type=path_word, default="ViT-B-32", help="open_clip's name, or its configuration as .json"
    )
    parser.add_argument("--gpu-batch", type=count, default=512, help="clips of a GPU in the table")
    parser.add_argument("--gpu-tflops", type=float, default=800.0, help="bf16 products of a GPU, TFLOP/s")
    parser.add_argument("--mfu", type=float, default=0.45, help="share of it that the towers reach")
    parser.add_argument("--node", type=count, default=8, help="GPUs of a node")
    parser.add_argument("--intra", type=float, default=400.0, help="GB/s of a GPU inside a node")
    parser.add_argument("--inter", type=float, default=40.0, help="GB/s of a GPU between nodes")
    parser.add_argument("--hbm", type=float, default=3000.0, help="GB/s of a GPU's memory")
    parser.add_argument("--latency", type=float, default=20.0, help="microseconds of a collective's step")


def main(args: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    with tempfile.TemporaryDirectory() as folder:
        configure(Path(folder), args.clip, 32, args.batch)
        for world in (1, 2):  # two processes each time, so that the machine is as busy
            run_ranks(_rank, 2, world, free_port(), folder, args)
        one, two = (torch.load(Path(folder, f"{world}.pt")) for world in (1, 2))
    cached = {"memory": math.inf}  # a CPU's tiles lie in its cache, and loss_rate is that of the whole loss
    predicted = model(2, args.batch, one | two["network"] | cached)
    return {
        "model_error": sum(predicted.values()) / two["step"] - 1,
        "check": {"one_rank": one, "two_ranks": two, "predicted_for_two": predicted},
        "table": table(one, args),
        "settings": vars(args),
    }


def _rank(rank: int, world: int, port: int, folder: str, args: argparse.Namespace) -> None:
    process, rank = rank, rank % world
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.stdout = sys.stderr
    cfg = load(RunConfig, Path(folder, "run.yaml"), [f"train.batch_size={args.batch * world}"])
    setup = prepare(cfg, None)
    Path(cfg.run_dir).mkdir(exist_ok=True)
    run = engine.start(setup.model, setup.ds, cfg.train)
    steps = train_loader(cfg, setup.folders, setup.vectors, setup.device, setup.model.pictures).steps(
        0, args.rounds + 1
    )
    costs: dict[str, Any] = _parts(run, [micros[0] for micros in steps], cfg)
    if world > 1:
        costs["network"] = _network(costs["gradients"])
    if process == 0:
        torch.save(costs, Path(folder, f"{world}.pt"))
    collectives.barrier()


def _parts(run: Any, batches: list[Batch], cfg: RunConfig) -> dict[str, float]:
    """Seconds of a whole step and of its parts; FLOPs of the towers for a clip; bytes of the gradients."""
    work = flops.FlopCounter(run.module, cfg)
    seconds: dict[str, list[float]] = {"step": [], "towers": [], "optimizer": []}
    for batch in batches:
        seconds["step"].append(timed_on_all_ranks(lambda batch=batch: train_step.step(run, [batch], cfg)))
        seconds["towers"].append(
            timed_on_all_ranks(lambda batch=batch: run.backward(_sum(run(batch, cfg.loss, cfg.mask))))
        )
        seconds["optimizer"].append(timed_on_all_ranks(run.step))
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    a, b = (F.normalize(torch.randn(2048, DIM), dim=-1).requires_grad_() for _ in range(2))
    everyone = torch.ones(2048, dtype=torch.bool)
    loss = min(timed_on_all_ranks(lambda: info_nce(a, b, torch.ones(1), everyone).sum().backward()) for _ in range(3))
    clips = sum(map(len, batches))
    segments = torch.cat([batch.segment_clip.bincount(minlength=len(batch)) for batch in batches]).double()
    return medians | {
        "loss_rate": 2
        * (4 if collectives.world_size() == 1 else 5)
        * 2048
        * 2048
        * collectives.world_size()
        * DIM
        / loss,
        "flops_per_clip": sum(work.flops([batch]) for batch in batches) / clips,
        "deviation": float(segments.std() / segments.mean()),
        "gradients": 2.0 * flops.elements(run.module, trained=True),  # bf16
    }


def _sum(features: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.sum() for value in features.values()]).sum()


def _network(size: float) -> dict[str, float]:
    """bandwidth (bytes/s of a ring) and latency (s), from an all-reduce of the gradients' size and one of a number."""
    small, large = torch.zeros(1), torch.zeros(int(size) // 2, dtype=torch.bfloat16)
    latency = statistics.median(timed_on_all_ranks(lambda: dist.all_reduce(small)) for _ in range(20))
    seconds = statistics.median(timed_on_all_ranks(lambda: dist.all_reduce(large)) for _ in range(3))
    return {"bandwidth": size / (seconds - latency), "latency": latency}  # 2 (W - 1) / W is 1 for two ranks


def model(world: int, clips: int, costs: dict[str, float]) -> dict[str, float]:
    """Seconds of each part of a step of `world` ranks with `clips` clips each.

    costs: towers and optimizer (s), deviation (of a clip's work, relative), loss_rate (FLOP/s), memory (bytes/s), gradients
    (bytes), bandwidth (bytes/s), latency (s).
    """
    n, ring, several = clips * world, (world - 1) / world, world > 1
    most = statistics.NormalDist().inv_cdf((world - 0.375) / (world + 0.25))
    sent = {"gradients": 3 * ring * costs["gradients"], "features": ring * n * (4 * DIM * 4 + 2 * 24)}
    return {
        "towers": costs["towers"] * (1 + costs["deviation"] / math.sqrt(clips) * most),
        "optimizer": costs["optimizer"] / world,
        "loss": clips * n * (PRODUCTS[several] * 2 * DIM / costs["loss_rate"] + PASSES[several] * 4 / costs["memory"]),
        **{name: size / costs["bandwidth"] for name, size in sent.items()},
        "messages": MESSAGES * math.log2(world) * costs["latency"],
    }


def table(here: dict[str, float], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tabulate for 1 to 4096 GPUs: ms of each part, clips/s, efficiency against one GPU, and what takes longest."""
    rate, rows = args.gpu_tflops * 1e12, []
    for world in (2**i for i in range(13)):
        costs = {
            "towers": args.gpu_batch * here["flops_per_clip"] / (rate * args.mfu),
            "optimizer": 14 * here["gradients"] / (args.hbm * 1e9),  # 28 bytes of each element are read and written
            "loss_rate": rate / 4,  # fp32 products are TF32's beside bf16: half of its rate, and half of that reached
            "memory": args.hbm * 1e9,
            **{name: here[name] for name in ("gradients", "deviation")},
            "bandwidth": 1e9 * (args.intra if world <= args.node else args.inter),
            "latency": args.latency / 1e6,
        }
        parts = model(world, args.gpu_batch, costs)
        step = sum(parts.values())
        rows.append({"gpus": world, "clips_per_s": world * args.gpu_batch / step, "step_ms": 1000 * step})
        rows[-1]["efficiency"] = rows[-1]["clips_per_s"] / world / rows[0]["clips_per_s"]
        _, bound = max((seconds, name) for name, seconds in parts.items())
        rows[-1] |= {"bound_by": bound, "parts_ms": {k: 1000 * v for k, v in parts.items()}}
    return rows
