"""The paper's ablations and figures, each by one command; killed, the same command goes on.

Table 5   deepspeed launch/ablate.py table5 configs/pretrain/stamps.yaml configs/finetune/stamps_retrieval.yaml --seeds 0 1 2
          rows and seeds are runs below --out; [pretrain.|finetune.]KEY=VALUE words change both stages, or one
Figure 4  python launch/ablate.py figure4 runs/ablation/type/seed-*/pretrain --out runs/ablation
          text to audio R@k against the mixing ratio of the type tokens: figure4.csv and .png; KEY=VALUE words change data
Types     python launch/ablate.py audio-types runs/demo
          what the type token tells apart, how verbal each clip is, PCA and t-SNE: RUN/audio_types/
Cost      python launch/ablate.py cost runs/demo
          hours, clips, parameters and FLOPs from the runs' own logs, beside the paper's (Table 6)
"""

import argparse
from pathlib import Path

from clip4vla.cli import entry_point, path_word
from clip4vla.config import RunConfig
from clip4vla.config_io import expand_path, load
from clip4vla.errors import UserError
from clip4vla.quick_imports import quick_imports


@entry_point
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("table5", "figure4", "audio-types", "cost"))
    parser.add_argument("words", nargs="+", metavar="CONFIG.yaml|RUN|KEY=VALUE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of table5")
    parser.add_argument("--out", type=path_word, default="runs/ablation", help="folder of table5 and figure4")
    parser.add_argument("--deepspeed_config", type=path_word, help="DeepSpeed's JSON, of all runs of table5")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher")
    args = parser.parse_intermixed_args()
    args.places = [expand_path(word) for word in args.words if "=" not in word]
    args.words = [word for word in args.words if "=" in word]
    {"table5": table5, "figure4": figure4, "audio-types": types, "cost": cost}[args.what](args)


def table5(args: argparse.Namespace) -> None:
    if len(args.places) != 2:
        raise UserError(f"table5: two config files, PRETRAIN.yaml and FINETUNE.yaml, not {len(args.places)}")
    with quick_imports():  # after the words are read: a typing error shows at once
        from clip4vla.distributed import collectives
        from clip4vla.paper.table5 import Plan, run

    plan = Plan(args.places[0], args.places[1], args.words, Path(args.out))
    table = run(plan, args.seeds, args.deepspeed_config)
    if collectives.rank() == 0:
        print(table, end="")


def figure4(args: argparse.Namespace) -> None:
    configs = [config_of(run, args.words) for run in args.places]
    from clip4vla.paper.figure4 import sweep_runs

    sweep_runs(configs, Path(args.out))


def types(args: argparse.Namespace) -> None:
    configs = [config_of(run, args.words) for run in args.places]
    from clip4vla.paper import type_token

    for cfg in configs:
        type_token.analyse(cfg)


def cost(args: argparse.Namespace) -> None:
    from clip4vla.paper import cost

    print(cost.table(args.places), end="")


def config_of(run: str, words: list[str]) -> RunConfig:
    """Settings of a run, changed by KEY=VALUE words."""
    if not Path(run, "config.yaml").is_file():
        raise UserError(f"{run}: no run there (it has no config.yaml): name folders that run_dir gave")
    return load(RunConfig, f"{run}/config.yaml", [*words, f"run_dir={run}", "eval.best_metric="])


if __name__ == "__main__":
    main()
