"""Read-only folders, two writers in one, and a clock that jumps."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import fsspec
from forks import ROOT
from running import run, wait_for

from clip4vla.config import DataSources
from clip4vla.data.shards import CorruptSample, ShardFolder
from clip4vla.io.range_cache import Cache
from faults._disk import Disk, contents, refused, well
from faults._small import SPLITS, Small, losses

FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
JUMPS = ("+3650d", "-3650d", "-1d", "+40d", "-2h", "+0")


def read_only(disk: Disk, small: Small) -> dict[str, int]:
    """Nothing can be written: one line each; and everything that only reads works."""
    place, model, free = disk.folder, small.model(), small.folder / "free"
    data, index, run_dir = small.copy(place / "data"), place / "idx", place / "run"
    shutil.copytree(ROOT / "tests/sample", place / "media")
    well(small.build(index, model), "index")
    well(small.train(run_dir), "run")
    disk.read_only()
    refusing: dict[str, Callable[[], CompletedProcess]] = {
        "shard": lambda: small.shard(place / "out"),
        "embed": lambda: run("data_prep/embed.py", *small.words(free / "none", shards=data)),
        "train": lambda: small.train(run_dir, "train.max_steps=8"),
        "train, two ranks": lambda: small.train(place / "new", count=2),
        "evaluate": lambda: run("launch/evaluate.py", *small.words(run_dir)),
        "report": lambda: run("launch/report.py", run_dir),
        "check": lambda: run("data_prep/check.py", data),
        "export": lambda: run("launch/export.py", run_dir, place / "exported"),
        "convert": lambda: run("launch/convert.py", small.clip, place / "imported"),
        "search build": lambda: small.build(index, model),
        "search build, new": lambda: small.build(place / "new", model),
        "search drop": lambda: small.search("drop", small.shards, "--index", index),
    }
    for name, command in refusing.items():
        refused(command(), f"read-only: {name}")
    reading = {
        "media": lambda: small.shard(free / "out", f"media_root={place}/media"),
        "shards": lambda: small.train(free / "run", "eval.every_steps=3", shards=data),
        "search query": lambda: small.search("query", "a dog", "--index", index),
        "check": lambda: run("data_prep/check.py", data, "--report", free / "check.html"),
        "report": lambda: run("launch/report.py", run_dir, "--out", free / "page.html"),
        "export": lambda: run("launch/export.py", run_dir, free / "exported"),
    }
    for name, command in reading.items():
        well(command(), f"read-only, to be read: {name}")
    assert losses(free / "run") == losses(run_dir)
    cached(small, place / "cache")
    disk.read_only(False)
    disk.leave(0)
    cached(small, place / "another cache")
    disk.start_decoding()
    shutil.rmtree(free)
    return {"refused": len(refusing), "read": len(reading), "cache": 2}


def cached(small: Small, cache: Path) -> None:
    """Remote samples through a cache that cannot be written: the bytes are those on the disk."""
    memory, local = fsspec.filesystem("memory"), ShardFolder.open(str(small.shards / SPLITS[0]))
    memory.put(f"{small.shards / SPLITS[0]}/", "/far/", recursive=True)
    far = ShardFolder.open("memory://far", DataSources(cache=str(cache)))
    places = [(i, e) for i, shard in enumerate(local.shards) for e in range(shard.samples)]
    found = far.read(places)
    assert found == local.read(places) and not any(isinstance(sample, CorruptSample) for sample in found)


def together(*commands: Callable[[], CompletedProcess]) -> list[CompletedProcess]:
    """Run at the same time."""
    ends: dict[int, CompletedProcess] = {}
    threads = [threading.Thread(target=lambda i=i, do=do: ends.update({i: do()})) for i, do in enumerate(commands)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [ends[i] for i in range(len(commands))]


def writers(folder: Path, small: Small) -> dict[str, int]:
    """Each command twice at once: one is well, the other too or it says in one line why not; what is written is as of one."""
    model, data, run_dir = small.model(), small.copy(folder / "data"), folder / "run"
    well(small.train(run_dir, "eval.every_steps=0"), "run")
    twice: dict[str, Callable[[], CompletedProcess]] = {
        "shard": lambda: small.shard(folder / "out"),
        "embed": lambda: run("data_prep/embed.py", *small.words(folder / "none", shards=data)),
        "evaluate": lambda: run("launch/evaluate.py", *small.words(run_dir)),
        "report": lambda: run("launch/report.py", run_dir),
        "search build": lambda: small.build(folder / "idx", model),
        "export": lambda: run("launch/export.py", run_dir, folder / "exported"),
        "train": lambda: small.train(folder / "two", "train.hang_timeout_minutes=0.02"),
    }
    refusals = {}
    for name, command in twice.items():
        ends = together(command, command)
        losers = [done for done in ends if done.returncode]
        assert len(losers) < 2, f"two writers: {name}: both failed\n{losers[0].stderr[-1500:]}"
        refusals[name] = sum(bool(refused(done, f"two writers: {name}")) for done in losers)
    assert contents(folder / "out") and _tars(folder / "out") == _tars(small.shards)
    assert losses(folder / "two") == losses(run_dir), "two trainers: other losses"
    return refusals | {"requeued": requeued(folder, small)}


def _tars(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(folder).items() if name.endswith(".tar")}


def requeued(folder: Path, small: Small) -> int:
    """A run begins while the one before it in the folder is dying: it waits, and goes on from the checkpoint."""
    words = ("train.max_steps=4000", "train.save_every=10", "eval.every_steps=0")
    with small.training(folder / "again", *words) as dying:
        wait_for(folder / "again/metrics.jsonl", 12)
        with small.training(folder / "again", *words, "train.max_steps=30") as begun:
            time.sleep(3)
            assert begun.ranks[0].is_alive(), begun.said("err")
            dying.ranks[0].kill()
            # the lr follows max_steps, so the losses are another run's; what counts is that it goes on
            well(begun.wait(120), "begun while another was dying")
    return len(losses(folder / "again"))


def clock(folder: Path, small: Small, seconds: float) -> dict[str, int | str]:
    """Commands under a wall clock that jumps by years: the results are those of a clock that does not."""
    folder.mkdir(exist_ok=True)
    future_entries(folder / "cache")
    if FAKETIME is None:
        return {"left out": "libfaketime is not installed (apt-get install faketime)"}
    words = ("train.max_steps=30", "train.save_every=30", "eval.every_steps=15", "train.hang_timeout_minutes=0.5")
    well(small.train(folder / "steady", *words), "steady")
    trained = jumping(
        folder, ["launch/pretrain.py", *small.words(folder / "run", *words, "train.save_every_minutes=0.02")], seconds
    )
    assert losses(folder / "run") == losses(folder / "steady"), "a clock that jumps: other losses"
    made = jumping(folder, ["data_prep/shard.py", "configs/data/sample.yaml", f"out={folder / 'out'}"], seconds)
    assert _tars(folder / "out") == _tars(small.shards), "a clock that jumps: other shards"
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.tar")}
    far = time.time() + 3e8
    for path in (folder / "out").rglob("*"):
        os.utime(path, (far, far))  # written while the clock was wrong
    well(small.shard(folder / "out"), "mtimes in the future")
    rewritten = [path for path in before if path.stat().st_mtime < time.time() + 1e8]
    assert not rewritten, f"made again for their times: {rewritten}"
    return {"jumps while training": trained, "jumps while sharding": made, "shards of the future kept": len(before)}


def jumping(folder: Path, words: list[object], seconds: float) -> int:
    """Run a script whose wall clock jumps every that many seconds; monotonic clocks go on, as they do in a kernel."""
    stamp = folder / "clock"
    stamp.write_text("+0\n")
    names = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(stamp), "FAKETIME_NO_CACHE": "1"}
    env = {**os.environ, **names, "DONT_FAKE_MONOTONIC": "1", "OMP_NUM_THREADS": "1"}
    begun = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    jumps, end = 0, time.monotonic() + 180
    while begun.poll() is None:
        assert time.monotonic() < end, f"{words[0]} hangs under a clock that jumps"
        time.sleep(seconds)
        aside = folder / "clock.new"
        aside.write_text(f"{JUMPS[jumps % len(JUMPS)]}\n")
        aside.replace(stamp)
        jumps += 1
    _, err = begun.communicate()
    assert begun.returncode == 0 and "Traceback" not in err, f"{words[0]} under a clock that jumps:\n{err[-2000:]}"
    return jumps


def future_entries(folder: Path) -> None:
    """What was cached while the clock was years ahead makes room too."""
    Cache(folder, 40 << 12).put({f"old {i}": b"x" * 4096 for i in range(40)})
    far = time.time() + 3e8
    for path in folder.rglob("*"):
        os.utime(path, (far, far))
    cache = Cache(folder, 40 << 12)
    cache.put({"new": b"y" * 4096})
    assert cache.get("new") == b"y" * 4096 and not cache.closed, "entries of the future stay without end"
