"""A name is a name: what stands before a colon is no protocol, of a medium as of a shard folder."""

import shutil

import pytest
import soundfile
import torch

from clip4vla.config import FramesConfig, SpectrogramConfig
from clip4vla.data import preprocessing
from clip4vla.data.shards import ShardFolder
from clip4vla.io import remote

NAMES = "Talk: intro|12:30|data:x|concat:a,b|file:y|pipe:|a::b|http:|-x|50%d|s3:".split("|")


def test_a_medium_whose_name_has_a_colon_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        soundfile.write(tmp_path / "tone.wav", torch.rand(4000).numpy() - 0.5, 8000)
        (tmp_path / "tone.wav").rename(f"{name}.wav")
        clip = preprocessing.read(f"{name}.wav", SpectrogramConfig(), FramesConfig(), "a")
        assert clip.rows == 63, name
        assert [end for _, end, _ in preprocessing.windows(f"{name}.wav", SpectrogramConfig())] == [0.5]


def test_a_shard_folder_whose_name_has_a_colon_is_opened(sample_shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        shutil.copytree(sample_shards / "speech_fr/val", name)
        folder = ShardFolder.open(name)
        assert len(folder) == 2 and "json" in folder.read([(0, 0)])[0], name


def test_what_has_a_protocol_is_a_url(tmp_path):
    (tmp_path / "a:b").mkdir()
    assert (
        remote.open_folder(f"file://{tmp_path}/a:b")[1]
        == remote.open_folder(f"{tmp_path}/a:b/")[1]
        == f"{tmp_path}/a:b"
    )
    assert remote.open_folder("memory://a/b")[0].protocol == "memory"
    with pytest.raises(ValueError, match="Protocol not known: nothing"):
        remote.open_folder("nothing://a")
