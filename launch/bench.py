"""Benchmarks and planning: each prints one JSON object with every figure it used, the versions and the machine.

    python launch/bench.py prep [--rounds 5] [--clips N] > docs/bench_prep.json
    python launch/bench.py plan [--rounds 5] > docs/plan.json
    python launch/bench.py plan --markdown docs/plan.json        # the same figures as tables
prep  the same videos to frames and log-mel, CPU time: ours against OpenCV and librosa (pip install -e '.[bench]')
plan  clips/s of a core, bytes of a clip by codec, and what they make for all of HowTo100M and AudioSet
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip4vla.config import cli  # noqa: E402

PACKAGES = "clip4vla torch torchaudio numpy av pillow soundfile librosa opencv-python-headless"


@cli
def main() -> None:
    """Run the benchmark that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", choices=BENCHES)
    parser.add_argument("--rounds", type=_count, default=5, metavar="N", help="medians are over N rounds")
    parser.add_argument("--clips", type=_count, metavar="N", help="prep: only the first N videos")
    parser.add_argument("--markdown", metavar="FILE.json", help="plan: print the tables of one that was saved")
    args = parser.parse_args()
    figures = BENCHES[args.bench](args)
    if isinstance(figures, dict):
        tree = {"bench": args.bench, **figures, "versions": versions(), "machine": machine()}
        figures = json.dumps(json.loads(json.dumps(tree), parse_float=_rounded), indent=1)
    print(figures)


def _prep(args: argparse.Namespace) -> dict[str, Any]:
    from launch.bench_prep import prep

    return prep(args.rounds, args.clips)


def _plan(args: argparse.Namespace) -> dict[str, Any] | str:
    from launch.bench_plan import markdown, plan

    return markdown(args.markdown) if args.markdown else plan(args.rounds)


def versions() -> dict[str, str]:
    """Of Python and of what is installed of PACKAGES."""
    known = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {name: known[name] for name in PACKAGES.split() if name in known}


def machine() -> dict[str, Any]:
    """The processor, its cores, and how many processes wanted to run when the figures were done."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {"cpu": [*models, platform.machine()][0], "cores": os.cpu_count(), "load": os.getloadavg()[0]}


def _rounded(text: str) -> float:
    return float(f"{float(text):.5g}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


BENCHES = {"prep": _prep, "plan": _plan}

if __name__ == "__main__":
    main()
