"""Benchmarks and planning: each prints one JSON object with every figure it used, the versions and the machine.

    python launch/bench.py NAME [--help] > docs/bench_NAME.json

NAME is a module beside this one, launch/bench_NAME.py: add_arguments(parser), main(args) -> its figures. What a benchmark
compares with is installed by: pip install -c constraints.txt -e '.[bench]'
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip4vla.cli import cli  # noqa: E402

BENCHES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
PACKAGES = (
    "clip4vla torch torchaudio deepspeed open_clip_torch webdataset nvidia-dali-cuda130 numpy av pillow soundfile librosa "
    "opencv-python-headless faiss-cpu"
)


@cli
def main() -> None:
    """Run the benchmark that the command line names."""
    raw = argparse.RawDescriptionHelpFormatter
    names = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    names.add_argument("bench", choices=BENCHES)
    name = names.parse_args(sys.argv[1:2]).bench
    apart = contextlib.redirect_stdout(sys.stderr)  # DeepSpeed's words, and embed.py's
    with apart:
        bench = importlib.import_module(f"launch.bench_{name}")
    parser = argparse.ArgumentParser(prog=f"bench.py {name}", description=bench.__doc__, formatter_class=raw)
    bench.add_arguments(parser)
    args = parser.parse_args(sys.argv[2:])
    with apart:
        figures = bench.main(args)
    if isinstance(figures, dict):
        tree = {"bench": name, **figures, "versions": versions(), "machine": machine()}
        figures = json.dumps(
            json.loads(json.dumps(tree), parse_float=lambda text: float(f"{float(text):.5g}")), indent=1
        )
    print(figures)


def count(text: str) -> int:
    """The type of an argument that counts something: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1")
    return int(text)


def versions() -> dict[str, str]:
    """Of Python and of what is installed of PACKAGES."""
    known = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {name: known[name] for name in PACKAGES.split() if name in known}


def machine() -> dict[str, Any]:
    """The processor, its cores, and how many processes wanted to run when the figures were done."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {"cpu": [*models, platform.machine()][0], "cores": os.cpu_count(), "load": os.getloadavg()[0]}


if __name__ == "__main__":
    main()
