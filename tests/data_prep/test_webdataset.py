"""data_prep/sets/webdataset.py: tars of media and texts, as video2dataset, img2dataset and LAION write them."""

import io
import json
import os
import tarfile

import pytest
from annotation_files import reasons
from raw_media import medium, shard_files, write_tar
from sample_prep import rows_of

from clip4vla.config import DataConfig
from clip4vla.errors import UserError
from data_prep.annotations import read
from data_prep.build_shards import shard

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
