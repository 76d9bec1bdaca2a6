"""Evaluate a run's newest checkpoint, or its best by eval.best_metric, on data.test: metrics, manifest, a page.

laptop    python launch/evaluate.py configs/pretrain/stamps.yaml
two ranks deepspeed --num_accelerators 2 launch/evaluate.py configs/pretrain/stamps.yaml eval.audio_types=[both,0.3]
other set python launch/evaluate.py configs/pretrain/stamps.yaml data.test=SHARDS: beside the run's own, in RUN/eval/NAME
table     python launch/evaluate.py --table RUN [RUN ...] [--csv]: evaluated runs beside the paper's Tables 1 to 4 and 6
"""

import argparse
import sys

from clip4vla.cli import entry_point, parse_args, path_word
from clip4vla.config import RunConfig
from clip4vla.quick_imports import quick_imports


@entry_point
def main() -> None:
    if "--table" in sys.argv:
        return print_tables()
    cfg, _ = parse_args(RunConfig, "configs/pretrain/stamps.yaml", __doc__)
    with quick_imports():  # after the settings are read: a typing error shows at once
        from clip4vla.training import pipeline

    pipeline.test(cfg)


def print_tables() -> None:
    with quick_imports():
        from clip4vla.paper.tables import tables

    parser = argparse.ArgumentParser(description="Evaluated runs beside the paper's tables, as Markdown.")
    parser.add_argument("--table", nargs="+", type=path_word, metavar="RUN", required=True, help="run folders")
    parser.add_argument("--csv", action="store_true", help="CSV instead")
    args = parser.parse_args()
    print(tables(args.table, args.csv), end="")


if __name__ == "__main__":
    main()
