"""Benchmark `resume`: seconds to write a checkpoint of ViT-B/32, and to go on from it, two CPU ranks or GPUs under ZeRO-1.

save_ratio is the time of writing it to that of `dd conv=fsync` writing as many bytes to the same disk, in turn.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from clip4vla.checkpoints.manager import CheckpointManager, frozen_weights
from clip4vla.cli import path_word
from clip4vla.config import RunConfig
from clip4vla.config_io import load
from clip4vla.distributed import collectives
from clip4vla.training import engine, train_step
from clip4vla.training.run_setup import prepare, train_loader
from launch.bench.common import count, free_port, run_ranks, timed_on_all_ranks
from launch.bench.training.step import configure


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("--rounds", type=count, default=3, help="rounds to take medians over")
    parser.add_argument("--ranks", type=count, default=2)
    parser.add_argument(
        "--clip", type=path_word, default="ViT-B-32", help="open_clip's name, or its configuration as .json"
    )
    parser.add_argument(
        "--folder", type=path_word, help="on the disk to be measured; default: where temporary files go"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        configure(Path(folder), args.clip, 32, 2 * args.ranks)
        run_ranks(_rank, args.ranks, args.ranks, free_port(), folder, args.rounds)
        rounds = torch.load(Path(folder, "seconds.pt"))
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    return {
        "save_ratio": medians["save"] / medians["dd"],
        "load_ratio": medians["load"] / medians["dd"],
        "median": medians,
        "rounds": rounds,
        "settings": vars(args),
    }


def _rank(rank: int, ranks: int, port: int, folder: str, rounds: int) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    sys.stdout = sys.stderr  # DeepSpeed's words are not ours
    cfg = load(RunConfig, Path(folder, "run.yaml"))
    setup = prepare(cfg, None)
    Path(cfg.run_dir).mkdir(exist_ok=True)
    frozen = frozen_weights(setup.model)
    run = engine.start(setup.model, setup.ds, cfg.train)
    checkpoints = CheckpointManager(run, cfg, frozen, [[shard.samples for shard in f.shards] for f in setup.folders])
    batches = train_loader(cfg, setup.folders, setup.vectors, setup.device, setup.model.pictures).steps(0, 1)
    train_step.step(run, next(batches), cfg)  # so that there is an optimizer's state
    seconds: dict[str, list[float]] = {"save": [], "load": [], "dd": [], "bytes": []}
    for step in range(1, rounds + 1):
        one = Path(cfg.run_dir, "checkpoints", f"step-{step:08d}")
        seconds["save"].append(timed_on_all_ranks(lambda step=step: checkpoints.save(step)))
        seconds["load"].append(timed_on_all_ranks(lambda one=one: checkpoints.load(one)))
        seconds["bytes"].append(sum(file.stat().st_size for file in one.rglob("*")))
        seconds["dd"].append(timed_on_all_ranks(lambda: _dd(folder, int(seconds["bytes"][-1]))))
    if rank == 0:
        torch.save(seconds, Path(folder, "seconds.pt"))
    collectives.barrier()


def _dd(folder: str, size: int) -> None:
    if collectives.rank() == 0:
        words = ["if=/dev/zero", f"of={folder}/dd", "bs=1M", f"count={max(1, size >> 20)}", "conv=fsync"]
        subprocess.run(["dd", *words], check=True, stderr=subprocess.DEVNULL)
        Path(folder, "dd").unlink()
