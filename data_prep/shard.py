"""Make tar shards of media and annotations.

    python data_prep/shard.py [CONFIG.yaml] [KEY=VALUE ...] [--dry-run | --plan | --part I/N | --merge]

Without a config: configs/data/stamps.yaml. Makes OUT/SOURCE/SPLIT/{SOURCE-SPLIT-000000.tar, ..., index.json,
quarantine.jsonl}, and in OUT manifest.jsonl (what goes where) and skipped.jsonl (missing media, malformed lines). May be
killed at any moment and started again: finished shards are kept, and the result has the bytes of an uninterrupted run. Media
that are added later go into new shards. OUT is a folder or any fsspec URL. On SLURM: launch/slurm/shard.sbatch.

    --dry-run   say what is found, what is missing, how big the result will be and how long it takes; write nothing
    --plan      only write the manifest
    --part I/N  only make every N-th shard, the I-th first (0 <= I < N); makes the manifest if there is none
    --merge     only join what the parts made into index.json
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip4vla.cli import entry_point, help_text  # noqa: E402
from clip4vla.config import DataConfig  # noqa: E402
from clip4vla.config_io import expand_path, load  # noqa: E402
from clip4vla.errors import UserError  # noqa: E402
from clip4vla.quick_imports import quick_imports  # noqa: E402

DEFAULT = "configs/data/stamps.yaml"


def _command_line() -> tuple[DataConfig, argparse.Namespace]:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=help_text(DataConfig), formatter_class=raw)
    parser.add_argument("words", nargs="*", metavar="CONFIG.yaml|KEY=VALUE")
    only = parser.add_mutually_exclusive_group()
    for flag in ("--dry-run", "--plan", "--merge"):
        only.add_argument(flag, action="store_true")
    only.add_argument("--part", metavar="I/N")
    args = parser.parse_intermixed_args()
    args.part = args.part and _part(args.part)
    words = args.words
    config = (
        expand_path(words.pop(0))
        if words and "=" not in words[0]
        else str(Path(__file__).resolve().parents[1] / DEFAULT)
    )
    cfg = load(DataConfig, config, words)
    for key in ("media_root", "out"):
        if not getattr(cfg, key):
            raise UserError(f"{config}: {key} is empty: set it there or as {key}=FOLDER")
    return cfg, args


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(
            f"--part {text}: give I/N with 0 <= I < N, for SLURM $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
        )
    return int(match[1]), int(match[2])


@entry_point
def main() -> None:
    """Read the command line, do what it says."""
    cfg, args = _command_line()
    with quick_imports():  # after the words are read: a typing error shows at once
        from data_prep.build_shards import dry_run, shard

    try:
        if args.dry_run:
            dry_run(cfg)
        else:
            shard(cfg, args.part, args.plan, args.merge)
    except OSError as error:
        where = error.filename or cfg.out
        raise UserError(
            f"{where}: {error.strerror}; correct that, or choose another out=FOLDER ({cfg.out} now)"
        ) from None


if __name__ == "__main__":
    main()
