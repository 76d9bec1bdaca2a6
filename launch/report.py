"""Several runs in one HTML page: settings that differ, results on data.test, curves of validation and training.

python launch/report.py runs/demo_clip runs/demo
python launch/report.py runs/stamps_retrieval-* --out fusions.html
"""

import argparse

from clip4vla.cli import entry_point, path_word
from clip4vla.quick_imports import quick_imports


@entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=path_word, metavar="RUN", help="run folders")
    parser.add_argument(
        "--out",
        type=path_word,
        metavar="PAGE.html",
        default="",
        help="default: comparison.html in the runs' common folder",
    )
    args = parser.parse_args()
    with quick_imports():  # after the words are read: a typing error shows at once
        from clip4vla.report.compare_runs import compare

    print(f"comparison: {compare(args.runs, args.out)}")


if __name__ == "__main__":
    main()
