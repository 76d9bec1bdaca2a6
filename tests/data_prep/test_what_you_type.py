"""The table that docs/data.md begins with: each command, typed as it stands there, on small files of its kind."""

import io
import json
import re
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import s3
import soundfile
from annotation_files import FORMATS, IDS
from forks import ROOT
from raw_media import medium, write_tar
from sample_prep import rows_of

from data_prep import check, shard

PAGE = (ROOT / "docs/data.md").read_text()
TABLE = dict(re.findall(r"^\| (.+) \| `(python .+)` \|$", PAGE.partition("## What goes in")[0], re.M))
NAMES = {"TABLES": "tables", "TABLE.csv": "tables/mine.csv", "FOLDER": "media", "BUCKET": s3.BUCKET}
ALONE = {"folder", "stamps", "webdataset", "parquet"}  # whose forms are rows of their own, or pages


def content(name):
    """A video of 2 s, a picture, or a sound of 1 s: as a file of this name holds."""
    kind = name.rpartition(".")[2]
    return medium({"png": "png", "mp4": "mp4", "mkv": "mp4", "avi": "mp4"}.get(kind, "wav"))


def narrated(name):
    """A sound as long as three clips of HowTo100M."""
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(35 * 4000) * 0.1), 4000, format="WAV")
    return file.getvalue()


def files(root, **contents):
    """Files below media/ or tables/, by path."""
    for name, data in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)


def media(root, *names):
    files(root, **{f"media/{name}": content(name) for name in names})


def own(root):
    media(root, "a.mp4", "b/c.wav")
    files(root, **{"media/captions.csv": "path,caption\na.mp4,A dog\nb/c.wav,Rain\nb/c.wav,Wind\n"})


def elsewhere(root):
    media(root, f"Rain [{IDS[1]}].mkv", f"b/{IDS[0]}_30_40.wav")
    files(root, **{"tables/mine.csv": f"path;caption;start;end\n{IDS[1]};A dog;0;1\n{IDS[0]};Rain, wind;30;40\n"})


def pairs(root):
    media(root, "a.png", "b.png", "a.wav")
    files(root, **{"media/captions.csv": "picture,sound,caption\na.png,a.wav,A dog\nb.png,a.wav,Rain\n"})


def several(root):
    media(root, "a.mp4", "c.wav")
    files(root, **{"media/captions.csv": "path,caption,labels\na.mp4,A dog,Dog;Bark\nc.wav,Rain,Rain\n"})


def tars(root):
    clip = {"key": "0_00000", "clips": [["00:00:01.000", "00:00:02.000"]], "caption": "A dog"}
    clips = {"0_00000.mp4": medium("mp4"), "0_00000.json": clip}
    write_tar(root / "media/00000.tar", clips)
    write_tar(root / "media/00001.tar", {"1.png": medium("png"), "1.txt": "Rain", "1.json": {"caption": "Rain"}})


def laion(root):
    for i, text in enumerate(("A dog", ["Rain", "Wind"])):
        write_tar(root / f"media/train/{i}.tar", {f"{i}.flac": medium("flac"), f"{i}.json": {"text": text, "tag": []}})


def cells(root):
    (root / "media").mkdir()
    table = pyarrow.table({"audio": [{"bytes": medium("flac"), "path": "x.flac"}] * 2, "text": ["A dog", "Rain"]})
    pyarrow.parquet.write_table(table, root / "media/train-00000.parquet")


def paths(root):
    media(root, "a.mp4", "b/c.wav")
    table = pyarrow.table({"file_name": ["a.mp4", "b/c.wav"], "caption": ["A dog", "Rain"], "other": ["x", "y"]})
    pyarrow.parquet.write_table(table, root / "media/all.parquet")


def data_set():
    sound = {"bytes": [medium("flac")] * 2, "path": ["a.flac", "b.flac"]}
    column = pyarrow.StructArray.from_arrays([pyarrow.array(sound[name]) for name in sound], list(sound))
    features = datasets.Features({"audio": datasets.Audio(decode=False), "caption": datasets.Value("string")})
    made = pyarrow.Table.from_arrays([column, pyarrow.array(["A dog", "Rain"])], schema=features.arrow_schema)
    return datasets.Dataset(made)


def saved(root):
    data_set().save_to_disk(str(root / "media"))


def hub(root):
    (root / "USER/NAME").mkdir(parents=True)  # which `datasets` takes in place of the hub's
    data_set().to_parquet(str(root / "USER/NAME/train.parquet"))


CAPTIONS = "audiocap_id,youtube_id,start_time,caption\n" + "".join(
    f"{i},{name},30,{text}\n" for i, (name, text) in enumerate(zip(IDS, ("A dog", "Rain", "A car"), strict=True))
)


def downloaded(root):
    media(root, f"x/{IDS[0]}_30.0-40.0.wav", "1.wav", "00000/000000012_00000.mp4")
    listed = {"url": f"https://youtu.be/{IDS[2]}", "clips": [["00:00:30.000", "00:00:40.000"]]}
    files(root, **{"tables/train.csv": CAPTIONS, "media/00000/000000012_00000.json": json.dumps(listed)})


def cut(root):
    media(root, *(f"{name}.wav" for name in IDS))
    files(root, **{"tables/test.csv": CAPTIONS})


ROWS = {
    "a folder of media, in it captions.csv": (own, {"a.mp4": ["A dog"], "b/c.wav": ["Rain", "Wind"]}),
    "the table elsewhere": (elsewhere, {f"{IDS[1]}@0-1": ["A dog"], f"{IDS[0]}@30-40": ["Rain, wind"]}),
    "pictures and the sound of each": (pairs, {"a.png+a.wav": ["A dog"], "b.png+a.wav": ["Rain"]}),
    "several classes a clip": (several, {"a.mp4": ["A dog"], "c.wav": ["Rain"]}),
    "tars by video2dataset": (tars, {"00000.tar/0_00000.mp4": ["A dog"], "00001.tar/1.png": ["Rain"]}),
    "LAION-audio's tars": (laion, {"train/0.tar/0.flac": ["A dog"], "train/1.tar/1.flac": ["Rain", "Wind"]}),
    "parquet with media in its cells": (
        cells,
        {f"train-00000.parquet/{i}/x.flac": [text] for i, text in enumerate(("A dog", "Rain"))},
    ),
    "parquet with paths of media": (paths, {"a.mp4": ["A dog"], "b/c.wav": ["Rain"]}),
    "a Hugging Face data set saved on disk": (saved, ["A dog", "Rain"]),
    "the id of one on the hub": (hub, ["A dog", "Rain"]),
    "clips by yt-dlp": (downloaded, {f"{n}_30_40": [t] for n, t in zip(IDS, ("A dog", "Rain", "A car"), strict=True)}),
    "clips that were cut": (cut, {f"{n}_30_40": [t] for n, t in zip(IDS, ("A dog", "Rain", "A car"), strict=True)}),
}


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """Runs a command line in a folder that has the configs, in this process: whatever is not well ends the test."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delitem(sys.modules, "transformers", raising=False)  # None, by clip4vla/cli.py

    def call(line, *more):
        for name, value in NAMES.items():
            line = line.replace(name, value)
        _, script, *words = line.replace('"', "").split()
        monkeypatch.setattr(sys, "argv", [script, *words, *more])
        {"data_prep/shard.py": shard.main, "data_prep/check.py": check.main}[script]()

    return call


def command(begin):
    (line,) = (line for what, line in TABLE.items() if what.startswith(begin))
    return line


def made(root):
    """Captions of all samples below data/shards, by id."""
    places = sorted(path.parent for path in (root / "data/shards/NAME").rglob("index.json"))
    return {row["id"]: row for place in places for row in rows_of(place)}


@pytest.mark.parametrize("row", ROWS)
def test_what_a_row_of_the_table_says_makes_shards(row, typed, tmp_path):
    build, captions = ROWS[row]
    build(tmp_path)
    typed(command(row), "workers=1")
    rows = made(tmp_path)
    if isinstance(captions, list):
        assert sorted(text for row in rows.values() for text in row["captions"]) == captions
    else:
        assert {name: row["captions"] for name, row in rows.items()} == captions
    if row == "several classes a clip":
        assert {tuple(row["labels"]) for row in rows.values()} == {("Dog", "Bark"), ("Rain",)}
    if row == "pictures and the sound of each":
        assert all(row["has_audio"] and row["has_frames"] for row in rows.values())


SAMPLES = {"howto100m": 6, "wavcaps": 4, "grid": 2, "librispeech": 2, "youcook2": 6}  # of others' files three


@pytest.mark.parametrize("form", [form for form in FORMATS if form.split()[0] not in ALONE])
def test_a_set_of_the_list_makes_shards(form, typed, tmp_path):
    given, name = FORMATS[form], form.split()[0]
    given.write(tmp_path / "tables", tmp_path / "media", narrated if name == "howto100m" else content)
    tables = "media" if given.beside else "tables"
    typed(command("Clotho").replace("TABLES", tables).replace("clotho", name), "workers=1")
    assert [row["source"] for row in made(tmp_path).values()] == [name] * SAMPLES.get(form, 3)


def test_tars_and_shards_lie_on_object_storage(typed, tmp_path, server, capfd):
    tars(tmp_path)
    s3.put(tmp_path / "media", "NAME", server.port)
    typed(command("tars on object storage"), "workers=1")
    assert {name: row["captions"] for name, row in made(tmp_path).items()} == ROWS["tars by video2dataset"][1]
    own(tmp_path)
    typed(command("a place for the shards"), "workers=1")
    with pytest.raises(SystemExit) as stop:
        typed(command("shards, to be verified"))
    assert stop.value.code == 0, capfd.readouterr()


def test_every_row_is_here():
    here = [*ROWS, "Clotho", "tars on object storage", "a place for the shards", "shards, to be verified"]
    left = [what for what in TABLE if not what.startswith(tuple(here))]
    assert (
        len(left) == 1
        and TABLE[left[0]] in PAGE.partition("## Precomputed embeddings")[2]
        and len(TABLE) == len(here) + 1
    )
