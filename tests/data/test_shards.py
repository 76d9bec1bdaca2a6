"""Shards: what is written, what plain tools read, and what a corrupt byte does."""

import errno
import fcntl
import io
import json
import tarfile
import threading
import time

import indexes
import numpy as np
import pytest
import webdataset
from PIL import Image

from clip4vla.config import DataConfig, DataSources
from clip4vla.data.shards import ENTRIES, INDEX, CorruptSample, ShardFolder, fingerprint, write_index, write_shard
from clip4vla.errors import UserError
from clip4vla.io import atomic

SAMPLES = [
    (f"{i:07d}-a_{i}", {"json": b'{"n": %d}' % i, "fbank.jpg": b"f" * i, "frames.jpg": b"v" * 700}) for i in range(5)
]


def make(folder, content=SAMPLES, **changes):
    """A folder with one shard, index.json changed at will."""
    entry = write_shard(folder / "s-train-000000.tar", content)
    write_index(
        folder, fingerprint={}, media_root="../media", source="s", split="train", counts={}, shards=[entry | changes]
    )
    return ShardFolder.open(str(folder))


def test_reads_what_was_written(tmp_path):
    folder = make(tmp_path)
    assert len(folder) == 5 and folder.media_root == str(tmp_path.parent / "media")
    got = folder.read([(0, 3), (0, 1)])
    assert got == [{kind.split(".")[0]: data for kind, data in SAMPLES[i][1].items()} for i in (3, 1)]
    assert folder.read([(0, 2)], ("json", "frames")) == [{"json": b'{"n": 2}', "frames": b"v" * 700}]
    assert folder.read([(0, 2)], ("clip",)) == [{}] and folder.read([]) == []


def test_index_offsets_agree_with_the_tar(tmp_path):
    folder = make(tmp_path)
    with tarfile.open(tmp_path / "s-train-000000.tar") as tar:
        assert [member.name for member in tar][:3] == [
            f"{SAMPLES[0][0]}.{e}" for e in ("json", "fbank.jpg", "frames.jpg")
        ]
        for entry in range(5):
            key, members = folder.entries(0)[entry]
            for ext, member in members.items():
                info = tar.getmember(f"{key}.{ext}")
                assert (info.offset_data, info.size) == (member.offset, member.size)


def test_plain_webdataset_reads_it(tmp_path):
    make(tmp_path)
    got = list(webdataset.WebDataset(str(tmp_path / "s-train-000000.tar"), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in got] == [key for key, _ in SAMPLES]
    assert got[4]["fbank.jpg"] == b"ffff" and json.loads(got[4]["json"]) == {"n": 4}


def test_equal_samples_give_equal_bytes_and_no_leftovers(tmp_path):
    one, two = (write_shard(tmp_path / "a.tar", SAMPLES)["sha256"] for _ in range(2))
    assert one == two and [path.name for path in tmp_path.iterdir()] == ["a.tar"]


def test_an_interrupted_write_leaves_no_shard(tmp_path):
    def samples():
        yield SAMPLES[0]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_shard(tmp_path / "a.tar", samples())
    assert not (tmp_path / "a.tar").exists()


def test_a_corrupted_byte_is_named_and_spares_the_others(tmp_path):
    folder = make(tmp_path)
    member = folder.entries(0)[3][1]["frames.jpg"]
    data = bytearray((tmp_path / "s-train-000000.tar").read_bytes())
    data[member.offset + 5] ^= 1
    (tmp_path / "s-train-000000.tar").write_bytes(data)
    got = folder.read([(0, 2), (0, 3), (0, 4)])
    assert isinstance(got[0], dict) and isinstance(got[2], dict)
    assert got[1] == CorruptSample("s-train-000000.tar", SAMPLES[3][0], "frames: CRC-32 differs from index.json")
    assert folder.read([(0, 3)], ("json", "fbank")) == [{"json": b'{"n": 3}', "fbank": b"fff"}]


def test_truncated_and_missing_tars_are_damage(tmp_path):
    folder = make(tmp_path)
    tar = tmp_path / "s-train-000000.tar"
    member = folder.entries(0)[4][1]["frames.jpg"]
    tar.write_bytes(tar.read_bytes()[: member.offset + 10])
    good, bad = folder.read([(0, 0), (0, 4)])
    assert isinstance(good, dict) and bad.reason == "frames: 10 of 700 bytes"
    tar.unlink()
    assert all("FileNotFoundError" in sample.reason for sample in folder.read([(0, 0), (0, 4)]))


@pytest.mark.parametrize("name", ["../s.tar", "/s.tar", "..", "a/b.tar", "a\\b.tar", ""])
def test_names_that_leave_the_folder_are_rejected(tmp_path, name):
    with pytest.raises(UserError, match="leaves the folder"):
        make(tmp_path, name=name)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no shards found in .*run data_prep/shard.py"),
        ("{", "not a readable index"),
        ("[]", "not a readable index"),
        ('{"format": 99}', "format 99, this version reads 2"),
        ('{"format": 2}', "not a readable index"),
        (
            '{"format":2,"fingerprint":{},"media_root":".","source":"s","split":"t","counts":{},"shards":[]}',
            "is empty: no samples",
        ),
    ],
)
def test_unusable_folders_are_user_errors(tmp_path, text, message):
    if text is not None:
        (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError, match=message):
        ShardFolder.open(str(tmp_path))


def test_a_count_that_disagrees_is_damage(tmp_path):
    (bad,) = make(tmp_path, samples=6).read([(0, 0)])
    assert bad == CorruptSample("s-train-000000.tar", "entry 0", "entries.jsonl: 5 of 6 samples")


def test_entries_that_are_not_those_of_the_index_are_named(tmp_path):
    folder, lines = make(tmp_path), (tmp_path / ENTRIES).read_bytes()
    (tmp_path / ENTRIES).write_bytes(lines.replace(b"a_3", b"a_4"))
    (bad,) = folder.read([(0, 3)])
    assert bad == CorruptSample("s-train-000000.tar", "entry 3", "entries.jsonl: CRC-32 differs from index.json")
    (tmp_path / ENTRIES).write_bytes(lines[:-1])
    with pytest.raises(UserError, match=f"entries.jsonl has {len(lines) - 1} bytes, not {len(lines)} for 5 samples"):
        ShardFolder.open(str(tmp_path))
    (tmp_path / ENTRIES).unlink()
    with pytest.raises(UserError, match="cannot read .*/entries.jsonl: .*; run data_prep/shard.py"):
        ShardFolder.open(str(tmp_path))


def test_entries_of_two_windows_of_shards_stay_in_memory(tmp_path):
    shards = [write_shard(tmp_path / f"s-{i}.tar", [(f"{i}", {"json": b"%d" % i})]) for i in range(9)]
    write_index(
        tmp_path, fingerprint={}, media_root=".", source="s", split="t", counts={}, shards=(shard for shard in shards)
    )
    folder = ShardFolder.open(str(tmp_path), DataSources(shuffle_window=2))
    for order in (range(9), reversed(range(9)), [3, 3, 8, 0]):
        for i in order:
            assert folder.read([(i, 0)]) == [{"json": b"%d" % i}] and len(folder.in_use) <= 4
    assert list(folder.in_use)[-3:] == [3, 8, 0]
    assert [s["json"] for s in folder.read([(i, 0) for i in range(9)])] == [b"%d" % i for i in range(9)]


def test_a_line_that_is_no_entry_spares_the_others(tmp_path):
    make(tmp_path)
    tree = indexes.read(tmp_path)
    entries = tree["shards"][0]["entries"]
    hostile = [["k", {"json": [-1, 5, 0]}], ["k", {"json": [10**20, 5, 0]}], ["k", [1]], "k", 5, ["k", {"json": ["a"]}]]
    for entry in [*hostile, ["k", {"json": [0, 10**15, 0]}]]:
        entries[1] = entry
        indexes.write(tmp_path, tree)
        good, bad = ShardFolder.open(str(tmp_path)).read([(0, 0), (0, 1)])
        assert good["json"] == b'{"n": 0}' and isinstance(bad, CorruptSample), entry


def test_a_kind_that_a_sample_has_twice_is_damage(tmp_path):
    make(tmp_path)
    tree = indexes.read(tmp_path)
    tree["shards"][0]["entries"][1][1] |= {f"json.{i}": [512, 1, 0] for i in range(100_000)}
    indexes.write(tmp_path, tree)
    folder, begin = ShardFolder.open(str(tmp_path)), time.process_time()
    good, bad = folder.read([(0, 0), (0, 1)])
    assert time.process_time() - begin < 3 and isinstance(good, dict)
    assert bad == CorruptSample("s-train-000000.tar", "entry 1", "entries.jsonl: ValueError: two members of one kind")
    assert folder.read([(0, 1)], ("frames",)) == [{"frames": b"v" * 700}]


def test_unknown_protocol_is_a_user_error():
    with pytest.raises(UserError, match="cannot read nosuch://x"):
        ShardFolder.open("nosuch://x")


def test_remote_folders_read_the_same(tmp_path):
    import fsspec

    make(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path) + "/", "/shards-test/", recursive=True)
    got = ShardFolder.open("memory://shards-test").read([(0, 1)])
    assert got == [{"json": b'{"n": 1}', "fbank": b"f", "frames": b"v" * 700}]


def test_fingerprint_tells_settings_apart():
    cfg = DataConfig()
    one = fingerprint(cfg)
    cfg.spectrogram.hop_length = 160
    two = fingerprint(cfg)
    assert json.loads(json.dumps(one)) == one != two and set(one["versions"]) == {"torch", "torchaudio", "pillow"}


def test_pictures_in_a_shard_open_with_plain_tools(tmp_path):
    out = io.BytesIO()
    Image.fromarray(np.full((224, 224, 3), 7, np.uint8)).save(out, "PNG")
    folder = make(tmp_path, [("k", {"json": b"{}", "frames.png": out.getvalue()})])
    assert Image.open(io.BytesIO(folder.read([(0, 0)])[0]["frames"])).size == (224, 224)


def test_two_writers_of_one_shard_refuse_each_other_until_it_has_its_name(tmp_path):
    """The second one may come while the first is still writing; what comes out is the first one's, whole."""

    def samples():
        with pytest.raises(UserError, match="another run is writing it"):
            write_shard(tmp_path / "a.tar", [("b", {"json": b"{}"})])
        yield "a", {"json": b"[]"}

    entry = write_shard(tmp_path / "a.tar", samples())
    assert [key for key, _ in entry["entries"]] == ["a"] and (tmp_path / "a.tar").stat().st_size == entry["bytes"]
    assert write_shard(tmp_path / "a.tar", [("b", {"json": b"{}"})])["entries"][0][0] == "b"


@pytest.mark.parametrize(
    "changes",
    [{"source": "../x"}, {"split": "a/b"}, {"source": ""}, {"source": 1}, {"fingerprint": [1]},
     {"fingerprint": {"frames": []}}, {"fingerprint": {"spectrogram": {"evil": 1}}}, {"media_root": 1}],
)  # fmt: skip
def test_what_an_index_names_can_neither_leave_its_folder_nor_be_anything(tmp_path, changes):
    make(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(json.loads((tmp_path / INDEX).read_text()) | changes))
    with pytest.raises(UserError, match="not a readable index"):
        ShardFolder.open(str(tmp_path))


def test_where_there_are_no_locks_files_are_written_all_the_same(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    atomic._no_locks.cache_clear()
    assert len(make(tmp_path)) == 5
    atomic.write_text(tmp_path / "a.txt", "a")
    assert (tmp_path / "a.txt").read_text() == "a" and caplog.text.count("No locks available") == 1


def test_one_thread_reads_while_another_asks_for_names(tmp_path):
    """With more shards than are kept in memory."""
    rows = [write_shard(tmp_path / f"s-train-{i:06d}.tar", SAMPLES[:2]) for i in range(12)]
    write_index(tmp_path, fingerprint={}, media_root=".", source="s", split="train", counts={}, shards=rows)
    folder, wrong, end = ShardFolder.open(str(tmp_path), DataSources(shuffle_window=1)), [], time.monotonic() + 2

    def names(first):
        for i in range(first, 10**9):
            if time.monotonic() > end:
                return
            try:
                assert folder.corrupt(i % 12, 1, "").key == SAMPLES[1][0]
                assert isinstance(folder.read([(i * 5 % 12, 0)])[0], dict)
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=names, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]


def test_a_name_that_cannot_be_read_is_a_number(tmp_path):
    folder = make(tmp_path)
    (tmp_path / ENTRIES).write_bytes(b"x" * (tmp_path / ENTRIES).stat().st_size)
    assert folder.key(0, 3) == "entry 3"
