"""data_prep/sets/parquet.py: tables of parquet and Arrow with media in their cells or beside them."""

import json
import os
import re
import subprocess
import sys

import datasets
import fsspec
import hub
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from annotation_files import reasons
from forks import ROOT
from raw_media import medium, shard_files
from sample_prep import rows_of

from clip4vla.config import DataConfig
from clip4vla.data.shards import ShardFolder
from clip4vla.errors import UserError
from data_prep.annotations import read
from data_prep.build_shards import sample, shard
from data_prep.manifest import ManifestRow
from data_prep.packed import tables

N = 5
FEATURES = datasets.Features(
    {
        "audio": datasets.Audio(decode=False),
        "image": datasets.Image(decode=False),
        "text": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["cat", "dog"]),
    }
)


def config(root, **settings):
    return DataConfig(dataset="parquet", media_root=str(root), **settings)


def write(path, group=2, /, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)


def hugging_face():
    """A data set as the package `datasets` holds one: pictures with sound, one of them without a path."""
    sounds = [
        {"bytes": medium("flac" if i % 2 else "wav"), "path": None if i == 3 else f"/x/{i}.flac"} for i in range(N)
    ]
    cells = {
        "audio": sounds,
        "image": [{"bytes": medium("png"), "path": None}] * N,
        "text": [f"t{i}" for i in range(N)],
    }
    return datasets.Dataset(pyarrow.Table.from_pydict(cells | {"label": [0, 1, -1, 1, 0]}, FEATURES.arrow_schema))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The same data set as parquet, and saved on disk with a cache of map() beside, its files of one split."""
    root = tmp_path_factory.mktemp("hf")
    (root / "table").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(sys.modules, "transformers", raising=False)  # None, by clip4vla/cli.py, which this process has
        made = hugging_face()
        made.to_parquet(root / "table/validation-0.parquet", batch_size=2)
        datasets.DatasetDict({"train": made, "validation": made}).save_to_disk(str(root / "disk"))
    (root / "disk/train/cache-1.arrow").write_bytes((root / "disk/train/data-00000-of-00001.arrow").read_bytes())
    return root


def expected(tmp_path):
    """What files of the same media give: the members of each sample."""
    for i in range(N):
        (tmp_path / f"{i}.wav").write_bytes(medium("flac" if i % 2 else "wav"))
    (tmp_path / "p.png").write_bytes(medium("png"))
    rows = [ManifestRow("i", "i", "i", "s", "train", picture="p.png", media=f"{i}.wav") for i in range(N)]
    return [sample(DataConfig(media_root=str(tmp_path)), row)[1] for row in rows]


@pytest.mark.parametrize("kind", ["table", "disk", "hub"])
def test_data_sets_of_hugging_face(written, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    root = f"hf:{written / 'table'}" if kind == "hub" else written / kind
    made, skipped = read(config(root))
    assert not skipped and len(made) == N * (2 if kind == "disk" else 1)
    assert {row.source for row in made} == {"table" if kind == "hub" else kind}
    assert [row.split for row in made] == ["train"] * N * (kind == "disk") + ["val"] * N
    made = [row for row in made if row.split == "val"]
    assert [(row.captions, row.label) for row in made] == [
        ([f"t{i}"], label) for i, label in enumerate(["cat", "dog", None, "dog", "cat"])
    ]
    assert [row.media.split("/")[-2:] for row in made[2:4]] == [["2", "2.flac"], ["3", "audio.wav"]]
    members = [sample(config(root), row)[1] for row in made]
    assert members == expected(tmp_path)
    assert sample(config(root), made[0])[1] == members[0]  # back in the row group


def test_rows_of_a_row_group_stay_together_and_failures_are_listed(tmp_path):
    """In worker processes, with row groups that two shards share, and again after one table has changed."""
    blobs = [medium("flac"), None, medium("mp3"), medium("mp4")[:900], medium("mp4")]
    write(tmp_path / "raw/0.parquet", 3, blob=blobs, caption=list("abcde"))
    write(tmp_path / "raw/1.parquet", 3, blob=blobs[:1] * 5, caption=list("fghij"))
    settings = {"out": str(tmp_path / "out"), "samples_per_shard": 4, "workers": 2, "max_failed_fraction": 0.3}
    shard(config(tmp_path / "raw", **settings))
    texts = "".join(meta["captions"][0] for meta in rows_of(tmp_path / "out/raw/train"))
    assert sorted(texts) == list("acefghij") and all(group in texts for group in ("ac", "fgh", "ij"))
    made = shard_files(tmp_path / "out")
    assert b'"no bytes in its cell' not in made["raw/train/quarantine.jsonl"]
    assert made["raw/train/quarantine.jsonl"].count(b"unreadable table: no bytes in its cell") == 1
    assert len([name for name in made if name.endswith(".tar")]) == 3
    write(tmp_path / "raw/1.parquet", 3, blob=blobs[2:3] * 5, caption=list("fghij"))
    shard(config(tmp_path / "raw", **settings))
    assert {meta["duration"] for meta in rows_of(tmp_path / "out/raw/train") if meta["captions"][0] > "e"} == {
        meta["duration"] for meta in rows_of(tmp_path / "out/raw/train") if meta["captions"] == ["c"]
    }


def test_columns_of_bytes_and_of_paths(tmp_path):
    """video2dataset's columns are called by their format; paths are as in `folder`, with start and end."""
    write(
        tmp_path / "v.parquet",
        mp4=[b"0", b"1"],
        m4a=[b"2", b"3"],
        info=[{"t": "x"}, {"t": "y"}],
        embedding=[b"4", b"5"],
    )
    made, skipped = read(config(tmp_path / "v.parquet", captions_from=["info.t"]))
    assert [(row.picture, row.media, row.captions) for row in made] == [
        (f"v.parquet/{i}/mp4.mp4", f"v.parquet/{i}/m4a.m4a", [text]) for i, text in enumerate("xy")
    ]
    assert made[1].places["v.parquet/1/m4a.m4a"] == ["v.parquet", 0, 1, "m4a"] and not skipped
    (alone, _), _ = read(config(tmp_path / "v.parquet", media_from=["mp4"], label_from="info.t"))
    assert (alone.picture, alone.media, alone.label) == (None, "v.parquet/0/mp4.mp4", "x")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/x.wav").touch()
    paths = ["d/x.wav", "./d/x.wav", "d//x.wav", "gone.wav", "../x.wav", "/x.wav", None, "x.doc"]
    write(
        tmp_path / "p.parquet",
        path=paths,
        text=list("abcdefgh"),
        start=[None, 1.5] + [None] * 6,
        end=[None, 2] + [None] * 6,
    )
    made, skipped = read(config(tmp_path / "p.parquet"))
    assert [(row.id, row.media, row.start, row.end, row.captions, row.places) for row in made] == [
        ("d/x.wav", "d/x.wav", None, None, ["a", "c"], {}),
        ("d/x.wav@1.5-2", "d/x.wav", 1.5, 2, ["b"], {}),
    ]
    assert skipped.pop(3).reason.startswith("x.doc: unknown kind of file, not one of .png ")
    assert reasons(skipped) == {
        "gone.wav": "missing: no file named gone.wav",
        "p.parquet: row 4": "malformed: ../x.wav: leaves the media root",
        "p.parquet: row 5": "malformed: /x.wav: leaves the media root",
        "p.parquet: row 6": "malformed: no path",
    }


def test_broken_tables_are_listed_and_mistaken_columns_named(run, tmp_path):
    write(tmp_path / "a/0.parquet", flac=[medium("flac")] * 4, text=list("abcd"))
    data = (tmp_path / "a/0.parquet").read_bytes()
    (tmp_path / "a/1.parquet").write_bytes(data[:-20])
    (tmp_path / "a/2.arrow").write_bytes(data)
    made, skipped = read(config(tmp_path / "a"))
    assert len(made) == 4 and [item.where for item in skipped] == ["1.parquet", "2.arrow"]
    assert all(item.why == "malformed" and item.reason.startswith("unreadable table: ") for item in skipped)
    assert [item.reason for item in read(config(tmp_path / "a/{0,3}.parquet"))[1]] == ["no such table"]
    (tmp_path / "a/0.parquet").write_bytes(data[:4] + b"\xff" * 60 + data[64:])
    with pytest.raises(ValueError, match="unreadable table: "):
        sample(config(tmp_path / "a"), made[0])
    for words, why in (
        (["media_from=[none]"], "0.parquet: no column none; there are flac, text"),
        (
            ["captions_from=[text.none]"],
            "layout: no sample there; 4 malformed; 0.parquet: row 0: no text.none",
        ),
        (["label_from=none"], "0.parquet: no column none; there are flac, text"),
    ):
        code, printed = run(tmp_path / "out", *words, "--dry-run", media=tmp_path / "a/0.parquet", dataset="parquet")
        assert code == 2 and why in printed, printed
    write(tmp_path / "b.parquet", text=["x"])
    with pytest.raises(UserError, match="b.parquet: no media, bytes or paths, in text"):
        read(config(tmp_path / "b.parquet"))
    with pytest.raises(UserError, match="media_root=hf:.*none: "):
        read(config(f"hf:{tmp_path}/none"))


def test_arrow_files_and_tables_at_urls(tmp_path):
    """Both forms of Arrow files, compressed or not, and any table through fsspec."""
    table = pyarrow.table({"png": [medium("png")] * 2 + [None], "caption": ["a", "b", "c"]})
    options = pyarrow.ipc.IpcWriteOptions(compression="lz4")
    memory = fsspec.filesystem("memory")
    write(tmp_path / "0.parquet", png=table["png"], caption=table["caption"])
    for name, kind in (("1.arrow", pyarrow.ipc.new_file), ("2.arrow", pyarrow.ipc.new_stream)):
        with kind(str(tmp_path / name), table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=2)
    memory.put([str(tmp_path / name) for name in ("0.parquet", "1.arrow", "2.arrow")], "/tables/")
    for root in (tmp_path, "memory://tables"):
        made, skipped = read(config(root))
        places = [
            [f"{name}", group, row, "png"]
            for name in ("0.parquet", "1.arrow", "2.arrow")
            for group, row in ((0, 0), (0, 1), (1, 0))
        ]
        assert [row.places[row.picture] for row in made] == places and not skipped
        members = [sample(config(root), row)[1] for row in (made[1], made[0], made[3], made[4], made[7])]
        assert len(members[0]["frames.jpg"]) > 500 and members == members[:1] * 5


def test_cells_are_read_one_at_a_time(tmp_path):
    """Of a column without a dictionary: what is in memory is a page, not a row group of 25 MB."""
    cell, n = bytes(range(256)) * 4096, 24
    table = pyarrow.table({"mp4": [cell] * n})
    pyarrow.parquet.write_table(
        table, tmp_path / "t.parquet", use_dictionary=False, write_batch_size=1, compression="none"
    )
    del table
    before = pyarrow.total_allocated_bytes()
    for row in range(n):
        assert tables.read_cell(str(tmp_path), "t.parquet", 0, row, "mp4") == cell
        assert pyarrow.total_allocated_bytes() - before < 8 * len(cell)


def test_without_pyarrow_the_extra_is_named(run, tmp_path, monkeypatch):
    write(tmp_path / "0.parquet", flac=[b"x"])
    for package, root in (("pyarrow", tmp_path), ("datasets", "hf:someone/some")):
        monkeypatch.setitem(sys.modules, package, None)
        code, printed = run(tmp_path / "out", "--dry-run", media=root, dataset="parquet")
        assert code == 2 and f"error: {package} is not installed: pip install 'clip4vla[hf]'" in printed


def test_a_url_that_does_not_answer_is_not_taken_for_a_column_without_media(tmp_path, monkeypatch):
    def silent(self, row):
        raise UserError("no answer")

    write(tmp_path / "media/a.parquet", data=[medium("wav")], text=["t"])
    monkeypatch.setattr(tables.Cells, "read", silent)
    with pytest.raises(UserError, match="no answer"):
        read(config(tmp_path / "media"))


IN_TURN = """
import os, runpy, sys
script, settings, names, *words = sys.argv[1:]
for name in names.split():
    sys.argv, code = [script, settings, f"media_root=hf:{name}", *words], 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    print("code", code, file=sys.stderr)
    os.environ["HF_TOKEN"] = "hf_test"
"""


def from_hub(root, url, names, out, **env):
    """shard.py of data sets in turn, in one process for its imports' sake; a home and a folder of its own. Returns stderr.

    After the first data set it has a login.
    """
    fixed = {"HF_ENDPOINT": url, "HF_HOME": str(root / "hf"), "HOME": str(root / "home"), **env}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    place = root / "folder"
    place.mkdir(exist_ok=True)
    files = [str(ROOT / name) for name in ("data_prep/shard.py", "configs/data/parquet.yaml")]
    command = [sys.executable, "-c", IN_TURN, *files, names, f"out={root / out}", "workers=1"]
    done = subprocess.run(command, cwd=place, env=kept | fixed, capture_output=True, text=True, timeout=300)
    assert not list(place.iterdir()) and not (root / "home").exists()
    return done.stderr


@pytest.fixture(scope="module")
def hub_run(written, tmp_path_factory):
    """The folder with the files of me/pets and what shard.py made of it; stderr of all that the hub was asked for; its URL."""
    root = tmp_path_factory.mktemp("hub")
    table = pyarrow.parquet.read_table(written / "table/validation-0.parquet")
    types = table.schema.metadata[b"huggingface"].replace(b'"decode": false, ', b"")  # as people's have it
    table = table.replace_schema_metadata({b"huggingface": types})
    assert b'"audio": {"_type": "Audio"}' in types
    (root / "pets/data").mkdir(parents=True)
    for split, part in (("train", table), ("test", table.slice(1, 2))):
        pyarrow.parquet.write_table(part, root / f"pets/data/{split}-00000-of-00001.parquet")
    data = (root / "pets/data/test-00000-of-00001.parquet").read_bytes()
    card = "---\nconfigs:\n- config_name: x\n  data_files: x.parquet\n- config_name: y\n  data_files: y.parquet\n---\n"
    with hub.serve() as (url, repos):
        names = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "test")]
        repos["datasets/me/pets"] = {name: (root / "pets" / name).read_bytes() for name in names}
        repos["datasets/me/gated"] = {"train.parquet": hub.GATED}
        repos["datasets/me/empty"] = {"README.md": b"---\nlicense: mit\n---\n"}
        repos["datasets/me/two"] = {"README.md": card.encode(), "x.parquet": data, "y.parquet": data}
        return root, from_hub(root, url, "me/none me/gone me/gated me/empty me/two me/pets", "hub"), url


def test_a_data_set_of_the_hub_gives_what_its_files_give(hub_run):
    """And once more from the cache, when the hub is away."""
    root, printed, url = hub_run
    assert printed.endswith("code 0\n"), printed
    assert from_hub(root, url, "me/pets", "cached", HF_HUB_OFFLINE="1").endswith("code 0\n")
    shard(config(root / "pets", out=str(root / "files"), workers=1))
    for split, texts in (("train", ["t0", "t1", "t2", "t3", "t4"]), ("test", ["t1", "t2"])):
        made, *others = [by_caption(root / out / "pets" / split) for out in ("files", "hub", "cached")]
        assert sorted(made) == texts and others == [made, made]


def by_caption(place):
    """What a folder of shards has of each caption, without what names its table."""
    shards = ShardFolder.open(str(place))
    samples = {}
    for item in shards.read([(s, e) for s, tar in enumerate(shards.shards) for e in range(tar.samples)]):
        meta = json.loads(item["json"])
        assert len({meta.pop(key) for key in ("id", "item", "group")}) == 1
        meta["media"] = {kind: path.split("/")[-2:] for kind, path in meta["media"].items()}  # row and name
        samples[meta["captions"][0]] = [item["fbank"], item["frames"], meta]
    return samples


def test_a_hub_that_gives_nothing_is_one_line_at_once(hub_run):
    """No such data set, without and with a login; one that is gated, without data, of two configs; no hub."""
    root, printed, url = hub_run
    name = (
        "check its name; a private or gated one is given after `hf auth login` (or HF_TOKEN=..) and its owner's leave"
    )
    form = "name it as hf:USER/NAME or hf:USER/NAME:CONFIG"
    when = "start again when the hub answers, or with HF_HUB_OFFLINE=1 to take what was downloaded before"
    printed = printed.partition("code 0")[0] + from_hub(root, url, "me/away", "away")
    expected = [
        ("none: RepositoryNotFoundError: 401 Client Error", name),
        ("gone: RepositoryNotFoundError: 404 Client Error", name),
        ("gated: FileNotFoundError: 403 Client Error", name),
        ("empty: EmptyDatasetError: .*", form),
        ("two: ValueError: .*the available configs: .'x', 'y'.*", form),
        ("away: ConnectError: .*refused", when),
    ]
    lines = re.findall("^error: (.*)\ncode 2$", printed, re.M)
    assert len(lines) == len(expected) and "Traceback" not in printed and "Retrying" not in printed, printed
    for line, (what, advice) in zip(lines, expected, strict=True):
        assert re.fullmatch(f"media_root=hf:me/{what}; {re.escape(advice)}", line), line
    assert not (root / "away").exists()
