"""Run parts of the campaign one after another; each writes docs/faults_PART.json: what was done, what came out, on what.

    make faults                                          all parts, seed 0
    PYTHONPATH=tests python -m faults kills --seed 7     one part

A part is a module beside this one: campaign(folder, seed) -> its figures, which raises AssertionError for what is not
survived; `folder` is empty and goes when the part ends.
"""

import argparse
import json
import sys
import tempfile
import time
import traceback
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[1:1] = [str(ROOT), str(ROOT / "tests/helpers")]

from clip4vla.report.tracking import git_commit  # noqa: E402
from launch.bench.common import machine, versions  # noqa: E402

PARTS = sorted(path.stem for path in HERE.glob("[a-z]*.py"))


def main() -> None:
    """The parts that the command line names."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__, formatter_class=raw)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(PARTS)}")
    failed = [part for part in args.parts or PARTS if not done(part, args.seed)]
    if failed:
        sys.exit(f"not survived: {', '.join(failed)}")


def done(part: str, seed: int) -> bool:
    """Whether a part survived; its figures are then in docs. One that did not does not keep the others from being run."""
    try:
        found = run(part, seed)
    except AssertionError:
        traceback.print_exc()
        return False
    file = ROOT / f"docs/faults_{part}.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(file, flush=True)
    return True


def run(part: str, seed: int) -> dict:
    """The figures of one part, with how they were made."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"faults-{part}-") as folder:
        found = import_module(f"faults.{part}").campaign(Path(folder), seed)
    command = f"PYTHONPATH=tests python -m faults {part} --seed {seed}"
    made = {"command": command, "minutes": round((time.monotonic() - start) / 60, 1), "git": git_commit()}
    return {"part": part, **found, **made, "versions": versions(), "machine": machine()}


if __name__ == "__main__":
    main()
