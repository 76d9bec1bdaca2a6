"""Shards and checkpoints on a real S3 server and plain HTTP, with faults: the same bytes as from disk, within bounded time."""

import dataclasses
import fcntl
import http.server
import json
import random
import resource
import socket
import threading
import time
from pathlib import Path

import fsspec
import pytest
import s3
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loading import loader
from running import PATIENCE, TINY, free_port, job, run, trace

from clip4vla.config import DataSources
from clip4vla.data.shards import INDEX, CorruptSample, ShardFolder, write_index, write_shard
from clip4vla.errors import UserError
from clip4vla.io import range_cache as cache
from clip4vla.io import remote
from clip4vla.io.range_cache import Cache

SHARDS, SAMPLES, SIZE = 3, 8, 100_000  # samples are further from each other than storage.GAP
QUICK = DataSources(request_timeout=1, retries=9)
EVERY = [(shard, entry) for shard in range(SHARDS) for entry in range(SAMPLES)]


def make(folder, seed=0):
    """Shards of random bytes, and what a read of them gives."""
    rng, shards, samples = random.Random(seed), [], {}
    folder.mkdir(exist_ok=True)
    for number in range(SHARDS):
        content = [(f"{number}-{i}", {"json": b"{}", "frames.jpg": rng.randbytes(SIZE)}) for i in range(SAMPLES)]
        shards.append(write_shard(folder / f"s-{number:06d}.tar", content))
        samples |= {
            (number, i): {"json": b"{}", "frames": members["frames.jpg"]} for i, (_, members) in enumerate(content)
        }
    write_index(folder, fingerprint={}, media_root=".", source="s", split="t", counts={}, shards=shards)
    return samples


@pytest.fixture(scope="module")
def samples(server, tmp_path_factory):
    """What is in the shards at url()."""
    folder = tmp_path_factory.mktemp("shards")
    content = make(folder)
    s3.put(folder, "set", server.port)
    return content


def url(server, scheme="s3", name="set"):
    place = f"{s3.BUCKET}/{name}"
    return f"s3://{place}" if scheme == "s3" else f"http://127.0.0.1:{server.server_port}/{place}"


def requests(server, ending=""):
    return [seen for seen in server.seen if seen[1].endswith(ending)]


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_with_errors_and_slow_and_cut_connections_the_bytes_are_those_on_disk(server, samples, scheme):
    wanted = random.Random(1).sample(EVERY, len(EVERY))
    with server.faults(fail=0.1, cut=0.1, slow=0.05, delay=2, done=[]):
        folder = ShardFolder.open(url(server, scheme), QUICK)
        while set(server.done) != {"fail", "cut", "slow"}:
            got = [folder.read(wanted[at : at + 4]) for at in range(0, len(wanted), 4)]
            assert sum(got, []) == [samples[place] for place in wanted]


@pytest.mark.parametrize("size", [999, 1000, 2000, 2001])
def test_a_whole_file_is_read_in_pieces(server, monkeypatch, size):
    monkeypatch.setattr(remote, "PIECE", 1000)
    data = random.Random(size).randbytes(size)
    fs, path = remote.open_folder(url(server, name="whole"))
    remote.call(fs, "pipe_file", path, data, cfg=QUICK, ACL="public-read")
    for scheme in ("s3", "http"):
        assert remote.read_file(*remote.open_folder(url(server, scheme, "whole")), QUICK) == data


def test_neighbours_are_one_request_and_nothing_far_is_read_along(server, samples):
    folder = ShardFolder.open(url(server), QUICK)
    server.seen.clear()
    assert folder.read([(0, 0), (1, 0), (2, 0)]) == [samples[shard, 0] for shard in range(SHARDS)]
    assert len(requests(server, "entries.jsonl")) == 1
    server.seen.clear()
    got = folder.read([(0, 6), (0, 2), (1, 4), (0, 3), (0, 2)])
    assert got == [samples[place] for place in [(0, 6), (0, 2), (1, 4), (0, 3), (0, 2)]]
    assert len(requests(server)) == 3
    ends = [asked.removeprefix("bytes=").split("-") for _, _, asked in requests(server)]
    assert sum(int(end) - int(start) for start, end in ends) < 4 * (SIZE + 2048)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 400_000), st.integers(0, 200_000)), max_size=12))
def test_any_ranges_through_threads_of_a_synchronous_file_system(wanted):
    files = [random.Random(i).randbytes(600_000) for i in range(2)]
    memory = fsspec.filesystem("memory")
    for i, data in enumerate(files):
        memory.pipe_file(f"/ranges/{i}", data)
    paths, starts = [f"/ranges/{i}" for i, _, _ in wanted], [start for _, start, _ in wanted]
    ends = [start + size for _, start, size in wanted]
    got = remote.read_ranges(memory, paths, starts, ends, QUICK)
    assert got == [files[i][start : start + size] for i, start, size in wanted]


def test_what_cannot_heal_is_asked_for_once(server, samples, tmp_path):
    folder = ShardFolder.open(url(server), QUICK)
    folder.shards[0] = dataclasses.replace(folder.shards[0], name="gone.tar")
    server.seen.clear()
    gone, there = folder.read([(0, 0), (1, 0)])
    assert isinstance(gone, CorruptSample) and "FileNotFoundError" in gone.reason and there == samples[1, 0]
    assert len(requests(server, "gone.tar")) == 1
    remote.call(folder.fs, "pipe_file", f"{s3.BUCKET}/private/{INDEX}", b"{}", cfg=QUICK)
    server.seen.clear()
    with pytest.raises(UserError, match="403"):
        ShardFolder.open(url(server, "http", "private"), QUICK)
    assert len(requests(server)) == 1
    with pytest.raises(UserError, match="no shards found in s3://shards/nothing"):
        ShardFolder.open(f"s3://{s3.BUCKET}/nothing", QUICK)


def test_a_shard_that_is_too_short_is_damage(server, samples, tmp_path):
    make(tmp_path / "x")
    tar = tmp_path / "x/s-000001.tar"
    tar.write_bytes(tar.read_bytes()[: 3 * SIZE])
    s3.put(tmp_path / "x", "short", server.port)
    got = ShardFolder.open(url(server, name="short"), DataSources(retries=0)).read([(1, i) for i in range(SAMPLES)])
    assert [isinstance(sample, CorruptSample) for sample in got] == [False] * 2 + [True] * 6


def test_a_server_that_hangs_or_is_gone_is_one_line_within_bounded_time():
    cfg = DataSources(request_timeout=0.3, retries=1)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts, never answers
        for port, reason in (
            (deaf.getsockname()[1], "TimeoutError: no answer in 0.3 s"),
            (free_port(), "Cannot connect"),
        ):
            start = time.monotonic()
            with pytest.raises(UserError, match=rf"cannot read http://.*/{INDEX}: .*{reason}") as said:
                ShardFolder.open(f"http://127.0.0.1:{port}/x", cfg)
            assert time.monotonic() - start < 2 and "\n" not in str(said.value)


def test_an_answer_that_is_late_is_not_waited_for_but_asked_for_again(server, samples):
    folder = ShardFolder.open(url(server), DataSources(request_timeout=0.5, retries=2))
    assert len(folder.entries(0)) == SAMPLES
    server.seen.clear()
    with server.faults(slow=1, delay=20):
        (late,) = folder.read([(0, 0)])
    assert isinstance(late, CorruptSample) and "no answer in 0.5 s" in late.reason and len(requests(server, ".tar")) > 1


def test_many_ranges_that_hang_end_together(server, samples):
    cfg = DataSources(request_timeout=0.5, retries=1)
    folders = [ShardFolder.open(url(server, scheme), cfg) for scheme in ("s3", "http")]
    hanging = _Hanging()
    with server.faults(slow=1, delay=20):
        for fs, path in [(folder.fs, f"{folder.path}/s-000000.tar") for folder in folders] + [(hanging, "x")]:
            start = time.monotonic()
            starts = [
                i * SIZE * 1000 if fs is hanging else i * 10 for i in range(70)
            ]  # more than are asked for at once
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(remote, "GAP", -1)
                got = remote.read_ranges(fs, [path] * 70, starts, [at + 10 for at in starts], cfg)
            assert all(isinstance(error, TimeoutError) for error in got)
            assert time.monotonic() - start < 3


class _Hanging(fsspec.AbstractFileSystem):
    """A synchronous file system whose server is dead."""

    def cat_file(self, path, start=None, end=None, **_):
        time.sleep(20)


def test_a_server_that_ignores_ranges_is_named(tmp_path):
    make(tmp_path)
    handler = lambda *words: _Quiet(*words, directory=str(tmp_path))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as plain:
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        folder = ShardFolder.open(f"http://127.0.0.1:{plain.server_port}", QUICK)
        (got,) = folder.read([(0, 1)])
        plain.shutdown()
    assert "does not know byte ranges" in got.reason


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


# the node's cache


def taken(folder: Path) -> int:
    """Bytes of the entries, counted as the bound counts them."""
    sizes = [file.stat().st_size for file in folder.glob("ranges/??/*")]
    return sum(-(-size // 4096) * 4096 for size in sizes)


SHARER = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, os.getcwd())
from clip4vla.config import DataSources
from clip4vla.data.shards import ShardFolder
url, cache, gb, mark = sys.argv[1:]
rank, cache = int(os.environ["RANK"]), Path(cache)
folder = ShardFolder.open(url, DataSources(cache=str(cache), cache_gb=float(gb), request_timeout=5))
places = [(s, e) for s in range(len(folder.shards)) for e in range(folder.shards[s].samples)]
most = 0
for epoch in range(2):
    for at in range((rank + epoch) % 2, len(places), 4):
        got = folder.read(places[at : at + 4 : 2])
        assert all(isinstance(sample, dict) for sample in got), got
        files = [f for f in cache.glob("ranges/??/*")]
        most = max(most, sum(-(-f.stat().st_size // 4096) * 4096 for f in files))
    Path(f"{mark}-{epoch}-{rank}").touch()
    while not Path(f"{mark}-{epoch}-{1 - rank}").exists():
        time.sleep(0.01)
    while epoch == 0 and not Path(f"{mark}-go").exists():
        time.sleep(0.01)
print(most)
"""


@pytest.mark.parametrize("room", [1.0, 0.4])
def test_two_processes_share_a_cache_of_bounded_size(server, samples, tmp_path, room):
    """In the second epoch each reads what the other one read in the first."""
    script, cache, mark = tmp_path / "sharer.py", tmp_path / "cache", tmp_path / "mark"
    script.write_text(SHARER)
    bound = room * (len(EVERY) + 1) * (SIZE + 3 * 4096)
    with job(2, script, url(server, "http"), cache, bound / 1e9, mark) as started:
        wait_for = [Path(f"{mark}-0-{rank}") for rank in range(2)]
        end = time.monotonic() + PATIENCE
        while not all(path.exists() for path in wait_for):
            assert time.monotonic() < end and all(process.is_alive() for process in started.ranks), started.said("err")
            time.sleep(0.02)
        server.seen.clear()
        Path(f"{mark}-go").touch()
        done = started.wait()
    assert done.returncode == 0, done.stderr
    assert 0 < max(map(int, done.stdout.split())) <= bound
    again = len(requests(server, ".tar"))
    assert again == 0 if room == 1 else 0.4 < again / len(EVERY) < 0.8  # what the first epoch kept stays


def test_damaged_entries_are_read_again_and_count_as_no_damage(server, samples, tmp_path):
    folder = ShardFolder.open(url(server), DataSources(cache=str(tmp_path), request_timeout=5))
    assert folder.read(EVERY) == list(samples.values())
    kept = list(tmp_path.glob("ranges/??/*"))
    assert len(kept) == len(EVERY) + SHARDS  # and the shards' lines of entries.jsonl
    entries = [path for path in kept if path.stat().st_size > SIZE]
    entries[0].write_bytes(entries[0].read_bytes()[:-1])
    entries[1].write_bytes(b"\0" * entries[1].stat().st_size)
    for expected in (2, 0):
        server.seen.clear()
        assert folder.read(EVERY) == list(samples.values())
        assert len(requests(server, ".tar")) == expected


def test_what_comes_damaged_from_its_source_is_not_kept(server, tmp_path):
    make(tmp_path / "x")
    tar = tmp_path / "x/s-000001.tar"
    data = bytearray(tar.read_bytes())
    data[SIZE] ^= 0xFF  # in its first sample
    tar.write_bytes(data)
    s3.put(tmp_path / "x", "flipped", server.port)
    folder = ShardFolder.open(
        url(server, name="flipped"), DataSources(cache=str(tmp_path / "cache"), request_timeout=5)
    )
    assert [place for place, got in zip(EVERY, folder.read(EVERY), strict=True) if isinstance(got, CorruptSample)] == [
        (1, 0)
    ]
    assert len(list(tmp_path.glob("cache/ranges/??/*"))) == len(EVERY) - 1 + SHARDS


def test_a_replaced_shard_is_never_served_from_the_cache(server, tmp_path):
    cfg = DataSources(cache=str(tmp_path / "cache"), request_timeout=5)
    for seed in (1, 2):
        content = make(tmp_path / "x", seed)
        s3.put(tmp_path / "x", "replaced", server.port)
        assert ShardFolder.open(url(server, name="replaced"), cfg).read(EVERY) == list(content.values())


def test_what_earlier_runs_left_makes_room_oldest_first_and_what_this_run_uses_stays(tmp_path):
    old = Cache(tmp_path, 10 * 4096)
    old.put({f"old {i}": bytes([i]) * 4000 for i in range(8)})
    time.sleep(0.01)
    for i in range(8):  # last used in this order
        assert old.get(f"old {(i + 3) % 8}") == bytes([(i + 3) % 8]) * 4000
        time.sleep(0.002)
    new = Cache(tmp_path, 10 * 4096)
    assert new.get("old 3") is not None  # the oldest, but used now
    new.put({f"new {i}": b"n" * 4096 for i in range(4)})
    there = [i for i in range(8) if new.get(f"old {i}")]
    assert all(new.get(f"new {i}") for i in range(4)) and there == [0, 1, 2, 3, 6, 7]
    new.put({"too much": b"n" * 4096 * 3})
    assert new.get("too much") is None and all(new.get(f"new {i}") for i in range(4)) and taken(tmp_path) <= 10 * 4096


def test_a_killed_writers_count_is_mended(tmp_path):
    Cache(tmp_path, 10 * 4096).put({"a": b"a" * 4096})
    for count in (b"", b"999999999"):
        (tmp_path / "ranges/lock").write_bytes(count)
        Cache(tmp_path, 10 * 4096).put({f"b{count}": b"b"})
        assert (tmp_path / "ranges/lock").read_bytes() == b"%d" % taken(tmp_path)


def test_a_writer_that_hangs_holds_up_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "WAIT", 0.05)
    ours = Cache(tmp_path, 10 * 4096)
    ours.put({"a": b"a"})
    with open(tmp_path / "ranges/lock", encoding="utf-8") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        ours.put({"b": b"b"})
    ours.put({"c": b"c"})
    assert [ours.get(name) for name in "abc"] == [b"a", None, b"c"]


def test_a_cache_that_cannot_be_written_is_said_once_and_ends_nothing(server, samples, tmp_path, caplog):
    (tmp_path / "file").touch()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for place in ("file", "full"):
        folder = ShardFolder.open(url(server), DataSources(cache=str(tmp_path / place), request_timeout=5))
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, limit[1]))  # stands in for a full disk
        try:
            got = [folder.read(EVERY) for _ in range(2)]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert got == [list(samples.values())] * 2
    said = [record.message for record in caplog.records if record.name == "clip4vla.io.range_cache"]
    assert len(said) == 2 and "Not a directory" in said[0] and "File too large" in said[1]


# training


@pytest.fixture(scope="module")
def speech(server, sample_shards):
    """The shipped sample's shards on the server."""
    for name in ("speech_fr", "sounds"):
        s3.put(sample_shards / name / "train", f"sample/{name}/train", server.port)
    return f"s3://{s3.BUCKET}/sample"


def test_batches_are_those_from_disk(server, speech, sample_shards, monkeypatch):
    disk, far = loader(sample_shards), loader(sample_shards)
    far.folders = [ShardFolder.open(f"{speech}/{name}/train", QUICK) for name in ("speech_fr", "sounds")]
    with server.faults(fail=0.1, cut=0.1):
        for ours, theirs in zip(far.batches(0, 2), disk.batches(0, 2), strict=True):
            assert ours.ids == theirs.ids
            assert all(torch.equal(getattr(ours, f), getattr(theirs, f)) for f in ("frames", "segments", "hidden_rows"))
    assert far.reads == disk.reads and far.corrupt == 0


def test_losses_are_those_from_disk_to_the_last_bit(server, speech, sample_shards, tmp_path):
    clip = tmp_path / "tiny.json"
    clip.write_text(json.dumps(TINY))
    words = ["configs/pretrain/sample.yaml", "init_from=[]", f"model.clip={clip}", "train.precision=fp32", "track.wandb=off",
             "train.batch_size=12", "train.max_steps=3", "train.log_every=1", "data.decode_threads=1", "data.retries=9",
             "data.request_timeout=1", f"data.cache={tmp_path / 'cache'}"]  # fmt: skip
    for place, faults in ((sample_shards, {}), (speech, {"fail": 0.1, "cut": 0.1, "slow": 0.03, "delay": 2})):
        data = f"data.train={{{place}/speech_fr/train: 0.5, {place}/sounds/train: 0.5}}"
        server.seen.clear()
        with server.faults(**faults):
            done = run("launch/pretrain.py", *words, data, f"run_dir={tmp_path / str(bool(faults))}")
        assert done.returncode == 0, done.stderr
    assert len(requests(server, ".tar")) > 4 and len(list((tmp_path / "cache").glob("ranges/??/*"))) > 20
    assert trace(tmp_path / "True") == trace(tmp_path / "False") != {}


def test_a_run_without_its_server_ends_with_one_line(tmp_path):
    words = [
        "configs/pretrain/sample.yaml",
        "data.train=s3://shards/x",
        "data.request_timeout=0.5",
        "data.retries=1",
        "init_from=[]",
    ]
    done = run("launch/pretrain.py", *words, f"run_dir={tmp_path / 'r'}", env=s3.environment(free_port()), timeout=60)
    assert done.returncode == 2
    assert "cannot read s3://shards/x/index.json" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
