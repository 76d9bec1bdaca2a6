"""Benchmarks and planning: each prints one JSON object with every figure it used, the versions and the machine.

    python launch/bench.py NAME [--help] > docs/bench_NAME.json

NAME is a module below launch/bench/: add_arguments(parser), main(args) -> its figures. What a benchmark compares with is
installed by: pip install -c constraints.txt -e '.[bench]'
"""

import argparse
import contextlib
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip4vla.cli import entry_point  # noqa: E402
from launch.bench.common import machine, versions  # noqa: E402

BENCHES = {
    path.stem: path.parent.name
    for path in sorted(Path(__file__).parent.glob("bench/*/[a-z]*.py"), key=lambda p: p.stem)
}


@entry_point
def main() -> None:
    """Run the benchmark that the command line names."""
    raw = argparse.RawDescriptionHelpFormatter
    names = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    names.add_argument("bench", choices=BENCHES)
    name = names.parse_args(sys.argv[1:2]).bench
    apart = contextlib.redirect_stdout(sys.stderr)  # DeepSpeed's words, and embed.py's
    with apart:
        bench = importlib.import_module(f"launch.bench.{BENCHES[name]}.{name}")
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


if __name__ == "__main__":
    main()
