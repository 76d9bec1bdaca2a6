"""Verify a shard folder, report what is in it, and repair it.

    python data_prep/check.py FOLDER [FOLDER ...] [--decode N|all] [--repair] [--report FILE.html]

FOLDER is a shard folder (OUT/SOURCE/SPLIT) or a tree with some (OUT), local or at any fsspec URL; only splits given together
are compared for leakage.
Checks sizes, sha256, tar members and CRC-32 against index.json, the metadata against the pictures, and decodes N clips of
each folder (100) or all. Prints a summary and writes the page FOLDER/check.html (of a URL ./check.html), with clips to look at
and listen to.
Exit code: 0 all is well, 1 findings, 2 a folder that cannot be checked.

--repair decodes all, rewrites corrupt shards without the corrupt clips, index.json to match, and adds these clips to
quarantine.jsonl. The folder is then checked again. Leakage stays: that is for the annotations.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from clip4vla.cli import entry_point, path_word  # noqa: E402
from clip4vla.errors import UserError  # noqa: E402
from clip4vla.quick_imports import quick_imports  # noqa: E402


def _arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folders", nargs="+", type=path_word, metavar="FOLDER")
    parser.add_argument("--decode", default="100", metavar="N|all", help="clips of a folder to decode (default 100)")
    parser.add_argument("--repair", action="store_true", help="drop corrupt clips; implies --decode all")
    parser.add_argument(
        "--report", type=path_word, metavar="FILE.html", help="default: check.html in the first FOLDER, for a URL here"
    )
    args = parser.parse_args()
    if args.decode != "all" and not args.decode.isdecimal():
        raise UserError(f"command line: --decode takes a number or all, not {args.decode!r}")
    if "://" in (args.report or ""):
        raise UserError(f"command line: --report takes a local file, not {args.report}")
    args.decode = None if args.decode == "all" else int(args.decode)
    return args


@entry_point
def main() -> None:
    """Check, perhaps repair, print and write the page."""
    args = _arguments()
    with quick_imports():  # after the words are read: a typing error shows at once
        from data_prep.checks.folders import inspect
        from data_prep.checks.page import drawn, summary, write_page
        from data_prep.checks.shard import ClipStats

    decode = None if args.repair else args.decode
    reports = inspect(args.folders, decode, args.repair)
    tally = ClipStats.sum([report.tally for report in reports])
    print(summary(reports, tally), flush=True)
    page = Path(args.report or ("check.html" if "://" in args.folders[0] else Path(args.folders[0], "check.html")))
    decoded = "all clips" if decode is None else f"{decode} clips a folder"
    write_page(page, reports, tally, decoded, drawn(reports))
    print(f"page: {page}")
    sys.exit(any(report.findings for report in reports))


if __name__ == "__main__":
    main()
