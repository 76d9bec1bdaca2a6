"""Shared fixtures: the shipped real sample as shards, ranks as processes, commands run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
from forks import ROOT, Job  # noqa: E402


@pytest.fixture(scope="session")
def sample_shards(tmp_path_factory) -> Path:
    """Shards of tests/sample: SOURCE/SPLIT folders."""
    out = tmp_path_factory.mktemp("shards")
    done = run("data_prep/shard.py", "configs/data/sample.yaml", f"out={out}")
    assert done.returncode == 0, done.stderr
    return out


def run(*words: object, env: dict[str, str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
    """A python script of the repository, from its root, as one process."""
    if str(words[0]).endswith(".py"):
        return ranks(1, *words, env=env, timeout=timeout)
    return _call([sys.executable, *words], env, timeout)


def ranks(count: int, *words: object, env: dict[str, str] | None = None, timeout: float = 300):
    """The same on gloo ranks, without the seconds that a launcher and its imports take."""
    with job(count, *words, env=env) as started:
        return started.wait(timeout)


def job(count: int, *words: object, env: dict[str, str] | None = None) -> Job:
    """Started, not waited for; to be used in a `with` block. Its `ranks` are processes to kill and to signal."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    full = {"PATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
    return Job(count, [str(word) for word in words], full, free_port())


def deepspeed(ranks: int, *words: object, timeout: float = 300) -> subprocess.CompletedProcess:
    """A launch script under the deepspeed launcher, on gloo ranks."""
    return _call(deepspeed_command(ranks, *words), None, timeout)


def deepspeed_command(ranks: int, *words: object) -> list[str]:
    """The command line, on a port of its own."""
    launcher = Path(sys.executable).parent / "deepspeed"
    return [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(free_port()), *map(str, words)]


def free_port() -> int:
    """A TCP port nobody listens on."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _call(words: list[object], env: dict[str, str] | None, timeout: float) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    full = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run([*map(str, words)], cwd=ROOT, env=full, capture_output=True, text=True, timeout=timeout)
