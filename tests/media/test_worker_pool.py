"""clip4vla/media/worker_pool.py: real processes that crash, are killed, and are stopped."""

import faulthandler
import os
import signal
import subprocess
import sys
import time

import pytest
from forks import ROOT
from running import PATIENCE

from clip4vla.errors import UserError
from clip4vla.media.worker_pool import run_units


def _crash_on_sevens(unit, failed_items, status):
    faulthandler.disable()  # pytest's, which would print a page
    for item in unit:
        status.start(item)
        if item % 10 == 7 and item not in failed_items:
            os.kill(os.getpid(), signal.SIGSEGV)
    return failed_items


def test_a_file_that_crashes_the_decoder_is_blamed_and_the_rest_goes_on():
    results = dict(run_units([range(10), range(10, 18), range(20, 26)], _crash_on_sevens, 2, 60, lambda _: None))
    why = "crashed the decoder (SIGSEGV)"
    assert results == {range(10): {7: why}, range(10, 18): {17: why}, range(20, 26): {}}


def _killed(unit, failed_items, status):
    status.start(unit)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_killed_from_outside_stops_the_run_with_one_line():
    with pytest.raises(UserError, match="killed at item 5 of 5 .* fewer workers"):
        list(run_units([5], _killed, 1, 60, lambda _: None))


def _slow(unit, failed_items, status):
    for item in unit:
        status.start(item)
        time.sleep(0.3)
    return failed_items


def test_time_in_which_all_stood_still_is_nobodys_fault():
    """Ctrl-Z, or a job that SLURM suspends: stopped for longer than the limit, nothing is given up."""
    code = "import sys; sys.path[:0] = ['.', 'tests/media', 'tests/helpers']\nfrom test_worker_pool import _slow, run_units\n"
    code += "print(dict(run_units([range(8)], _slow, 1, 2.5, lambda _: None)), flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                          start_new_session=True) as job:  # fmt: skip
        while len(subprocess.run(["pgrep", "-g", str(job.pid)], capture_output=True).stdout.split()) < 2:
            time.sleep(0.05)
        time.sleep(0.5)
        os.killpg(job.pid, signal.SIGSTOP)
        time.sleep(3.5)
        os.killpg(job.pid, signal.SIGCONT)
        assert job.communicate(timeout=PATIENCE)[0].strip() == "{range(0, 8): {}}"
