"""`make lint`, beside the other tests: it takes one core for half a minute."""

import subprocess
import sys

from forks import ROOT


def test_ruff_and_mypy_find_nothing():
    words = ["make", "--assume-old", f"{sys.prefix}/installed", "lint", f"VENV={sys.prefix}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
