"""Shards that change between runs and under a run: what is corrupt is named, counted and survived, and repaired by check.py."""

import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

from running import run, wait_for

from clip4vla.data.shards import CorruptSample, ShardFolder
from faults._disk import refused, well
from faults._small import Small, damage, losses

KINDS = ("truncated", "flipped", "deleted", "emptied", "another")
LIMIT = 10  # corrupt samples that a run survives: data.max_corrupt_fraction of loader.MIN_READS


def members(tar: Path) -> dict[str, list[tuple[int, int]]]:
    """Where the bytes of each sample are, by tarfile."""
    places: dict[str, list[tuple[int, int]]] = {}
    with tarfile.open(tar) as archive:
        for info in archive:
            places.setdefault(info.name.partition(".")[0], []).append((info.offset_data, info.offset_data + info.size))
    return places


def spoil(tar: Path, kind: str, rng: random.Random) -> list[str]:
    """Damage a shard; the keys whose bytes are not what they were."""
    before, places = tar.read_bytes(), members(tar)
    if kind == "deleted":
        tar.unlink()
        return sorted(places)
    after = bytearray(before)
    if kind == "truncated":
        del after[rng.randrange(1, len(before)) :]
    elif kind == "flipped":
        start, end = rng.choice([place for some in places.values() for place in some])
        after[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    elif kind == "emptied":
        after.clear()
    else:
        _another(tar, after, places, rng)
    aside = tar.with_suffix(".new")
    aside.write_bytes(after)
    if rng.random() < 0.5:
        os.replace(aside, tar)  # another file under the name
    else:
        aside.unlink()
        tar.write_bytes(after)  # under the reader's feet
    return sorted(key for key, some in places.items() if any(after[a:b] != before[a:b] for a, b in some))


def _another(tar: Path, data: bytearray, places: dict[str, list[tuple[int, int]]], rng: random.Random) -> None:
    """A valid tar of the same size and names, with other bytes in every picture."""
    for start, end in (place for some in places.values() for place in some):
        data[start:end] = rng.randbytes(end - start)


def between(folder: Path, small: Small, kind: str, rng: random.Random) -> int:
    """A shard is corrupt before a run begins: how many samples that are."""
    shards = small.copy(folder / "data")
    tar = rng.choice(sorted(shards.glob("*/train/*.tar")))
    what, keys = f"{kind} {tar.name}", spoil(tar, kind, rng)
    listed = [{"shard": tar.name, "key": key} for key in keys for _ in range(2)]  # six steps are two epochs
    well(small.train(folder / "tolerant", "data.max_corrupt_fraction=1", shards=shards), what)
    found = sorted(
        ({"shard": d["shard"], "key": d["key"]} for d in damage(folder / "tolerant")), key=lambda d: d["key"]
    )
    assert found == listed, f"{what}: {found} listed, and corrupt were {listed}"
    done = small.train(folder / "strict", shards=shards)
    if len(listed) > LIMIT:
        assert "corrupt, more than data.max_corrupt_fraction" in refused(done, what)
    else:
        well(done, what)
    _mended(tar, keys, what)
    shutil.rmtree(folder)
    return len(keys)


def _mended(tar: Path, keys: list[str], what: str) -> None:
    """check.py names the damage, and makes a good folder of what is left."""
    place = tar.parent
    done = run("data_prep/check.py", place, "--decode", "all")
    assert done.returncode == 1 and f"{tar.name}:" in done.stdout or f"{tar.name} " in done.stdout, (
        f"{what}: {done.stdout}"
    )
    well(run("data_prep/check.py", place, "--repair"), f"{what}, repaired")
    left = ShardFolder.open(str(place))
    places = [(i, e) for i, shard in enumerate(left.shards) for e in range(shard.samples)]
    assert not any(isinstance(sample, CorruptSample) for sample in left.read(places)), f"{what}: repaired, and corrupt"
    dropped = [key for key in keys if f'"{key}"' in (place / "quarantine.jsonl").read_text()]
    assert dropped == keys and len(places) == 18 - len(keys), f"{what}: {dropped} of {keys} in quarantine"


def meanwhile(folder: Path, small: Small, kind: str, rng: random.Random) -> int:
    """A shard is corrupt while a run reads it, which goes on: how many readings failed."""
    shards, words = small.copy(folder / "data"), ("train.max_steps=40", "train.save_every=40", "eval.every_steps=0")
    tar = sorted(shards.glob("*/train/*-000000.tar"))[rng.randrange(2)]
    with small.training(folder / "run", *words, "data.max_corrupt_fraction=1", shards=shards) as begun:
        wait_for(folder / "run/metrics.jsonl", rng.randrange(3, 10))
        keys = spoil(tar, kind, rng)
        well(begun.wait(120), f"{kind} {tar.name} during a run")
    found = damage(folder / "run")
    wrong = [d for d in found if d["shard"] != tar.name or d["key"] not in keys]
    assert not wrong and (found or not keys), f"{kind} {tar.name} during a run: {wrong or 'not noticed'}"
    assert len(losses(folder / "run")) == 40
    shutil.rmtree(folder)
    return len(found)


def made_again(folder: Path, small: Small, rng: random.Random) -> str:
    """The whole folder is made again, with another index, while a run reads it: its one line."""
    shards = folder / "data"
    well(small.shard(shards), "shards")
    words = ("train.max_steps=4000", "train.save_every=4000", "eval.every_steps=0")
    with small.training(folder / "run", *words, shards=shards) as begun:
        wait_for(folder / "run/metrics.jsonl", rng.randrange(3, 10))
        well(small.shard(shards, "spectrogram.quality=80", "samples_per_shard=8"), "made again")
        said = refused(begun.wait(120), "made again during a run")
    shutil.rmtree(folder)
    return said.replace(str(folder), "...")


def campaign(folder: Path, small: Small, rng: random.Random, rounds: int) -> dict:
    """Every kind, that many times."""
    do: dict[str, Callable[..., int]] = {"between runs": between, "during a run": meanwhile}
    found = {
        when: {kind: [work(folder / "d", small, kind, rng) for _ in range(rounds)] for kind in KINDS}
        for when, work in do.items()
    }
    return found | {"made again during a run": made_again(folder / "d", small, rng)}
