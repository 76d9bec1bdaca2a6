"""The paper's ablations and figures, each by one command; killed, the same command goes on.

Table 5   deepspeed launch/ablate.py table5 configs/pretrain/stamps.yaml configs/finetune/stamps_retrieval.yaml --seeds 0 1 2
"""

import argparse
from pathlib import Path

from clip4vla.cli import cli
from clip4vla.config import UserError


@cli
def main() -> None:
    args = parsed()
    {"table5": table5}[args.what](args)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    parts = parser.add_subparsers(dest="what", required=True)
    part = parts.add_parser("table5", help="rows of Table 5, several seeds")
    part.add_argument("words", nargs="+", metavar="PRETRAIN.yaml FINETUNE.yaml [pretrain.|finetune.][KEY=VALUE]")
    part.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    part.add_argument("--out", default="runs/ablation", help="folder of the runs and of table5.md")
    part.add_argument("--deepspeed_config", help="DeepSpeed's JSON, of all runs")
    return parser.parse_args()


def table5(args: argparse.Namespace) -> None:
    files = [word for word in args.words if "=" not in word]
    if len(files) != 2:
        raise UserError(f"table5: two config files, PRETRAIN.yaml and FINETUNE.yaml, not {len(files)}")
    from clip4vla import ablation, distributed  # after the words are read: a typing error shows at once

    plan = ablation.Plan(*files, [word for word in args.words if "=" in word], Path(args.out))
    table = ablation.run(plan, args.seeds, args.deepspeed_config)
    if distributed.rank() == 0:
        print(table, end="")


if __name__ == "__main__":
    main()
