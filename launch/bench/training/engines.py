"""Benchmark `engines`: a step of pre-training in each precision under ZeRO-1, 2 and 3: clips/s, and memory beside its estimate.

The step, the shards and the weights are those of benchmark `step`; all engines run one after the other in this process, from the
same weights on the same batches. `loss` is that of the last step, which should not depend on the engine but for rounding.
"""

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from clip4vla.cli import path_word
from clip4vla.config import RunConfig
from clip4vla.config_io import load
from clip4vla.training import engine, memory, train_step
from clip4vla.training.meter import peak_memory
from clip4vla.training.run_setup import prepare
from launch.bench.common import count
from launch.bench.training.step import CUDA, Ours, configure

STAGES = (1, 2, 3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument(
        "--steps", type=count, default=10 if CUDA else 1, help="that are timed, after as many to warm up"
    )
    parser.add_argument("--batch", type=count, default=512 if CUDA else 4, help="clips in a step")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16", "fp16"), default=["bf16", "fp16"])
    parser.add_argument(
        "--clip", type=path_word, default="ViT-B-32", help="open_clip's name, or its configuration as .json"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    with tempfile.TemporaryDirectory() as folder:
        configure(Path(folder), args.clip, max(32, args.batch), args.batch)
        rows = [measure(Path(folder), precision, stage, args) for precision in args.precision for stage in STAGES]
    return {"engines": rows, "settings": vars(args)}


def measure(folder: Path, precision: str, stage: int, args: argparse.Namespace) -> dict[str, Any]:
    """One engine's figures."""
    ds = folder / "ds.json"
    # a small scale, so that no step overflows and is skipped
    ds.write_text(json.dumps({"zero_optimization": {"stage": stage}, "fp16": {"initial_scale_power": 8}}))
    cfg = load(RunConfig, folder / "run.yaml", [f"train.precision={precision}"])
    setup = prepare(cfg, str(ds))
    run = Ours(cfg, setup)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    run.run(args.steps)
    _synchronise()
    start = time.perf_counter()
    clips = run.run(args.steps)
    _synchronise()
    seconds = time.perf_counter() - start
    micros = next(run.batches)
    losses, _ = train_step.step(run.engine, micros, cfg)
    row = {"precision": precision, "zero": stage, "clips_per_s": clips / seconds, "loss": float(losses["loss"])}
    row |= {
        "estimated_gib": memory.estimate(cfg, setup, micros).total / engine.GIB,
        "memory_gib": peak_memory(setup.device),
    }
    del run, setup
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
    return row


def _synchronise() -> None:
    if CUDA:
        torch.cuda.synchronize()
