"""Copies of checkpoints at a URL: whole or not there, through faults and tampering."""

import json
import os
import random
import shutil

import pytest
import s3

from clip4vla.checkpoints.remote import MANIFEST, download, newest_upload, remove, upload, uploads
from clip4vla.config import DataSources
from clip4vla.errors import UserError
from clip4vla.io import remote


@pytest.fixture
def checkpoint(tmp_path):
    """step-00000002, with a file of several pieces."""
    folder = tmp_path / "step-00000002"
    (folder / "sub").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(random.Random(0).randbytes(2 * remote.PIECE + 5))
    (folder / "config.json").write_text("{}")
    (folder / "sub/empty").touch()
    return folder


def content(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("where", ["s3", "disk"])
def test_a_checkpoint_comes_back_from_its_copy(server, checkpoint, tmp_path, where):
    mirror = f"s3://{s3.BUCKET}/mirror" if where == "s3" else f"file://{tmp_path}/mirror"
    cfg = DataSources(request_timeout=5, retries=9)
    assert newest_upload(mirror, cfg) is None
    later = checkpoint.rename(tmp_path / "step-00000010")
    with server.faults(fail=0.1, cut=0.1, refused="POST"):
        upload(later, mirror, cfg)
        upload(shutil.copytree(later, checkpoint), mirror + "/", cfg)
        newest = newest_upload(mirror, cfg)
        assert newest == f"{mirror}/step-00000010"
        download(newest, tmp_path / "back/step-00000010", cfg)
    assert content(tmp_path / "back/step-00000010") == content(later)
    assert [path.name for path in (tmp_path / "back").iterdir()] == ["step-00000010"]
    remove(newest, cfg)
    assert newest_upload(mirror, cfg) == f"{mirror}/step-00000002"
    remove(f"{mirror}/step-00000002", cfg)
    remove(f"{mirror}/step-00000002", cfg)
    assert newest_upload(mirror, cfg) is None


def test_a_copy_interrupted_anywhere_is_not_complete(server, checkpoint, tmp_path):
    cfg, mirror = DataSources(request_timeout=5, retries=0), f"s3://{s3.BUCKET}/cut"
    checkpoint.joinpath("model.safetensors").write_bytes(b"small")
    older = shutil.copytree(checkpoint, tmp_path / "step-00000001")
    upload(older, mirror, cfg)
    for whole in (False, True):  # the second time over a complete copy
        for done in (0, 2, 3) if whole else range(4):
            with server.faults(puts=done), pytest.raises(OSError, match="InternalError|500|We encountered") as said:
                upload(checkpoint, mirror, cfg)
            assert "\n" not in str(said.value)
            assert newest_upload(mirror, cfg) == f"{mirror}/step-00000001", (whole, done)
        upload(checkpoint, mirror, cfg)
        assert newest_upload(mirror, cfg) == f"{mirror}/step-00000002"


def test_a_removal_that_is_interrupted_leaves_no_copy_that_counts(server, checkpoint):
    cfg, mirror = DataSources(request_timeout=5, retries=0), f"s3://{s3.BUCKET}/removed"
    upload(checkpoint, mirror, cfg)
    with server.faults(refused="POST"), pytest.raises(OSError, match="InternalError|500"):  # s3fs removes many by POST
        remove(f"{mirror}/{checkpoint.name}", cfg)
    assert uploads(mirror, cfg) == [checkpoint.name] and newest_upload(mirror, cfg) is None


def test_a_copy_that_was_tampered_with_is_refused(server, checkpoint, tmp_path):
    cfg, mirror = DataSources(request_timeout=5, retries=0), tmp_path / "mirror"
    upload(checkpoint, str(mirror), cfg)
    copy, back = mirror / checkpoint.name, tmp_path / "back" / checkpoint.name
    model = bytearray((copy / "model.safetensors").read_bytes())
    for change in (model[:-1], model[:-1] + b"x"):
        (copy / "model.safetensors").write_bytes(change)
        with pytest.raises(OSError, match="sha256 differs"):
            download(str(copy), back, cfg)
    for name in ("../evil", "/etc/evil", "a//b", "a\\b", ""):
        (copy / MANIFEST).write_text(json.dumps({name: {"size": 1, "sha256": ""}}))
        with pytest.raises(UserError, match="leaves the folder"):
            download(str(copy), back, cfg)
    for text in ("[]", '{"a": {"size": 1e999, "sha256": ""}}', '{"a":' * 100_000):
        (copy / MANIFEST).write_text(text)
        with pytest.raises(UserError, match="not a readable manifest"):
            download(str(copy), back, cfg)
    assert not back.exists() and not os.path.exists(tmp_path / "back/evil")
