"""search/sources.py: which files of a folder are indexed."""

import shutil

import pytest
from forks import ROOT
from litter import litter, unreadable

from clip4vla.errors import UserError
from clip4vla.search import sources

PICTURE = sorted((ROOT / "tests/sample").rglob("*.png"))[0]


def test_what_is_hidden_is_not_indexed_unless_it_is_named(tmp_path, sample_shards):
    root = tmp_path / ".library"  # named, so its own dot does not count
    (root / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b.png", "sub/a..b.png", "@ea.png"):
        shutil.copy(PICTURE, root / name)
    litter(root, root / "a.png")
    shutil.copytree(sample_shards / "sounds/test", root / ".snapshot/sounds/test")
    where, some = sources.find(str(root), None)
    assert where == str(root) and [source.name for source in some] == ["@ea.png", "a.png", "sub/a..b.png", "sub/b.png"]
    _, some = sources.find(str(root / "@eaDir"), None)
    assert [source.name for source in some] == ["a.png"]
    _, some = sources.find(str(root / "._a.png"), None)
    assert [source.name for source in some] == ["._a.png"]


def test_a_folder_that_cannot_be_read_stops_it_unless_it_is_hidden(tmp_path, monkeypatch):
    """As an ext4 disk's lost+found does for everybody but root."""
    shutil.copy(PICTURE, tmp_path / "a.png")
    unreadable(monkeypatch, "lost+found", "locked")
    (tmp_path / "lost+found").mkdir()
    assert [source.name for source in sources.find(str(tmp_path), None)[1]] == ["a.png"]
    (tmp_path / "locked").mkdir()
    with pytest.raises(UserError, match="cannot read .*locked: Permission denied"):
        sources.find(str(tmp_path), None)
