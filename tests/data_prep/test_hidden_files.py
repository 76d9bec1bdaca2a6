"""data_prep/manifest.py and what else of data_prep walks folders: people's files, without what systems leave beside them."""

import shutil

from forks import ROOT
from litter import FOLDERS, litter, unreadable

from clip4vla.io.out_folder import OutFolder
from data_prep import build_shards
from data_prep.checks.folders import find
from data_prep.manifest import Located, MediaFolder
from data_prep.sets.stamps import stamps


def test_hidden_files_are_nobodys_media(tmp_path):
    """A NAS's #recycle comes before every letter, so that a deleted file of the same name would be taken."""
    (tmp_path / "media/sub").mkdir(parents=True)
    for name in ("media/a.mp4", "media/sub/b.wav"):
        (tmp_path / name).touch()
    litter(tmp_path / "media", tmp_path / "media/a.mp4")
    media = MediaFolder(tmp_path / "media")
    assert (
        sorted(media.paths) == ["a.mp4", "sub/b.wav"]
        and media.find("a") == Located("a.mp4")
        and media.find("._a") is None
    )


def test_a_folder_that_cannot_be_read_is_named_unless_it_is_hidden(tmp_path, monkeypatch, capsys):
    for name in ("lost+found", "locked", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.wav").touch()
    unreadable(monkeypatch, "lost+found", "locked")
    assert MediaFolder(tmp_path).paths == ["open/open.wav"]
    assert capsys.readouterr().err == f"left out, cannot be read: {tmp_path}/locked (Permission denied)\n"


def test_hidden_files_are_no_stamps(tmp_path):
    """macOS's ._x.txt of a copied disk holds attributes, which would be a caption."""
    stamp = next(path for path in sorted((ROOT / "tests/sample").rglob("*.txt")) if path.with_suffix(".png").exists())
    shutil.copytree(stamp.parent, tmp_path / "animals")
    before = [row.id for row in stamps(tmp_path)]
    litter(tmp_path, *(tmp_path / "animals").iterdir())
    assert [row.id for row in stamps(tmp_path)] == before and before


def test_hidden_folders_of_shards_are_not_checked(tmp_path, sample_shards):
    """Snapshots hold whole copies, each of whose clips would be reported as another's."""
    shutil.copytree(sample_shards / "sounds/test", tmp_path / ".out/sounds/test")
    for name in FOLDERS:
        shutil.copytree(sample_shards / "sounds/test", tmp_path / ".out" / name / "sounds/test")
    assert [folder.path for folder in find([str(tmp_path / ".out")])] == [str(tmp_path / ".out/sounds/test")]


def test_shards_of_an_earlier_plan_go_and_others_hidden_files_stay(tmp_path):
    names = ["s-train-000000.tar", "s-train-000001.tar", "s-train-000001.tar.partial", "._s-train-000000.tar"]
    for name in names:
        (tmp_path / name).touch()
    build_shards._remove_stale(OutFolder(str(tmp_path), tmp_path), tmp_path, {"s-train-000000"})
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[3]}
