"""Annotation files to read, and data_prep/shard.py in this process."""

import json
import sys

import pytest
from sample_prep import settings

from clip4vla.config import DataConfig
from data_prep.annotations import read
from data_prep.shard import main


@pytest.fixture
def prepare(tmp_path):
    """Annotation files and empty media files where their configs want them; returns the set's rows and what it skipped."""

    def call(dataset, files, media=(), **settings):
        for name, text in files.items():
            path = tmp_path / "annotations" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = text if isinstance(text, str | bytes) else json.dumps(text)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        for name in media:
            path = tmp_path / "media" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        (tmp_path / "media").mkdir(exist_ok=True)
        where = {"annotations": str(tmp_path / "annotations"), "media_root": str(tmp_path / "media")}
        return read(DataConfig(dataset=dataset, **(where | settings)))

    return call


@pytest.fixture
def run(monkeypatch, capfd):
    """The command in this process (importing torch again takes seconds): its exit code and its error line."""

    def call(out, *words, **more):
        monkeypatch.setattr(sys, "argv", ["shard.py", *settings(out, *words, **more)])
        capfd.readouterr()
        try:
            main()
        except SystemExit as stop:
            error = capfd.readouterr().err
            return stop.code, error[error.index("error: ") :]  # progress may stand before it
        return 0, capfd.readouterr().out

    return call
