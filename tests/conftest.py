"""Shared fixtures: the shipped real sample as shards, ranks as processes, commands run as a user runs them."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
from forks import ROOT, Job, stop_server  # noqa: E402

STEPS = 8  # of a tiny run
PATIENCE = 300  # s that a test waits for what takes seconds on a machine with nothing else to do
TINY = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2},
}

NARROW = TINY | {"text_cfg": TINY["text_cfg"] | {"width": 16}}  # most of TINY's weights are its tokens'


@pytest.fixture(autouse=True)
def ranks_names():
    """What a test in this process leaves of a launcher's names would make ranks of the scripts that later tests start."""
    before = {name: os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    yield
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@pytest.fixture(scope="session")
def sample_shards(tmp_path_factory) -> Path:
    """Shards of tests/sample: SOURCE/SPLIT folders."""
    out = tmp_path_factory.mktemp("shards")
    done = run("data_prep/shard.py", "configs/data/sample.yaml", f"out={out}")
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def tiny(sample_shards, tmp_path_factory):
    """Words that make any config tiny: a small CLIP, few steps, the shipped sample."""
    clip = tmp_path_factory.mktemp("clip") / "tiny.json"
    clip.write_text(json.dumps(NARROW))
    speech, sounds = (sample_shards / s / "train" for s in ("speech_fr", "sounds"))
    return [
        "configs/pretrain/sample.yaml", "init_from=[]", f"model.clip={clip}", "train.precision=fp32", "track.wandb=off",
        f"data.train={{{speech}: 0.5, {sounds}: 0.5}}", "train.batch_size=12", f"train.max_steps={STEPS}",
        "train.lr=1e-3", "train.log_every=1", "train.save_every=2", "data.decode_threads=1",
        f"data.val=[{sample_shards}/speech_fr/val, {sample_shards}/sounds/val]", "eval.permutations=0",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def headed(tiny, tmp_path_factory):
    """Words of a tiny run whose text tower is as wide as a head, which starts from it."""
    clip = tmp_path_factory.mktemp("clip") / "tiny.json"
    clip.write_text(json.dumps(TINY))
    return [*tiny, f"model.clip={clip}"]


@pytest.fixture(scope="module")
def tuning(headed, sample_shards):
    """Words of a tiny fine-tuning run: picture, sound and text of spoken names."""
    return [
        *headed, "loss.tm=1", "loss.at=0", "loss.av=0", "loss.aa=0",
        f"data.train={sample_shards}/speech_fr/train",
        "model.train_towers=text+vision+audio", "model.fusion_layers=2", "eval.task=retrieval", "train.max_steps=4",
    ]  # fmt: skip


@pytest.fixture
def zero3(tmp_path) -> Path:
    """DeepSpeed's settings for ZeRO-3, which split even the smallest weights."""
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    )
    return tmp_path / "ds.json"


def trace(run_dir: Path) -> dict[int, tuple[float, ...]]:
    """Losses by step; json prints floats so that they come back to the last bit."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: tuple(v for k, v in sorted(row.items()) if k.startswith("loss")) for row in rows}


def optimizer_groups(checkpoint: Path) -> list[list[tuple[float, float]]]:
    """For each rank (share of the learning rate, weight decay) of the optimizer's groups when it wrote a checkpoint."""
    from clip4vla.universal import load_tensors

    states = [load_tensors(str(file))["optimizer_state_dict"] for file in sorted(checkpoint.glob("*_optim_states.pt"))]
    inner = [state.get("base_optimizer_state") or state["optimizer_state_dict"] for state in states]  # or of ZeRO-3
    return [[(group["lr_scale"], group["weight_decay"]) for group in state["param_groups"]] for state in inner]


def wait_for(file: Path, step: int) -> None:
    """Until that step stands in metrics.jsonl."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if file.exists() and re.search(rf'"step": {step},', file.read_text(encoding="utf-8")):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} never came")


@pytest.fixture(scope="session")
def no_java(tmp_path_factory):
    """An environment without Java: METEOR alone takes it ten seconds to start."""
    folder = tmp_path_factory.mktemp("bin")
    for tool in ("git", "uname"):
        (folder / tool).symlink_to(shutil.which(tool))
    return {"PATH": str(folder)}


@pytest.fixture(scope="module")
def server():
    """The proxy before a real server; this process's s3fs and its children's talk to it."""
    import s3  # moto and s3fs take a second

    from clip4vla import storage

    with s3.serve() as (proxy, env), pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        patch.setattr(storage, "PAUSE", 0.05)
        yield proxy


def run(
    *words: object, env: dict[str, str] | None = None, timeout: float = PATIENCE, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """A python script of the repository, from its root, as one process."""
    if str(words[0]).endswith(".py"):
        with job(1, *words, env=env, cwd=cwd) as started:
            return started.wait(timeout)
    return _call([sys.executable, *words], env, timeout)


def ranks(count: int, *words: object, env: dict[str, str] | None = None, timeout: float = PATIENCE):
    """The same on gloo ranks, without the seconds that a launcher and its imports take."""
    with job(count, *words, env=env) as started:
        return started.wait(timeout)


def job(count: int, *words: object, env: dict[str, str] | None = None, cwd: Path = ROOT) -> Job:
    """Started, not waited for; to be used in a `with` block. Its `ranks` are processes to kill and to signal."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    full = {"PATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
    return Job(count, [str(word) for word in words], full, free_port(), cwd)


def deepspeed(ranks: int, *words: object, timeout: float = PATIENCE) -> subprocess.CompletedProcess:
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


def pytest_sessionfinish() -> None:
    """In each worker."""
    stop_server()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """CPU seconds of the run: this process, its workers, and all scripts that they started and waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(part.ru_utime + part.ru_stime for part in usage)
    terminalreporter.write_line(f"{seconds:.0f} CPU seconds (user and system)")


LONGEST = (
    "test_demo",
    "test_train",
    "test_checkpoints",
    "test_bench",
    "test_modalities",
    "test_slurm",
)  # seconds, falling


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left with one when the other has nothing to do."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
