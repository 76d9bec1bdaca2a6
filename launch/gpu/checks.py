"""The checks of the first minutes on a GPU, the most valuable first, each a command with a time limit of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from clip4vla.io.atomic import write_text

ROOT = Path(__file__).resolve().parents[2]
LEAST = 10  # s: with less left, no check starts
TAIL = 2000  # characters kept of what a command printed


class Check(NamedTuple):
    """Name a command of the repository and the seconds that it may take."""

    name: str
    command: str
    seconds: int


CHECKS = (
    Check("tests", "python -m pytest -q -m gpu -p no:cacheprovider -n 8 --dist worksteal tests/e2e/test_gpu.py", 180),
    Check("step", "python launch/bench.py step --rounds 2", 75),
    Check("step_compiled", "python launch/bench.py step --rounds 2 --compile inductor", 100),
    Check("loss", "python launch/bench.py loss --n 32768", 40),
    Check("loader", "python launch/bench.py loader --rounds 2", 60),
    Check("embed", "python launch/bench.py embed --rounds 2", 50),
    Check("engines", "python launch/bench.py engines", 90),
    Check("demo", "bash launch/demo.sh sample", 120),
    Check("evaluate", "python launch/evaluate.py configs/pretrain/sample_clip.yaml", 30),
)


def run_all(checks: tuple[Check, ...], seconds: float, out: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Run checks while time is left, and write the results to `out` whenever one ends: {**about, "checks": by name, "skipped"}.

    A check gets its own limit, or what is left of `seconds` if that is less; those that then cannot start are skipped.
    """
    end = time.monotonic() + seconds
    results: dict[str, Any] = {**about, "checks": {}, "skipped": {check.name: "not reached" for check in checks}}
    for check in checks:
        left = end - time.monotonic()
        if left < LEAST:
            results["skipped"][check.name] = f"{left:.0f} s were left"
        else:
            del results["skipped"][check.name]
            results["checks"][check.name] = run(check, min(check.seconds, left))
        write_text(out, json.dumps(results, indent=1) + "\n")
        _say(check.name, results)
    return results


def run(check: Check, limit: float) -> dict[str, Any]:
    """Run a check for `limit` seconds at most: its command, seconds, exit code (None: stopped), and figures or last words."""
    start = time.monotonic()
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # whose python is this one
    process = subprocess.Popen(
        check.command.split(), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its ranks and workers too
        (out, err), code = process.communicate(), None
    result = {"command": check.command, "seconds": time.monotonic() - start, "exit": code}
    figures = _figures(out)
    if figures is not None and code == 0:
        return result | {"figures": figures}
    return result | {"stdout": out.decode(errors="replace")[-TAIL:], "stderr": err.decode(errors="replace")[-TAIL:]}


def _figures(out: bytes) -> dict[str, Any] | None:
    """Read the JSON object that a benchmark prints; None of what prints none."""
    try:
        tree = json.loads(out)
    except ValueError:
        return None
    return tree if isinstance(tree, dict) else None


def _say(name: str, results: dict[str, Any]) -> None:
    if name in results["skipped"]:
        print(f"{name}: skipped, {results['skipped'][name]}", flush=True)
        return
    done = results["checks"][name]
    state = {0: "ok", None: "stopped at its limit"}.get(done["exit"], f"failed, exit code {done['exit']}")
    print(f"{name}: {state}, {done['seconds']:.0f} s", flush=True)
