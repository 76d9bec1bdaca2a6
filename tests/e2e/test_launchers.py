"""Ranks under the real launchers on two nodes and one, and ranks that fail, die or hang: who is named, once, and how soon."""

import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from forks import ROOT
from running import PATIENCE, STEPS, free_port, job, run, trace

from clip4vla.distributed import collectives
from clip4vla.distributed.watchdog_server import GRACE, Rank, WatchdogServer
from clip4vla.errors import UserError
from clip4vla.report.tracking import read_rows

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def endless(tiny):
    """A run that only a signal ends."""
    return [*tiny, "train.max_steps=5000", "train.save_every=5000"]


@pytest.fixture(scope="module")
def stopped(endless, tmp_path_factory):
    """(run folder, exit code, stderr) of the other one of two ranks, after one was stopped."""
    folder = tmp_path_factory.mktemp("stopped")
    with job(2, "launch/pretrain.py", *endless, f"run_dir={folder}", "train.hang_timeout_minutes=0.2") as started:
        reaches(folder, STEPS)
        os.kill(started.ranks[1].pid, signal.SIGSTOP)
        started.ranks[0].join(PATIENCE)
        return folder, started.ranks[0].exitcode, started.said("err")


def reaches(run_dir: Path, step: int, patience: float = PATIENCE) -> None:
    """Return when that step is logged; seconds of patience: launchers import torch in a process of their own, each."""
    end = time.monotonic() + patience
    while not (run_dir / "metrics.jsonl").exists() or len(read_rows(run_dir)) < step:
        assert time.monotonic() < end, f"step {step} never came"
        time.sleep(0.1)


def first(run_dir: Path) -> list[tuple[float, ...]]:
    """Losses of the first steps."""
    return list(trace(run_dir).values())[:STEPS]


@pytest.fixture
def start():
    """start(LAUNCHER, *WORDS): a launcher of .venv/bin as a process; it is gone after the test, with its ranks."""
    started = []

    def run(*words: object) -> psutil.Popen:
        env = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        command, pipe = [str(BIN / str(words[0])), *map(str, words[1:])], subprocess.PIPE
        started.append(psutil.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield run
    for launcher in started:
        for process in [*launcher.children(recursive=True), launcher] if launcher.is_running() else []:
            process.kill()
        launcher.communicate()


def errors(*stderr: str) -> list[str]:
    """What is said to have gone wrong."""
    return [line for text in stderr for line in text.splitlines() if line.startswith("error: ")]


def test_a_stopped_rank_is_named_by_the_others(stopped):
    _, code, said = stopped
    (line,) = errors(said)
    assert (
        code == 1
        and "nothing moved for 0.2 min (train.hang_timeout_minutes): rank 1 (" in line
        and "no sign of life" in line
    )


def test_two_nodes_by_a_hostfile_give_the_losses_of_one_and_a_killed_rank_ends_both(start, stopped, endless, tmp_path):
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    both = ["--hostfile", tmp_path / "hosts", "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    words = ["launch/pretrain.py", *endless, f"run_dir={tmp_path / 'r'}"]
    nodes = [start("deepspeed", *both, "--node_rank", node, *words) for node in range(2)]
    reaches(tmp_path / "r", STEPS)
    (rank,) = (p for p in nodes[1].children(recursive=True) if "--local_rank=0" in p.cmdline())
    rank.kill()
    killed = time.monotonic()
    (line,) = errors(*(node.communicate(timeout=PATIENCE)[1] for node in nodes))
    assert time.monotonic() - killed < 60 and all(node.returncode for node in nodes)
    assert "error: rank 1 (" in line and "died without a word, last seen at step" in line
    assert first(tmp_path / "r") == first(stopped[0])


def test_torchrun_gives_the_same_losses_and_saves_when_it_is_terminated(start, stopped, endless, tmp_path):
    port = ["--master-port", free_port()]
    run = start("torchrun", "--nproc-per-node=2", *port, "launch/pretrain.py", *endless, f"run_dir={tmp_path / 'r'}")
    reaches(tmp_path / "r", STEPS)
    run.terminate()
    assert not errors(run.communicate(timeout=PATIENCE)[1]) and run.returncode
    assert first(tmp_path / "r") == first(stopped[0])
    assert list((tmp_path / "r/checkpoints").glob("step-*"))


def test_an_error_of_one_rank_is_printed_once_and_ends_the_others(tiny, tmp_path):
    (tmp_path / "r/log.txt").mkdir(parents=True)  # only rank 0 writes there
    with job(2, "launch/pretrain.py", *tiny, f"run_dir={tmp_path / 'r'}") as started:
        for rank in started.ranks:
            rank.join(PATIENCE)
        said = started.said("err")
    assert [rank.exitcode for rank in started.ranks] == [1, 1]
    assert said.count("Traceback") == 1 and "IsADirectoryError" in said
    (line,) = errors(said)
    assert "error: rank 0 (" in line and line.endswith("failed at start-up: checkpoint:")


def test_an_interrupted_rank_ends_the_others_and_ranks_may_open_a_file_for_each_rank(endless, tmp_path):
    limit, most = resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    with job(2, "launch/pretrain.py", *endless, f"run_dir={tmp_path / 'r'}") as started:
        ranks = [psutil.Process(rank.pid) for rank in started.ranks]
        ranks[1].rlimit(limit, (256, most))
        reaches(tmp_path / "r", 1)
        assert ranks[1].rlimit(limit) == (most, most)
        ranks[1].send_signal(signal.SIGINT)
        started.ranks[0].join(PATIENCE)  # train.hang_timeout_minutes is far longer
        said, code = started.said("err"), started.ranks[0].exitcode
    (line,) = errors(said)
    assert code == 1 and "error: rank 1 (" in line and "died without a word" in line


def test_a_signal_during_start_up_saves_and_exits_85(endless, tmp_path):
    with job(1, "launch/pretrain.py", *endless, f"run_dir={tmp_path / 'r'}") as one:
        while not (tmp_path / "r/config.yaml").exists():  # before the engine starts
            assert one.ranks[0].is_alive(), one.said("err")
            time.sleep(0.01)
        os.kill(one.ranks[0].pid, signal.SIGUSR1)
        assert one.wait().returncode == 85, one.said("err")
    assert max(trace(tmp_path / "r")) <= 2 and list((tmp_path / "r/checkpoints").glob("step-*"))


def test_data_that_never_comes_ends_the_run_with_what_it_waited_for(tiny, sample_shards, tmp_path):
    shutil.copytree(sample_shards / "speech_fr/train", tmp_path / "s")
    for tar in (tmp_path / "s").glob("*.tar"):
        tar.unlink()
        os.mkfifo(tar)  # opening it waits for a writer that never comes: a file server that is gone
    words = [*tiny, f"data.train={tmp_path / 's'}", f"run_dir={tmp_path / 'r'}", "train.hang_timeout_minutes=0.2"]
    with job(1, "launch/pretrain.py", *words) as started:
        started.ranks[0].join(90)
        said, code = started.said("err"), started.ranks[0].exitcode
    (line,) = errors(said)
    assert code == 1 and line.endswith("at step 1: data")
    assert "MainThread:" in said and "shards.py" in said, said  # the stacks tell who reads


RANK = """
import os, resource, sys, time
from pathlib import Path
from clip4vla.distributed.watchdog import watch

def read_a_shard():
    time.sleep(60)

rank, word = int(sys.argv[1]), Path(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, [resource.getrlimit(resource.RLIMIT_NOFILE)[1]] * 2)
held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]  # as in a job of a thousand ranks
watch.enabled = True
if rank == 0:
    word.with_suffix(".new").write_text(watch.start_server(3))
    word.with_suffix(".new").rename(word)
while not word.exists():
    time.sleep(0.01)
watch.join(word.read_text(), "127.0.0.1", rank, 3, minutes=0.03)
watch.progress("step 1: data")
if rank == 1:
    read_a_shard()
watch.progress("step 1: forward and backward")
time.sleep(60)
"""


def test_the_rank_that_the_others_wait_for_is_named_with_its_calls(tmp_path):
    words, pipe = [sys.executable, "-c", RANK], subprocess.PIPE
    trio = [subprocess.Popen([*words, str(r), tmp_path / "word"], stderr=pipe, text=True, cwd=ROOT) for r in range(3)]
    said = [process.communicate(timeout=PATIENCE)[1] for process in trio]
    assert [process.returncode for process in trio] == [1, 1, 1] and said[1:] == ["", ""]
    line = said[0].splitlines()[0]
    assert "rank 1 (" in line and line.endswith("at step 1: data; the others (2) at step 1: forward and backward")
    assert "in read_a_shard" in said[0]


FAILS = """
import sys
from clip4vla.distributed.watchdog import watch
sys.stdout = open("/dev/full", "w") if sys.argv[1] == "full" else None
print("not written yet")
watch.join(watch.start_server(2), "127.0.0.1", 0, 2, minutes=60)
watch.fail(3, "ValueError: boom")
"""


@pytest.mark.parametrize("stdout", ["full", "none"])
def test_an_error_is_reported_though_stdout_cannot_be_written(stdout):
    words = [sys.executable, "-c", FAILS, stdout]
    done = subprocess.run(words, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=PATIENCE)
    assert done.returncode == 3 and "failed at start-up:\nValueError: boom" in done.stderr


def test_only_a_job_in_which_no_rank_moves_is_hung_and_the_silent_ranks_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", os.fdopen(os.pipe()[0]))
    server = WatchdogServer(3)
    ranks = [Rank(socket.socketpair()[0]) for _ in range(3)]

    def report(number: int, **words: object) -> None:
        server._on_rank_message(ranks[number], json.dumps(words).encode())

    def turns(count: int, *passed: int) -> None:  # of the ranks that say something
        for _ in range(count):
            server.turn += 1
            for number, places in enumerate(passed):
                report(number, passed=places, place="start-up")
            server._check_for_hang()

    for number in range(3):
        report(number, token=server.token, rank=number, host="h", limit=5)
    for places in range(12):
        turns(5, places, 3, 3)  # rank 0 alone is at work
    assert not server.ended_at
    turns(1, 12, 12, 12)
    turns(5 + GRACE, 12, 12)  # rank 2 is stopped
    assert not server.ended_at
    turns(1, 12, 12)
    (line,) = errors(capsys.readouterr().err)
    assert server.ended_at and ": rank 2 (h) at start-up; no sign of life" in line
    assert line.endswith("; the others (2) at start-up")


def test_the_watchdog_server_ignores_who_lacks_the_token(monkeypatch):
    monkeypatch.setattr(sys, "stdin", os.fdopen(os.pipe()[0]))
    server, stranger = WatchdogServer(2), Rank(socket.socketpair()[0])
    posing = {"token": "guessed", "rank": 1, "host": "h", "limit": 0, "code": 1, "error": "boom"}
    for line in (b"GET / HTTP/1.0\r", json.dumps(posing).encode(), b'{"over": true}'):
        server._on_rank_message(stranger, line)
    assert not server.ranks and server.error is None


def test_a_watchdog_server_that_cannot_be_reached_is_one_line(monkeypatch):
    for name, value in zip(collectives.NAMES, "001", strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(collectives.watch, "enabled", True)
    port = free_port()  # as behind a firewall
    monkeypatch.setattr(collectives.watch, "start_server", lambda world: f"{port} token")
    with pytest.raises(UserError, match=rf"^127\.0\.0\.1:{port}: rank 0 \(.*cannot reach the watchdog.*refused"):
        collectives.setup(1)
    dist.destroy_process_group()


def test_what_the_launcher_left_out_is_one_line():
    names = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    done = run("launch/pretrain.py", env=names)
    assert done.returncode == 2 and done.stderr.startswith(
        "error: MASTER_ADDR, MASTER_PORT not set: start the ranks with"
    )
    assert len(errors(done.stderr)) == done.stderr.count("\n") == 1
    assert "error: RANK, LOCAL_RANK, " in run("launch/pretrain.py", env={"WORLD_SIZE": "2"}).stderr


@pytest.mark.parametrize(
    "given", ["WORLD_SIZE=1 RANK=0", "WORLD_SIZE=1", "WORLD_SIZE=1 RANK= LOCAL_RANK=", "RANK= WORLD_SIZE="]
)
def test_a_single_rank_needs_no_other_name(given, monkeypatch):
    """As PyTorchJob and shells with left-over names set them."""
    for name in (*collectives.NAMES, *given.split()):
        monkeypatch.delenv(name, raising=False) if "=" not in name else monkeypatch.setenv(*name.split("="))
    collectives.setup()
    assert (dist.get_rank(), dist.get_world_size(), os.environ["LOCAL_RANK"]) == (0, 1, "0")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "given, message",
    [
        ("WORLD_SIZE=two RANK=0 LOCAL_RANK=0 MASTER_PORT=1", "WORLD_SIZE=two: launchers set it to a whole number"),
        ("WORLD_SIZE=1 LOCAL_WORLD_SIZE=x", "LOCAL_WORLD_SIZE=x: launchers set it to a whole number"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 MASTER_PORT=99999", "the ranks did not meet at 127.0.0.1:99999: port must"),
        ("SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=1 MASTER_PORT=1", "LOCAL_RANK not set: start the ranks with"),
    ],
)
def test_names_that_no_launcher_sets_are_one_line(given, message, monkeypatch):
    for name in (*collectives.NAMES, "MASTER_ADDR=127.0.0.1", *given.split()):
        monkeypatch.delenv(name, raising=False) if "=" not in name else monkeypatch.setenv(*name.split("="))
    with pytest.raises(UserError) as caught:
        collectives.setup(1)
    assert str(caught.value).startswith(message)


def test_a_rank_0_that_is_stopped_before_the_ranks_meet_keeps_nobody_waiting():
    """Its machine goes on taking connections, on which torch's store has no time limit."""
    code = "from clip4vla.distributed import collectives as distributed; distributed.LATE = 1; distributed._join('gloo', -0.97)"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(silent.getsockname()[1])}
        env = os.environ | where | {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE
        )
    (line,) = errors(done.stderr)
    assert done.returncode == 1 and "did not meet" in line and line.endswith("does not answer (stopped?)")


def test_a_command_line_above_that_is_no_text_hurts_nobody():
    """A folder's name in Latin-1."""
    script = b"%s -c 'import clip4vla.distributed.watchdog'; : \xe9t\xe9" % os.fsencode(sys.executable)
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
