"""Run what docs/results.md reports, on public data, and write that page; killed, the same command goes on.

    python launch/results.py                         # all of configs/results.yaml, whose data are below data/
    python launch/results.py --only grid             # rows of this name
    python launch/results.py --seeds 0 --out /tmp/r  # fewer seeds, another folder of runs and page

Data that are not there are named, with the config whose header says where they come from; their rows are left out.
"""

import argparse
from pathlib import Path

from clip4vla.cli import entry_point, path_word
from clip4vla.quick_imports import quick_imports


@entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--plan", type=path_word, default="configs/results.yaml", help="the rows: configs, scripts, figures"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", default=[], help="rows to run; the page has all that are there"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[], help="instead of the plan's")
    parser.add_argument(
        "--data", nargs="+", type=path_word, default=["data"], help="folders that hold the data sets' own folders"
    )
    parser.add_argument("--out", type=path_word, default="runs/results", help="folder of the runs")
    parser.add_argument("--page", type=path_word, default="docs/results.md", help="page to write")
    args = parser.parse_args()
    with quick_imports():  # after the words are read: a typing error shows at once
        from clip4vla.report import results

    plan = results.read_plan(Path(args.plan), args.seeds)
    results.run(plan, args.only, args.data, Path(args.out))
    results.write_page(plan, Path(args.out), Path(args.page))


if __name__ == "__main__":
    main()
