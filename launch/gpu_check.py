"""Check and measure what only a GPU can show, in nine minutes: the most valuable first, what there is no time for is skipped.

    python launch/gpu_check.py                       # on one GPU: docs/gpu.json, written again each time a check ends
    python launch/gpu_check.py --only step loss      # some of the checks
    python launch/gpu_check.py --wheels wheels --have have.txt     # before, with a network: packages for a machine without one

have.txt: `pip list --format=freeze` of that machine, or names, one a line. Carry wheels/1, wheels/2, ... there, run
`sh wheels/1/install.sh site`, and set PYTHONPATH=site. See docs/performance.md.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip4vla.cli import entry_point, path_word  # noqa: E402
from clip4vla.errors import UserError  # noqa: E402
from launch.bench.common import count, machine, versions  # noqa: E402
from launch.gpu import checks, packages  # noqa: E402


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [check.name for check in checks.CHECKS]
    parser.add_argument("--minutes", type=count, default=9, help="that all checks may take together")
    parser.add_argument("--only", nargs="+", choices=names, metavar="CHECK", default=names, help=", ".join(names))
    parser.add_argument("--out", type=path_word, default="docs/gpu.json", help="file of the results")
    parser.add_argument("--wheels", type=path_word, metavar="FOLDER", help="collect wheels into a new folder instead")
    parser.add_argument(
        "--have", type=path_word, metavar="FILE", help="packages that the machine has, beside PyTorch's"
    )
    parser.add_argument("--python", choices=("3.11", "3.12"), default="3.12", help="that machine's version of Python")
    parser.add_argument("--piece-mb", type=count, default=50, help="most megabytes in a folder of wheels")
    return parser.parse_args()


@entry_point
def main() -> None:
    """Collect wheels, or run the checks."""
    args = arguments()
    if args.wheels:
        collect(args)
        return
    import torch  # the command line is read before torch is imported

    if not torch.cuda.is_available():
        raise UserError(
            "torch.cuda.is_available() is false: launch/gpu_check.py needs a GPU; start it on a machine that has one"
        )
    gpu = torch.cuda.get_device_properties(0)
    about = {"gpu": gpu.name, "memory_gib": gpu.total_memory / 2**30, "cuda": torch.version.cuda}
    about |= {"minutes": args.minutes, "versions": versions(), "machine": machine()}
    chosen = tuple(check for check in checks.CHECKS if check.name in args.only)
    checks.run_all(chosen, 60 * args.minutes, Path(args.out), about)
    print(f"results: {args.out}")


def collect(args: argparse.Namespace) -> None:
    """Collect the wheels, and print what is to be done with them."""
    if Path(args.wheels).exists():
        raise UserError(f"--wheels {args.wheels}: it is there already; name a folder that is not")
    have = Path(args.have).read_text(encoding="utf-8").splitlines() if args.have else []
    names = [line.partition("==")[0].partition(" @")[0] for line in have]
    for folder in packages.collect(Path(args.wheels), args.python, names, args.piece_mb * 1_000_000):
        print(folder, *sorted(file.name for file in folder.iterdir()))


if __name__ == "__main__":
    main()
