"""Copies of checkpoints at any fsspec URL. Object stores rename nothing: a copy counts once its manifest is there."""

import hashlib
import json
import os
import posixpath
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec

from clip4vla.config import DataSources, UserError
from clip4vla.files import write_text
from clip4vla.settings import parse_json
from clip4vla.storage import DEFAULT, PIECE, call, exists, line, open_folder, read_file, read_ranges

MANIFEST = "complete.json"
EVALUATIONS = "evaluations.json"
STEP = re.compile(r"step-\d{8}")  # the name of a whole checkpoint, and no other
VALIDATION = re.compile(r"val-\d{8}")
SLOWEST = 1e6  # bytes/s that an upload must reach not to be called hung


def upload(folder: Path, url: str, cfg: DataSources = DEFAULT) -> None:
    """Copy a checkpoint folder to URL/NAME; complete.json (names, sizes, sha256) comes last, so a part is never complete.

    Raises OSError with one line when the retries are used up.
    """
    target = f"{url.rstrip('/')}/{folder.name}"
    remove(target, cfg)
    fs, root = open_folder(target)
    manifest = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, size = file.relative_to(folder).as_posix(), file.stat().st_size
        manifest[name] = {"size": size, "sha256": _sha256(file)}
        _make_parent(fs, f"{root}/{name}")
        call(fs, "put_file", str(file), f"{root}/{name}", cfg=cfg, seconds=cfg.timeout + size / SLOWEST)
    call(fs, "pipe_file", f"{root}/{MANIFEST}", json.dumps(manifest, indent=1).encode(), cfg=cfg)


def newest_upload(url: str, cfg: DataSources = DEFAULT) -> str | None:
    """URL of the newest complete step-NNNNNNNN below `url`; None if there is none. Raises OSError if it cannot be told."""
    fs, root = open_folder(url)
    steps = reversed(uploads(url, cfg))
    newest = next((step for step in steps if exists(fs, f"{root}/{step}/{MANIFEST}", cfg)), None)
    return newest and f"{url.rstrip('/')}/{newest}"


def uploads(url: str, cfg: DataSources = DEFAULT) -> list[str]:
    """Names of the step-NNNNNNNN below `url`, whole or not, oldest first. Raises OSError if it cannot be told."""
    fs, root = open_folder(url)
    fs.invalidate_cache()  # others write there
    try:
        found = call(fs, "ls", root, detail=False, cfg=cfg)
    except FileNotFoundError:
        return []
    return sorted(name for name in {posixpath.basename(path.rstrip("/")) for path in found} if STEP.fullmatch(name))


def download(
    url: str, folder: Path, cfg: DataSources = DEFAULT, passed: Callable[[str], object] = lambda place: None
) -> None:
    """Fetch an upload into `folder`, aside (partial-NAME), sizes and sha256 verified, then renamed.

    passed(place) is called before each 64 MB, as a sign of life. Raises UserError for a manifest that is none, or whose
    names leave the folder; OSError if the bytes cannot be had.
    """
    fs, root = open_folder(url)
    manifest = _manifest(read_file(fs, f"{root}/{MANIFEST}", cfg), url)
    aside = folder.with_name(f"partial-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    for name, (size, sha256) in manifest.items():
        file = aside / name
        file.parent.mkdir(parents=True, exist_ok=True)
        _fetch_file(fs, f"{root}/{name}", file, size, cfg, passed)
        if _sha256(file) != sha256:
            raise OSError(f"{url}/{name}: sha256 differs from {MANIFEST}'s")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def upload_evaluations(run_dir: str, url: str, cfg: DataSources = DEFAULT) -> None:
    """Copy the metrics of a run's evaluations on data.val to URL/evaluations.json, if there are any. Raises OSError."""
    found = {
        file.parent.name: json.loads(file.read_text(encoding="utf-8"))
        for file in Path(run_dir, "eval").glob("val-*/metrics.json")
    }
    if found:
        fs, root = open_folder(url)
        _make_parent(fs, f"{root}/{EVALUATIONS}")
        call(fs, "pipe_file", f"{root}/{EVALUATIONS}", json.dumps(found).encode(), cfg=cfg)


def download_evaluations(url: str, run_dir: str, cfg: DataSources = DEFAULT) -> None:
    """Write what run_dir lacks of URL/evaluations.json. Raises UserError if that is none, OSError if it cannot be had."""
    fs, root = open_folder(url)
    if not exists(fs, f"{root}/{EVALUATIONS}", cfg):
        return
    try:
        found = dict(parse_json(read_file(fs, f"{root}/{EVALUATIONS}", cfg)))
    except (ValueError, TypeError):
        raise UserError(f"{url}/{EVALUATIONS} is not readable; remove it") from None
    for name in filter(VALIDATION.fullmatch, found):
        file = Path(run_dir, "eval", name, "metrics.json")
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(found[name], indent=1))


def remove(url: str, cfg: DataSources = DEFAULT) -> None:
    """Remove an upload, whole or not: its manifest first. Raises OSError if that cannot be done."""
    fs, root = open_folder(url)
    fs.invalidate_cache()
    for method, path, words in (("rm_file", f"{root}/{MANIFEST}", {}), ("rm", root, {"recursive": True})):
        try:
            call(fs, method, path, cfg=cfg, **words)
        except FileNotFoundError:
            pass


def _make_parent(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Where folders are real. Object stores (async, all of them) have none, and s3fs would make a bucket."""
    if not fs.async_impl:
        fs.makedirs(posixpath.dirname(path), exist_ok=True)


def _manifest(text: bytes, url: str) -> dict[str, tuple[int, str]]:
    """(size, sha256) by name; UserError if it cannot be trusted."""
    try:
        manifest = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in parse_json(text).items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise UserError(f"{url}/{MANIFEST} is not a readable manifest; remove that checkpoint") from None
    for name in manifest:
        if "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise UserError(f"{url}/{MANIFEST}: name {name!r} leaves the folder; remove that checkpoint")
    return manifest


def _fetch_file(fs: Any, path: str, file: Path, size: int, cfg: DataSources, passed: Callable[[str], object]) -> None:
    """A remote file of known size to the disk, synced, a few pieces at a time."""
    with file.open("wb") as stream:
        for first in range(0, size, 8 * PIECE):
            passed(f"start-up: {path} from byte {first}")
            starts = list(range(first, min(size, first + 8 * PIECE), PIECE))
            ends = [min(size, start + PIECE) for start in starts]
            for blob in read_ranges(fs, [path] * len(starts), starts, ends, cfg):
                if isinstance(blob, BaseException):
                    raise OSError(f"{path}: {line(blob)}") from blob
                stream.write(blob)
        stream.flush()
        os.fsync(stream.fileno())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
