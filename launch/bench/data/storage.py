"""Benchmark `storage`: clips a second from a disk, from S3 on loopback, from the node's cache, far away and with faults.

The server is moto's, behind a proxy, in a process of its own on the same cores: what is shown is how much of the disk's rate
is left, not what a store can give. `faults`: 5% of the answers are errors 500 or cut half-way. `far`: every answer takes
30 ms more. `one_by_one`: the same ranges from there as plain fsspec reads them, one cat_file after the other.
`read` is ShardFolder.read in the order of training, `loader` the batches that training gets. Rounds alternate. CPU seconds
are those of the reader alone, the server's left out.
It needs: pip install -c constraints.txt -e '.[dev]'
"""

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from clip4vla.config import DataSources, MaskConfig
from clip4vla.data.loader import Loader
from clip4vla.data.sampler import TrainSampler
from clip4vla.data.shards import ShardFolder
from clip4vla.errors import UserError
from clip4vla.towers.tokenizer import tokenizer
from launch.bench.data.loader import MAX_TOKENS, SHARDS, TOWERS, add_arguments, check, make_shards

__all__ = ["add_arguments", "main"]

KINDS = ("json", "fbank", "frames")
NONE = {"fail": 0.0, "cut": 0.0, "slow": 0.0, "delay": 0.0}
FAULTS = {"faults": {"fail": 0.025, "cut": 0.025}, "far": {"slow": 1.0, "delay": 0.03}}
FAULTS["one_by_one"] = FAULTS["far"]


def main(args: argparse.Namespace) -> dict[str, Any]:
    """The figures."""
    check(args)
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder, "shards")
        shards.mkdir()
        made = make_shards(shards, args.clips)
        with server(shards) as tell:
            return made | compare(folder, tell, args.batch, args.rounds)


def compare(folder: str, tell: Callable[[dict[str, float]], int], batch: int, rounds: int) -> dict[str, Any]:
    """Clips/s of each side in alternated rounds, requests for a clip, and whether all gave the same bytes."""
    disk, remote = f"{folder}/shards", f"s3://{_s3().BUCKET}/bench"
    opened = {"disk": ShardFolder.open(disk), "cache": ShardFolder.open(remote, DataSources(cache=f"{folder}/cache"))}
    opened |= {name: ShardFolder.open(remote) for name in ("s3", *FAULTS)}
    sides = {f"read/{name}": (name, one_by_one if name == "one_by_one" else read) for name in opened}
    sides |= {f"loader/{name}": (name, load) for name in opened if name != "one_by_one"}
    digests = {name: read(opened[name], batch)[1] for name in opened if name != "one_by_one"}  # fills the cache, too
    one_by_one(opened["one_by_one"], batch)  # as those: what says where the samples are has been read
    load(opened["disk"], batch)  # warms up
    rates: dict[str, list[float]] = {side: [] for side in sides}
    cpu: dict[str, list[float]] = {side: [] for side in sides}
    requests = {}
    for _ in range(rounds):
        for side, (name, how) in sides.items():
            tell(NONE | FAULTS.get(name, {}))
            start, start_cpu = time.perf_counter(), time.process_time()
            clips, digest = how(opened[name], batch)
            rates[side].append(clips / (time.perf_counter() - start))
            cpu[side].append((time.process_time() - start_cpu) / clips)
            requests[side] = tell(NONE) / clips
            if digest:
                digests[side] = digest
    medians = {side: statistics.median(values) for side, values in rates.items()}
    ratios = {
        f"{how}_{name}_ratio": medians[f"{how}/{name}"] / medians[f"{how}/disk"]
        for how in ("read", "loader")
        for name in ("cache", "s3", "faults", "far")
    }
    ratios["concurrency_ratio"] = medians["read/far"] / medians["read/one_by_one"]
    figures: dict[str, Any] = {
        "clips_per_s": medians,
        "cpu_s_per_clip": {side: statistics.median(spent) for side, spent in cpu.items()},
    }
    figures |= {"rounds_clips_per_s": rates, "requests_per_clip": requests}
    return ratios | figures | {"batch": batch, "rounds": rounds, "same_bytes": len(set(digests.values())) == 1}


def _order(folder: ShardFolder, batch: int) -> TrainSampler:
    return TrainSampler([[shard.samples for shard in folder.shards]], [1.0], batch, 0, SHARDS)


def read(folder: ShardFolder, batch: int) -> tuple[int, str]:
    """(clips, digest) of an epoch's samples as bytes."""
    order, digest, batches = _order(folder, batch), hashlib.sha256(), len(folder) // batch
    for k in range(batches):
        for sample in folder.read([(place.shard, place.entry) for place in order.batch(k)], KINDS):
            assert isinstance(sample, dict), sample
            digest.update(b"".join(sample[kind] for kind in KINDS if kind in sample))
    return batches * batch, digest.hexdigest()


def one_by_one(folder: ShardFolder, batch: int) -> tuple[int, str]:
    """(clips, digest) of a first batch, by one request after the other; the rest would take long."""
    digest = hashlib.sha256()
    for place in _order(folder, batch).batch(0):
        members = folder.entries(place.shard)[place.entry][1]
        parts = {ext.partition(".")[0]: member for ext, member in members.items()}
        start = min(member.offset for member in parts.values())
        end = max(member.offset + member.size for member in parts.values())
        digest.update(folder.fs.cat_file(f"{folder.path}/{folder.shards[place.shard].name}", start=start, end=end))
    return batch, ""


def load(folder: ShardFolder, batch: int) -> tuple[int, str]:
    """Clips of an epoch's batches, as train.py gets them."""
    with tempfile.TemporaryDirectory() as log:
        loader = Loader(
            [folder], _order(folder, batch), folder.cfg, tokenize=tokenizer(TOWERS, MAX_TOKENS), mask=MaskConfig(), seed=0,
            needs=KINDS[1:], device=torch.device("cpu"), damage_log=Path(log, "corrupt.jsonl"),
        )  # fmt: skip
        made = sum(len(batch.ids) for batch in loader.batches(0, len(folder) // batch))
        assert loader.corrupt == 0
    return made, ""


@contextlib.contextmanager
def server(shards: Path) -> Iterator[Callable[[dict[str, float]], int]]:
    """A server process that holds these shards; tell(faults) sets its faults and gives the requests since the last time."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, shards), daemon=True)
    process.start()
    os.environ.update(here.recv())

    def tell(faults: dict[str, float]) -> int:
        here.send(faults)
        return here.recv()

    try:
        yield tell
    finally:
        process.kill()
        process.join()


def _serve(pipe: Any, shards: Path) -> None:
    s3 = _s3()
    with s3.serve() as (proxy, environment):
        s3.put(shards, "bench", proxy.port)
        pipe.send(environment)
        while True:
            proxy.__dict__.update(pipe.recv())
            pipe.send(len(proxy.seen))
            proxy.seen.clear()


def _s3() -> Any:
    try:
        from tests.helpers import s3
    except ImportError as error:
        raise UserError(f"bench.py storage: {error}; pip install -c constraints.txt -e '.[dev]'") from None
    return s3
