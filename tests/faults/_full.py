"""Full disks: every command on a tmpfs that ends somewhere in what the command writes, and again with room."""

import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from forks import ROOT
from running import run, wait_for

from faults._disk import Disk, contents, refused, well
from faults._small import Command, Small, losses


class Case(NamedTuple):
    """A command on the disk. made: what it writes, removed before each try; result: what must be the same afterwards."""

    command: Command
    made: list[Path]
    result: Callable[[], Any]
    sizes: int
    same: bool = True  # each file as soon as it has its name


def cases(disk: Path, small: Small, scale: float) -> dict[str, Case]:
    """Every command that writes, and at how many sizes of the disk it is tried."""
    out, clip, run_dir, model = disk / "out", disk / "data", disk / "run", small.model()
    small.copy(clip)
    well(small.train(run_dir, "eval.every_steps=0"), "run")
    page, idx, exported, imported = run_dir / "comparison.html", disk / "idx", disk / "exported", disk / "imported"
    whole = lambda place: lambda: contents(place)  # noqa: E731
    embed = lambda: run("data_prep/embed.py", *small.words(disk / "none", shards=clip))  # noqa: E731
    evaluate = lambda: run("launch/evaluate.py", *small.words(run_dir, "eval.every_steps=0"))  # noqa: E731
    export = lambda: run("launch/export.py", run_dir, exported)  # noqa: E731
    found = {
        "shard": (lambda: small.shard(out), [out], whole(out), 24),
        "embed": (embed, [clip / s / "clip" for s in _splits(clip)], lambda: _vectors(clip), 12),
        "evaluate": (evaluate, [run_dir / "eval", run_dir / "report.html"], lambda: _evaluated(run_dir), 10),
        "report": (lambda: run("launch/report.py", run_dir), [page], lambda: _page(page), 4),
        "check": (lambda: run("data_prep/check.py", clip), [clip / "check.html"], lambda: _page(clip / "check.html"), 4),
        "export": (export, [exported], whole(exported), 8),
        "convert": (lambda: run("launch/convert.py", small.clip, imported), [imported], whole(imported), 4),
        "search": (lambda: small.build(idx, model), [idx], lambda: _items(idx), 14),
    }  # fmt: skip
    for name, words in {"train": ["eval.every_steps=3"], "train, in the background": ["train.save_async=true"]}.items():
        fresh = disk / "fresh"
        begin = lambda words=words, fresh=fresh: small.train(fresh, *words)  # noqa: E731
        found[name] = (begin, [fresh], lambda fresh=fresh: losses(fresh), 12)
    two = disk / "two"
    found["train, two ranks"] = (lambda: small.train(two, "eval.every_steps=3", count=2), [two], lambda: losses(two), 6)
    exact = ("shard", "export", "convert")
    return {name: Case(*case[:3], max(1, round(case[3] * scale)), name in exact) for name, case in found.items()}


def fill(disk: Disk, name: str, case: Case, rng: random.Random) -> dict[str, int]:
    """Try a case at sizes spread over what it writes: how many were too small, and how many were enough."""
    _remove(case.made)
    before = disk.used()
    well(case.command(), f"{name}: undisturbed")
    wanted, need, files = case.result(), disk.used() - before, contents(disk.folder)
    outcomes = {"refused": 0, "enough": 0}
    for number in range(case.sizes):
        disk.start_decoding()
        _remove(case.made)
        # a third of them where the small files are that come first
        kib = (
            rng.randrange(0, 40) if number % 3 == 2 else rng.randrange(number * need, (number + 1) * need) // case.sizes
        )
        disk.leave(kib)
        what = f"{name}: {kib} of {need} KiB left"
        done = case.command()
        outcomes["refused" if done.returncode else "enough"] += 1
        if done.returncode:
            refused(done, what)
            _whole(disk.folder, files if case.same else {}, what)
        disk.start_decoding()
        well(case.command(), f"{what}, then made room")
        assert case.result() == wanted, f"{what}, then made room: another result"
    _remove(case.made)
    return outcomes | {"KiB": need}


def while_it_logs(disk: Disk, small: Small, rng: random.Random, times: int) -> dict[str, int]:
    """The disk is full from some step on, when the run writes nothing but its logs."""
    words = ("train.max_steps=60", "train.save_every=60", "eval.every_steps=0")
    other = disk.folder / "logged"
    well(small.train(other, *words), "logs")
    wanted = losses(other)
    for _ in range(times):
        shutil.rmtree(other)
        step = rng.randrange(2, 12)
        with small.training(other, *words) as begun:
            wait_for(other / "metrics.jsonl", step)
            disk.leave(0)
            refused(begun.wait(60), f"full at step {step}")
        disk.start_decoding()
        well(small.train(other, *words), f"full at step {step}, then made room")
        assert losses(other) == wanted, f"full at step {step}: other losses"
    shutil.rmtree(other)
    return {"refused": times}


def no_stdout(small: Small) -> None:
    """What is printed has no room either."""
    words = [sys.executable, "data_prep/shard.py", "configs/data/sample.yaml", f"out={small.folder / 'unsaid'}"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    refused(done, "stdout is full")


def _whole(folder: Path, files: dict[str, str], what: str) -> None:
    """Nothing has its name that is not complete."""
    for page in folder.rglob("*.html"):
        assert page.read_text().endswith("</html>\n"), f"{what}: half of {page}"
    for name, digest in contents(folder).items():
        assert files.get(name, digest) == digest, f"{what}: half of {name}"


def _remove(places: list[Path]) -> None:
    for place in places:
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)


def _splits(shards: Path) -> list[str]:
    return sorted(str(file.parent.relative_to(shards)) for file in shards.glob("*/*/index.json"))


def _vectors(shards: Path) -> dict[str, str]:
    """Less the notes, which say how long it took."""
    return {name: digest for name, digest in contents(shards).items() if "/clip/" in name and ".parts" not in name}


def _evaluated(run_dir: Path) -> dict[str, str]:
    return contents(run_dir / "eval/test") | {"page": str(_page(run_dir / "report.html"))}


def _page(page: Path) -> bool:
    """Whether it is whole; two pages differ in the dates of their pictures."""
    return page.read_text(encoding="utf-8").endswith("</html>\n")


def _items(index: Path) -> list[tuple]:
    """What is in a search index."""
    with sqlite3.connect(index / "items.sqlite") as db:
        return db.execute("SELECT shown, vector FROM items ORDER BY shown").fetchall()
