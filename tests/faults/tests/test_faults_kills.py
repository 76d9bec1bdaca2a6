"""A slice of the kill storm (tests/faults/kills.py), and what it found: orphans of a launcher, stopped workers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults import kills
from faults._kills import KILL, TERM, Kill, nothing_left, storm
from forks import ROOT
from running import PATIENCE

from clip4vla.config import RunConfig, TrackConfig
from clip4vla.report import tracking

SEED = 3


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> kills.Given:
    """Shards, a small CLIP, an undisturbed run and its vectors."""
    return kills.prepare(tmp_path_factory.mktemp("kills"))


def test_killed_while_it_saves_and_while_it_trains_a_run_ends_as_if_undisturbed(given, tmp_path):
    rng = random.Random(SEED)
    with nothing_left(tmp_path):
        blows = [
            Kill("rank 0", KILL, "partial", rng.uniform(0, 0.05)),
            Kill("rank 1", TERM, "saved", rng.uniform(0, 1)),
        ]
        found = storm(kills.Training(tmp_path / "run", given, more=kills.WRITER), blows, SEED)
    assert found.kills == 2 and found.starts == 3 and found.codes["85"] == 1


def test_shards_killed_in_a_worker_and_in_the_parent_have_the_bytes_of_an_undisturbed_run(given, tmp_path):
    with nothing_left(tmp_path):
        blows = [Kill("worker", KILL, "partial", 0.01), Kill("parent", KILL, "partial", 0.02)]
        found = storm(kills.Sharding(tmp_path / "shards", given), blows, SEED)
    assert found.kills == 2 and found.codes["2"] == 1


ONCE = """
import sys, time
sys.path.insert(0, ".")
from clip4vla.media.worker_pool import run_units

def once(unit, failed_items, status):
    status.start(0)
    time.sleep(1)
    return failed_items

print(dict(run_units(["unit"], once, 1, 2.0, lambda _: None)), flush=True)
"""


def test_a_worker_that_is_stopped_longer_than_the_limit_is_continued_and_its_item_not_blamed():
    with subprocess.Popen([sys.executable, "-c", ONCE], cwd=ROOT, stdout=subprocess.PIPE, text=True) as job:
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
        while not children.read_text(encoding="utf-8"):
            time.sleep(0.02)
        time.sleep(0.3)
        os.kill(int(children.read_text(encoding="utf-8").split()[0]), signal.SIGSTOP)
        assert job.communicate(timeout=PATIENCE)[0].strip() == "{'unit': {}}"


RANK = """
import os, sys, time
sys.path.insert(0, ".")
from clip4vla.distributed.watchdog import watch
watch.enabled = True
watch.join(watch.start_server(1), "127.0.0.1", 0, 1, 30.0)
print("joined", os.getpid(), flush=True)
time.sleep(60)
"""
RUNNER = "import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[1:]])\n"


def test_ranks_whose_launcher_is_killed_end_by_themselves(tmp_path):
    """Two processes of the launcher's names above a rank; the upper one is killed, as in `kill -9` of deepspeed's runner."""
    for name, text in (("rank.py", RANK), ("deepspeed", RUNNER), ("torchrun", RUNNER)):
        (tmp_path / name).write_text(text)
    words = [sys.executable, *(str(tmp_path / name) for name in ("deepspeed", "torchrun", "rank.py"))]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as top:
        assert top.stdout
        rank = int(top.stdout.readline().split()[1])
        time.sleep(1.5)
        assert Path(f"/proc/{rank}").exists()
        top.kill()
        said = top.communicate(timeout=PATIENCE)[1]  # ends when the last one of them has gone
    assert "the launcher is gone" in said and not Path(f"/proc/{rank}").exists()


def test_lists_of_samples_are_cut_to_the_step_resumed_from_whoever_wrote_them(tmp_path):
    cfg = RunConfig(run_dir=str(tmp_path), track=TrackConfig(wandb="off", log_sample_ids=True))
    (tmp_path / "samples").mkdir()
    for rank in (0, 1):
        rows = [json.dumps({"step": step, "ids": [f"{rank}-{step}"]}) for step in (1, 2, 3)]
        (tmp_path / f"samples/rank-0000{rank}.jsonl").write_text("\n".join(rows) + '\n{"step": 4, "i')
    tracker = tracking.Tracker(cfg, 2)
    tracker.took(3, [])
    tracker.close()
    assert kills.logged(tmp_path) == {
        "rank-00000.jsonl": [(1, ["0-1"]), (2, ["0-2"]), (3, [])],
        "rank-00001.jsonl": [(1, ["1-1"]), (2, ["1-2"])],
    }
