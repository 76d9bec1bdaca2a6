"""data_prep/shard.py: broken media, full disks and users' mistakes."""

import json
import resource
import shutil
import sys

import pytest
from forks import ROOT
from sample_prep import SAMPLE, rows_of, tones

from clip4vla.config import DataConfig
from clip4vla.config_io import describe
from clip4vla.errors import UserError
from data_prep.build_shards import lock, sample
from data_prep.manifest import ManifestRow
from data_prep.sets.stamps import stamps
from data_prep.shard import main


def test_a_split_that_is_gone_is_named(run, tmp_path):
    """Its clips may have moved to another split, and would leak."""
    media, out = tmp_path / "media", tmp_path / "out"
    tones(media, "t1", "t2")
    for split in ("val", "test"):
        (media / "captions.csv").write_text(f"path,caption,split\nt1.wav,t1,train\nt2.wav,t2,{split}\n")
        code, said = run(out, media=media, dataset="folder")
        assert code == 0 and ("media/val: the annotations have nothing of it any more" in said) == (split == "test")


def test_two_runs_into_one_folder_refuse(run, tmp_path):
    with lock(tmp_path):
        code, error = run(tmp_path)
        assert code == 2 and "another run is writing there" in error
        with pytest.raises(UserError, match="another run"):
            lock(tmp_path)


def test_broken_media_are_quarantined_then_too_many_stop_the_run(run, tmp_path):
    media, out = tmp_path / "media", tmp_path / "out"
    for part in ("food/fruit", "household", "hobbies"):
        shutil.copytree(SAMPLE / part, media / part, ignore=shutil.ignore_patterns("tools", "arttools"))
    total = len(stamps(media))
    assert run(out, media=media)[0] == 0 and list(out.rglob("index.json"))
    (media / "food/fruit/apple_red.ogg").write_bytes(b"OggS broken")
    (media / "household/rubberduck.png").write_bytes((media / "household/rubberduck.png").read_bytes()[:900])
    code, error = run(out, media=media)
    assert code == 2 and "more than max_failed_fraction=0.01" in error and len(error.splitlines()) == 1
    assert not list(out.rglob("index.json"))
    assert run(out, "max_failed_fraction=0.9", media=media)[0] == 0
    lines = [json.loads(line) for file in out.rglob("quarantine.jsonl") for line in file.read_text().splitlines()]
    reasons = {line["id"]: line["reason"] for line in lines}
    assert "unreadable media" in reasons["sounds/food/fruit/apple_red"]
    assert "unreadable picture" in reasons["pictures/household/rubberduck"]
    assert all("apple_red" in name or "rubberduck" in name for name in reasons)
    ids = {meta["id"] for index in out.rglob("index.json") for meta in rows_of(index.parent)}
    assert not ids & set(reasons) and len(ids) + len(reasons) == total


@pytest.mark.parametrize(
    "words, message",
    [
        (["media_root=/nowhere/at/all"], "no such folder"),
        ([f"media_root={ROOT / 'configs'}"], "nothing in stamps's layout"),
        (["out=README.md/x"], "README.md"),
        (["out=/sys/clip4vla"], "/sys/clip4vla"),  # read-only even for root
        (["out=''"], "out is empty"),
        (["out="], "out is empty"),
        (["outt=x"], "unknown key outt"),
        (["--part", "3/3"], "--part 3/3: give I/N with 0 <= I < N"),
        (["dataset=folder"], "no captions.csv"),
    ],
)
def test_user_mistakes_end_with_one_line(run, tmp_path, words, message):
    words = [word.replace("README.md", str(SAMPLE / "README.md")) for word in words]
    code, error = run(tmp_path / "new/out", *words)
    assert code == 2 and message in error and len(error.splitlines()) == 1, error
    assert not list(tmp_path.iterdir())


def test_full_disk_ends_with_one_line(run, tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # bytes in a file; stands in for a full disk
    try:
        code, error = run(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert code == 2 and "File too large" in error and len(error.splitlines()) == 1, error
    assert not list((tmp_path / "out").rglob("index.json"))


def test_help_lists_every_setting(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shard.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    text = capsys.readouterr().out
    assert all(key in text for key, _, _ in describe(DataConfig))


@pytest.mark.parametrize("place", [{"picture": "../a.png"}, {"media": "../a.wav"}, {"media": "/etc/a.wav"}])
def test_paths_cannot_leave_the_media_root(tmp_path, place):
    with pytest.raises(ValueError, match="leaves the media root"):
        sample(DataConfig(media_root=str(tmp_path)), ManifestRow("i", "i", "i", "s", "train", ["x"], ["en"], **place))
