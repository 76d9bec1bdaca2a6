"""Benchmark `start`: seconds from typing the command to the end of the first step, ViT-B/32, two CPU ranks or GPUs.

`compilers` are the compilers that ran meanwhile: there should be none.
"""

import argparse
import json
import os
import signal
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from clip4vla.cli import path_word
from launch.bench.common import count

ROOT = Path(__file__).resolve().parents[3]
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "nvcc", "ninja")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this benchmark."""
    parser.add_argument("--rounds", type=count, default=3, help="rounds to take medians over")
    parser.add_argument("--ranks", type=count, default=2, help="ranks of the deepspeed launcher")
    parser.add_argument(
        "--clip", type=path_word, default="ViT-B-32", help="open_clip's name, or its configuration as .json"
    )


def main(args: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    from launch.bench.training.step import configure  # with torch: --help comes before

    with tempfile.TemporaryDirectory() as folder:
        configure(Path(folder), args.clip, 32, 2 * args.ranks)
        seconds = [start(Path(folder), Path(folder, f"run{i}"), args.ranks) for i in range(args.rounds)]
        return {
            "seconds": statistics.median(seconds),
            "rounds": seconds,
            "compilers": sorted(set(Path(folder, "compilers").read_text(encoding="utf-8").splitlines())),
            "settings": vars(args),
        }


def start(folder: Path, run_dir: Path, ranks: int) -> float:
    """Seconds until the row of step 1 was written."""
    from launch.bench.common import free_port

    words: list[str | Path] = [
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        "launch/pretrain.py",
        folder / "run.yaml",
        f"run_dir={run_dir}",
    ]
    deepspeed = Path(sys.executable).parent / "deepspeed"
    env = {**os.environ, "PATH": f"{watched(folder)}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    begin = time.time()
    with subprocess.Popen(
        [str(deepspeed), *words, "train.precision=auto", "train.log_every=1", "train.max_steps=2", "train.save_every=2"],
        cwd=ROOT, env=env, stdout=sys.stderr, start_new_session=True,
    ) as process:  # fmt: skip
        rows = run_dir / "metrics.jsonl"
        while process.poll() is None and not (rows.exists() and rows.read_text(encoding="utf-8").endswith("\n")):
            time.sleep(0.02)
        if not rows.exists():
            raise RuntimeError(f"the run ended with {process.poll()} before its first step")
        os.killpg(process.pid, signal.SIGKILL)  # a checkpoint on its way to the disk would slow the next round
    return json.loads(rows.read_text(encoding="utf-8").splitlines()[0])["time"] - begin


def watched(folder: Path) -> Path:
    """A folder of programs that note that they were called, and call the real ones."""
    tools, note = folder / "tools", folder / "compilers"
    tools.mkdir(exist_ok=True)
    note.touch()
    for name in COMPILERS:
        program = tools / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {note}\nPATH="${{PATH#*:}}" exec {name} "$@"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return tools
