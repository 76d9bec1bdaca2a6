"""Shared fixtures: the shipped real sample as shards, ranks as processes, commands run as a user runs them."""

import gc
import json
import os
import resource
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
from forks import stop_server  # noqa: E402
from running import NARROW, STEPS, TINY, run  # noqa: E402


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
        "model.trainable_towers=text+vision+audio", "model.head_layers=2", "eval.task=retrieval", "train.max_steps=4",
    ]  # fmt: skip


@pytest.fixture
def zero3(tmp_path) -> Path:
    """DeepSpeed's settings for ZeRO-3, which split even the smallest weights."""
    (tmp_path / "ds.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}})
    )
    return tmp_path / "ds.json"


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

    from clip4vla.io import remote

    with s3.serve() as (proxy, env), pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        patch.setattr(remote, "PAUSE", 0.05)
        yield proxy


def pytest_collection_finish() -> None:
    """What is imported by now is never looked through for cycles again: that took a tenth of the suite's time."""
    gc.freeze()


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
    "test_manager",
    "test_bench",
    "test_modalities",
    "test_slurm",
)  # seconds, falling


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no worker is left with one when the other has nothing to do."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
