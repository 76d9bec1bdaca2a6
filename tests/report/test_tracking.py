"""What only watches a run ends none: wandb, the terminal, log.txt and the plot may fail, each for one warning."""

import json
import re

import pytest
from running import run

from clip4vla.report import tracking

KEY = "0" * 39 + "7"
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from clip4vla.config import RunConfig
from clip4vla.report.tracking import Tracker

def core():
    tasks = [Path(f"/proc/self/task/{task}/children").read_text().split() for task in os.listdir("/proc/self/task")]
    pids = [pid for some in tasks for pid in some]
    return [int(pid) for pid in pids if "wandb-core" in Path(f"/proc/{pid}/comm").read_text()]

for name in sys.argv[1:]:
    cfg = RunConfig(run_dir=name)
    Path(cfg.run_dir).mkdir()
    os.environ["WANDB_MODE"] = name.partition("-")[0]
    tracker = Tracker(cfg, 0)
    tracker.rows_of([{"step": 1, "loss": 2.0}])
    while name.endswith("killed") and not [*Path(name).glob("wandb/offline-run-*")]:
        time.sleep(0.05)  # its process makes the folder when it comes to it
    for pid in core() if name.endswith("killed") else ():
        os.kill(pid, signal.SIGKILL)
    for step in range(2, 5):
        time.sleep(0.5 * name.endswith("killed"))  # a thread of wandb's sees that its process is gone
        tracker.rows_of([{"step": step, "loss": 2.0}])
    tracker.close()
    print(name, "ended", file=sys.stderr, flush=True)
"""


def warnings(done) -> list[str]:
    return re.findall(r"^WARNING:root:(.*)", done.stderr, re.M)


def test_wandb_obeys_wandb_mode_and_goes_on_offline_where_it_fails(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "1"}
    done = run("script.py", "disabled", "offline-killed", "online", env=env, cwd=tmp_path)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "disabled/wandb").exists()
    for name, count in {"offline-killed": 2, "online": 1}.items():
        assert len([*(tmp_path / name).glob("wandb/offline-run-*")]) == count, name
        rows = [json.loads(line)["step"] for line in (tmp_path / name / "metrics.jsonl").open()]
        assert rows == [1, 2, 3, 4]
    ended = re.findall(
        r"^WARNING:root:track.wandb: .*; the run goes on, and wandb sync (.*)/wandb|^(.*) ended", done.stderr, re.M
    )
    assert ["".join(pair) for pair in ended] == ["disabled", "offline-killed", "offline-killed", "online", "online"]


def test_a_run_goes_on_without_all_that_only_watches(tiny, tmp_path):
    (tmp_path / "run/curves.png").mkdir(parents=True)
    words = [*tiny, "track.wandb=auto", "train.max_steps=21", "train.save_every=30", f"run_dir={tmp_path}/run"]
    done = run("launch/pretrain.py", *words, env={"WANDB_API_KEY": "short"})
    assert done.returncode == 0, done.stderr
    said = warnings(done)
    assert len(said) == 2 and all("the run goes on" in line for line in said), said
    assert [line.partition(":")[0] for line in said] == ["track.wandb", "curves.png"]
    assert [*(tmp_path / "run/wandb").glob("offline-run-*")] and [*(tmp_path / "run/checkpoints").glob("step-*21")]


PIPE = """
import os, sys
from clip4vla.config import RunConfig, TrackConfig
from clip4vla.report.tracking import Tracker
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
os.makedirs("run")
tracker = Tracker(RunConfig(run_dir="run", track=TrackConfig(wandb="off")), 0)
for step in range(1, 4):
    tracker.rows_of([{"step": step, "loss": 2.0}])
os.rename("run/log.txt", "log.txt")
os.mkdir("run/log.txt")
for step in range(4, 6):
    tracker.rows_of([{"step": step, "loss": 2.0}])
tracker.close()
"""


def test_a_terminal_and_a_log_that_are_gone_end_no_run(tmp_path):
    (tmp_path / "script.py").write_text(PIPE)
    done = run("script.py", cwd=tmp_path)
    assert done.returncode == 0 and "Exception ignored" not in done.stderr
    stdout, log = warnings(done)
    assert stdout == "stdout: [Errno 32] Broken pipe: the run goes on without it" and log.startswith(
        "log.txt: [Errno 21]"
    )
    assert [len((tmp_path / name).read_text().splitlines()) for name in ("log.txt", "run/metrics.jsonl")] == [3, 5]


def test_git_that_hangs_or_is_broken_is_an_unknown_commit(tmp_path, monkeypatch):
    git = tmp_path / "git"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for body in ("exit 3", r"printf '\377'"):
        git.write_text(f"#!/bin/sh\n{body}\n")
        git.chmod(0o755)
        assert tracking.git_commit() == "unknown"


def test_what_watches_is_a_warning_but_for_what_is_to_be_raised(caplog):
    with tracking.watching("page"):
        raise KeyError("x")
    with pytest.raises(OSError), tracking.watching("page", OSError):
        raise OSError("full")
    assert [record.getMessage() for record in caplog.records] == ["page: 'x': the run goes on without it"]
