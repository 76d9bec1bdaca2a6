"""data_prep/sets/webdataset.py: tars of media and texts, as video2dataset, img2dataset and LAION write them."""

import io
import json
import os
import tarfile

import fsspec
import pytest
from annotation_files import reasons
from raw_media import medium, shard_files, write_tar
from sample_prep import rows_of

from clip4vla.config import DataConfig
from clip4vla.errors import UserError
from data_prep.annotations import read
from data_prep.build_shards import sample, shard
from data_prep.manifest import ManifestRow

MADE = ("mp4", "mkv", "wav", "flac", "ogg", "mp3", "m4a", "png")


def rows(root, **settings):
    return read(DataConfig(dataset="webdataset", media_root=str(root), **settings))


def test_shards_have_the_bytes_that_files_would_give(tmp_path):
    """Each tar unpacked into a folder of its name, with a table of the same captions."""
    table, broken = ["path,caption,label,split"], medium("ogg")[:700] + b"x" * 900
    for number, split in enumerate(("train", "val")):
        members = {}
        for i, suffix in enumerate(MADE):
            members |= {f"{i:05d}.{suffix}": medium(suffix), f"{i:05d}.txt": f"a {suffix}", f"{i:05d}.cls": str(i)}
        members |= {"00009.ogg": broken, "00009.json": {"caption": "cut off", "label": "none"}}
        name = f"{split}-{number:05d}.tar"
        tar = write_tar(tmp_path / "tars/raw" / name, members)
        table += [f"{name}/{i:05d}.{suffix},a {suffix},{i},{split}" for i, suffix in enumerate(MADE)]
        table += [f"{name}/00009.ogg,cut off,none,{split}"]
        with tarfile.open(tar) as file:
            file.extractall(tmp_path / "files/raw" / name, filter="data")
    (tmp_path / "files/raw/captions.csv").write_text("\n".join(table))
    for kind, dataset in (("tars", "webdataset"), ("files", "folder")):
        place = tmp_path / kind
        more = {"samples_per_shard": 3, "workers": 1, "max_failed_fraction": 0.2}
        shard(DataConfig(dataset=dataset, media_root=str(place / "raw"), out=str(place / "out"), **more))
    made = shard_files(tmp_path / "tars/out")
    assert len([name for name in made if name.endswith(".tar")]) == 6 and made == shard_files(tmp_path / "files/out")
    assert b"00009.ogg" in made["raw/val/quarantine.jsonl"]
    assert not any(b"places" in data for name, data in made.items() if name.endswith(".tar"))
    metas = rows_of(tmp_path / "tars/out/raw/train")
    assert {meta["id"]: meta["label"] for meta in metas} == {
        f"train-00000.tar/{i:05d}.{suffix}": str(i) for i, suffix in enumerate(MADE)
    }


def test_captions_labels_and_media_of_a_sample(tmp_path):
    """LAION-audio's json has text or lists of it; img2dataset's caption; pictures have separate sound, videos too."""
    tree = {"text": ["b", "c"], "caption": None, "raw": "r", "info": {"title": "t"}, "tags": ["x", "y"], "label": "dog"}
    members = {
        "d/0.flac": b"", "d/0.json": tree, "./1.jpg": b"", "./1.wav": b"", "./1.txt": "one ", "./1.json": {"caption": "no"},
        "2.mp4": b"", "2.m4a": b"", "2.jpg": b"", "2.cls": "7\n", "3.MP4": b"", "3.v.npy": b"", "3.json": {"caption": "x"},
        "4.png": b"", "4.txt": "fünf",
    }  # fmt: skip
    write_tar(tmp_path / "a/0.tar", members)
    made, skipped = rows(tmp_path / "a", audio_type="nb")
    assert [(row.id, row.picture, row.media, row.captions, row.label) for row in made] == [
        ("0.tar/d/0.flac", None, "0.tar/d/0.flac", ["b", "c"], "dog"),
        ("0.tar/1.wav", "0.tar/1.jpg", "0.tar/1.wav", ["one"], None),
        ("0.tar/2.m4a", "0.tar/2.mp4", "0.tar/2.m4a", [], "7"),
        ("0.tar/3.MP4", None, "0.tar/3.MP4", ["x"], None),
        ("0.tar/4.png", "0.tar/4.png", None, ["fünf"], None),
    ]
    assert {row.source for row in made} == {"a"} and {row.audio_type for row in made} == {"nb"}
    assert reasons(skipped) == {str(tmp_path / "a"): "unusable: members that are not read: 1 .v.npy"}
    named, skipped = rows(tmp_path / "a", captions_from=["raw", "info.title", "tags"], label_from="info.title")
    assert [(row.captions, row.label) for row in named] == [(["r", "t", "x", "y"], "t")]
    assert reasons(skipped)["0.tar/1"] == "malformed: no raw"
    both, _ = rows(tmp_path / "a", captions_from=["txt"], split="val")
    assert [(row.captions, row.split) for row in both] == [(["one"], "val"), (["fünf"], "val")]


def test_clips_as_video2dataset_writes_them(tmp_path):
    """Times in s or HH:MM:SS.mmm; what its ClippingSubsampler cut has its one interval, and the clip's number in its key."""
    cut = {"key": "000_00001", "clips": [["00:01:02.500", "00:01:10.000"]]}
    trees = {
        "000": {"key": "000", "clips": [["00:00:01.500", "00:01:10.000"], [71, 72.25]]}, "000_00001": cut,
        "001_00001": cut, "002": {"clips": [3, 4]}, "003": {"clips": [[4, 4]]}, "004": {"clips": [["x", 1]]},
        "005": {"clips": []}, "006": {"clips": "0-1"}, "007": {"clips": [[1, 2, 3]]},
    }  # fmt: skip
    write_tar(
        tmp_path / "0.tar", {f"{k}.{s}": t if s == "json" else b"" for k, t in trees.items() for s in ("mp4", "json")}
    )
    made, skipped = rows(tmp_path)
    assert [(row.id, row.start, row.end) for row in made] == [
        ("0.tar/000.mp4@1.5-70", 1.5, 70), ("0.tar/000.mp4@71-72.25", 71, 72.25), ("0.tar/000_00001.mp4", None, None),
        ("0.tar/001_00001.mp4@62.5-70", 62.5, 70), ("0.tar/002.mp4@3-4", 3, 4), ("0.tar/005.mp4", None, None),
    ]  # fmt: skip
    assert all(row.group == row.item == row.media for row in made) and len(made[0].places) == 1
    assert [item.where for item in skipped] == [f"0.tar/00{n}" for n in (3, 4, 6, 7)]
    assert {(row.start, row.end) for row in rows(tmp_path, clips_already_cut=True)[0]} == {(None, None)}


def _odd_tar(path):
    """Members of every kind that is no plain file, names that leave the folder, two of one name, long and old names."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:

        def add(name, kind=tarfile.REGTYPE, data=b"sound", **headers):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.pax_headers = kind, "a.wav", headers
            info.size = len(data) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))

        add("d", tarfile.DIRTYPE)
        add("d/" + "l" * 200 + ".wav", comment="x" * 3000)
        add("../up.wav")
        add("/etc/up.wav")
        add("link.wav", tarfile.SYMTYPE)
        add("hard.wav", tarfile.LNKTYPE)
        add("pipe.wav", tarfile.FIFOTYPE)
        add("._a.wav")
        add("__MACOSX/a.wav")
        add("a.wav", data=b"first")
        add("b.ogg", data=b"b")
        add("a.wav", data=b"second")
        add("c.wav")
        add("c.flac")
        add("e.wav")
        add("e.json", data=b"{")
        add("f.txt", data=b"alone")
        add("g.json", data=b'{"status": "failed_to_download", "error_message": "404:\\n gone"}')
        add(
            "h.wav",
            **{"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,3", "GNU.sparse.size": "9"},
        )
        add("i.wav")
        add("i.txt", data=b"\xff")
        add("j\udcff.wav")


def test_odd_members_are_listed_and_the_others_kept(tmp_path):
    _odd_tar(tmp_path / "0.tar")
    made, skipped = rows(tmp_path)
    data = (tmp_path / "0.tar").read_bytes()
    parts = {row.id: data[(place := row.places[row.media])[1] :][: place[2]] for row in made}
    assert parts == {f"0.tar/d/{'l' * 200}.wav": b"sound", "0.tar/a.wav": b"first", "0.tar/b.ogg": b"b"}
    kind = "malformed: a link, a device or a sparse file"
    assert reasons(skipped) == {
        "0.tar/../up.wav": "malformed: ../up.wav: leaves the media root",
        "0.tar//etc/up.wav": "malformed: /etc/up.wav: leaves the media root",
        **{f"0.tar/{name}.wav": kind for name in ("link", "hard", "pipe", "h")},
        "0.tar/a.wav": "malformed: two members of one name",
        "0.tar/c": "malformed: two media of a kind in one sample: c.wav and c.flac",
        "0.tar/e": "malformed: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "0.tar/f": "missing: no media beside it: texts alone",
        "0.tar/g": "missing: no media beside it: 404: gone",
        "0.tar/i": "malformed: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte",
        "0.tar/j?.wav": "malformed: its text or path is not valid Unicode",
    }


ONE = 2 * (512 + 1024)  # bytes of a sample of two members


@pytest.mark.parametrize(
    "damage, kept, why",
    [
        (lambda data: data[: ONE + 900], 1, "damaged after 1 samples: 1.wav is cut off"),
        (lambda data: data[:ONE], 1, "damaged after 1 samples: empty header"),
        (lambda data: data[: ONE + 100], 1, "damaged after 1 samples: truncated header"),
        (lambda data: data[:ONE] + b"x" * 9000, 1, "damaged after 1 samples: invalid header"),
        (lambda data: data[:ONE] + _negative() + data[ONE:], 1, "damaged after 1 samples: "),
        (lambda data: b"x" * 9000, 0, "damaged after 0 samples: invalid header"),
        (lambda data: b"", 0, "damaged after 0 samples: empty file"),
    ],
    ids=["data", "before a header", "header", "garbage", "negative size", "no tar", "empty"],
)
def test_a_damaged_tar_keeps_what_comes_before(tmp_path, damage, kept, why):
    names = {f"{n}.{suffix}": "x" * 700 for n in range(3) for suffix in ("wav", "txt")}
    data = write_tar(tmp_path / "0.tar", names).read_bytes()
    (tmp_path / "0.tar").write_bytes(damage(data))
    write_tar(tmp_path / "1.tar", {"z.wav": b""})
    made, skipped = rows(tmp_path)
    assert len(made) == kept + 1 and skipped[-1].where == "0.tar" and skipped[-1].reason.startswith(why), skipped


def _negative():
    """A header whose member ends before it begins: some versions of tarfile would read it without an end."""
    info = tarfile.TarInfo("1.wav")
    info.size = -1024
    return info.tobuf(tarfile.GNU_FORMAT)


def test_folders_patterns_and_urls_name_tars(tmp_path):
    for name in ("a/00000.tar", "a/00001.tar", "b/00000.tar", ".hidden/0.tar", "b/notes.txt"):
        write_tar(tmp_path / name, {"0.flac": medium("flac"), "0.txt": "x"})
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/raw", recursive=True)

    def ids(root):
        made, skipped = rows(root)
        return [row.id for row in made], reasons(skipped)

    for base in (tmp_path, "memory://raw"):
        assert ids(base) == ([f"{name}.tar/0.flac" for name in ("a/00000", "a/00001", "b/00000")], {})
        assert ids(f"{base}/a/{{00000..00002}}.tar") == (
            ["00000.tar/0.flac", "00001.tar/0.flac"],
            {"00002.tar": "missing: no such tar"},
        )
        assert ids(f"{base}/{{b,a}}/*0.tar")[0] == ["b/00000.tar/0.flac", "a/00000.tar/0.flac"]
        assert ids(f"{base}/a/00001.tar")[0] == ["00001.tar/0.flac"]
        for none in (f"{base}/none", f"{base}/b/*.tgz"):
            with pytest.raises(UserError, match=r"no \.tar file there"):
                rows(none)
    for root, more in ((tmp_path / "a", tmp_path / "local"), ("memory://raw/a", tmp_path / "remote")):
        shard(DataConfig(dataset="webdataset", media_root=str(root), out=str(more), workers=1))
    local, remote = (shard_files(tmp_path / name) for name in ("local", "remote"))
    assert local["a/train/a-train-000000.tar"] == remote["a/train/a-train-000000.tar"]
    assert json.loads(remote["a/train/index.json"])["media_root"] == "memory://raw/a"
    memory.rm("/raw/a/00001.tar")
    config = DataConfig(dataset="webdataset", media_root="memory://raw/a", out=str(tmp_path / "remote"), workers=1)
    row = ManifestRow(
        "i", "i", "i", "s", "train", media="00001.tar/0.flac", places={"00001.tar/0.flac": ["00001.tar", 0, 9]}
    )
    with pytest.raises(UserError, match="finished shards stay: start again when it answers"):
        sample(config, row)


@pytest.mark.parametrize("place", ["", "/0.tar.gz", "/*.tar.zst"])
def test_compressed_tars_are_refused_with_the_remedy(tmp_path, place):
    for name in ("0.tar.gz", "1.tar.zst"):
        (tmp_path / name).write_bytes(b"compressed")
    with pytest.raises(UserError, match=r"\.tar\.\w+ is compressed, .* unpack the tars to plain ones, as with gunzip"):
        rows(f"{tmp_path}{place}")


@pytest.mark.parametrize("base", ["", "memory://beside"])
def test_compressed_tars_beside_plain_ones_are_counted(tmp_path, base):
    base = base or str(tmp_path)
    for name in ("b.tar.zst", "a/0.tgz", "c.tar.gz.txt"):
        with fsspec.open(f"{base}/{name}", "wb", auto_mkdir=True) as file:
            file.write(b"compressed")
    with fsspec.open(f"{base}/0.tar", "wb") as file:
        file.write(write_tar(tmp_path / "made/0.tar", {"0.flac": medium("flac")}).read_bytes())
    (tmp_path / "made/0.tar").unlink()
    made, skipped = rows(base)
    assert [row.id for row in made] == ["0.tar/0.flac"]
    why = "unusable: 2 compressed tars are not read, the first: a/0.tgz: unpack them to plain ones"
    assert reasons(skipped) == {base: why}


def test_parts_and_what_changed_later(run, tmp_path):
    """Parts give one run's bytes; a tar that changes has its shards made again, and no others."""
    for n in range(4):
        write_tar(tmp_path / f"raw/{n}.tar", {"0.flac": medium("flac"), "0.txt": str(n)})
    words = {"media": tmp_path / "raw", "dataset": "webdataset"}
    one, parts = tmp_path / "one", tmp_path / "parts"
    assert run(one, "samples_per_shard=1", "workers=1", **words)[0] == 0
    for flags in (["--part", "0/2"], ["--part", "1/2"], ["--merge"]):
        assert run(parts, "samples_per_shard=1", "workers=1", *flags, **words)[0] == 0
    before = shard_files(one)
    assert len(before) == 7 and before == shard_files(parts)
    times = {path: path.stat().st_mtime_ns for path in one.rglob("raw-*.tar")}
    write_tar(tmp_path / "raw/2.tar", {"0.flac": medium("flac"), "0.txt": "two"})
    os.utime(tmp_path / "raw/2.tar", ns=(1, 1))
    assert run(one, "samples_per_shard=1", "workers=1", **words)[0] == 0
    assert sum(path.stat().st_mtime_ns != time for path, time in times.items()) == 1
    assert sorted(meta["captions"][0] for meta in rows_of(one / "raw/train")) == ["0", "1", "3", "two"]


def test_samples_of_a_tar_that_is_gone_stay(run, tmp_path):
    """Where a pattern still names it; one that a URL does not give for now ends the run, and no shard changes."""
    for n in range(3):
        write_tar(tmp_path / f"raw/{n}.tar", {"0.flac": medium("flac")})
    words = {"media": tmp_path / "raw/{0..2}.tar", "dataset": "webdataset"}
    assert run(tmp_path / "out", "workers=1", **words)[0] == 0
    before = shard_files(tmp_path / "out")
    (tmp_path / "raw/1.tar").unlink()
    code, printed = run(tmp_path / "out", "workers=1", **words)
    assert code == 0 and "1 missing, the first: 1.tar: no such tar" in printed
    assert shard_files(tmp_path / "out") == before and len(rows_of(tmp_path / "out/raw/train")) == 3
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "raw/0.tar"), "/one/0.tar")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(memory), "cat_file", _refuse)
        with pytest.raises(UserError, match="memory://one/0.tar: .*not now; finished shards stay"):
            rows("memory://one")


def _refuse(*_, **__):
    raise PermissionError("not now")


def test_pictures_of_one_member_and_sound_of_another(tmp_path):
    """A picture, and a video, each with separate sound: the frames are the one's, while the sound of the other lasts."""
    write_tar(
        tmp_path / "0.tar",
        {"0.png": medium("png"), "0.wav": medium("wav"), "1.mp4": medium("mp4"), "1.flac": medium("flac")},
    )
    config = DataConfig(dataset="webdataset", media_root=str(tmp_path))
    still, video = (sample(config, row) for row in read(config)[0])
    write_tar(
        tmp_path / "0.tar",
        {"0.wav": medium("wav"), "1.mp4": medium("mp4"), "2.flac": medium("flac"), "3.png": medium("png")},
    )
    made = read(config)[0]
    made[1].end = 1.0
    sound, alone, flac, picture = (sample(config, row) for row in made)
    assert still[1] == {"fbank.jpg": sound[1]["fbank.jpg"], "frames.jpg": picture[1]["frames.jpg"]}
    assert video[1] == {"fbank.jpg": flac[1]["fbank.jpg"], "frames.jpg": alone[1]["frames.jpg"]}
    assert video[0]["media"] == {"audio": "0.tar/1.flac", "frames": "0.tar/1.mp4"} and video[0]["n_frames"] == 1
    assert alone[1]["fbank.jpg"] != flac[1]["fbank.jpg"] and still[0]["n_frames"] == 1
