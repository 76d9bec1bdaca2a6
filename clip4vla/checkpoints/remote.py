"""Copy checkpoints to and from any fsspec URL. Object stores rename nothing: a copy counts once its manifest is there."""

import hashlib
import json
import logging
import os
import posixpath
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import fsspec

from clip4vla.checkpoints.lookup import STEP, expired, newest_checkpoint
from clip4vla.config import DataSources, RunConfig
from clip4vla.config_io import parse_json
from clip4vla.errors import UserError, one_line
from clip4vla.io.atomic import write_text
from clip4vla.io.remote import DEFAULT, PIECE, call, exists, line, open_folder, read_file, read_ranges

MANIFEST = "complete.json"
EVALUATIONS = "evaluations.json"
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
        call(fs, "put_file", str(file), f"{root}/{name}", cfg=cfg, seconds=cfg.request_timeout + size / SLOWEST)
    call(fs, "pipe_file", f"{root}/{MANIFEST}", json.dumps(manifest, indent=1).encode(), cfg=cfg)


def newest_upload(url: str, cfg: DataSources = DEFAULT) -> str | None:
    """Find the URL of the newest complete step-NNNNNNNN below `url`, None without any. Raises OSError if it cannot be read."""
    fs, root = open_folder(url)
    steps = reversed(uploads(url, cfg))
    newest = next((step for step in steps if exists(fs, f"{root}/{step}/{MANIFEST}", cfg)), None)
    return newest and f"{url.rstrip('/')}/{newest}"


def uploads(url: str, cfg: DataSources = DEFAULT) -> list[str]:
    """List the names of the step-NNNNNNNN below `url`, whole or not, oldest first. Raises OSError if it cannot be read."""
    fs, root = open_folder(url)
    fs.invalidate_cache()  # others write there
    try:
        paths = call(fs, "ls", root, detail=False, cfg=cfg)
    except FileNotFoundError:
        return []
    return sorted(name for name in {posixpath.basename(path.rstrip("/")) for path in paths} if STEP.fullmatch(name))


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
    aside.rename(folder)  # not atomic_folder: the next download, or the next save, removes partial-NAME after a kill


def upload_evaluations(run_dir: str, url: str, cfg: DataSources = DEFAULT) -> None:
    """Copy the metrics of a run's evaluations on data.val to URL/evaluations.json, if there are any. Raises OSError."""
    metrics = {
        file.parent.name: json.loads(file.read_text(encoding="utf-8"))
        for file in Path(run_dir, "eval").glob("val-*/metrics.json")
    }
    if metrics:
        fs, root = open_folder(url)
        _make_parent(fs, f"{root}/{EVALUATIONS}")
        call(fs, "pipe_file", f"{root}/{EVALUATIONS}", json.dumps(metrics).encode(), cfg=cfg)


def download_evaluations(url: str, run_dir: str, cfg: DataSources = DEFAULT) -> None:
    """Write what run_dir lacks of URL/evaluations.json. Raises UserError if that is none, OSError if it cannot be had."""
    fs, root = open_folder(url)
    if not exists(fs, f"{root}/{EVALUATIONS}", cfg):
        return
    try:
        metrics = dict(parse_json(read_file(fs, f"{root}/{EVALUATIONS}", cfg)))
    except (ValueError, TypeError):
        raise UserError(f"{url}/{EVALUATIONS} is not readable; remove it") from None
    for name in filter(VALIDATION.fullmatch, metrics):
        file = Path(run_dir, "eval", name, "metrics.json")
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(metrics[name], indent=1))


def remove(url: str, cfg: DataSources = DEFAULT) -> None:
    """Remove an upload, whole or not: its manifest first. Raises OSError if that cannot be done."""
    fs, root = open_folder(url)
    fs.invalidate_cache()
    for method, path, words in (("rm_file", f"{root}/{MANIFEST}", {}), ("rm", root, {"recursive": True})):
        try:
            call(fs, method, path, cfg=cfg, **words)
        except FileNotFoundError:
            pass


class CheckpointUploader:
    """Copies the run's checkpoints to train.mirror, on rank 0, in a background thread, one at a time.

    A checkpoint that is no longer the newest when its turn comes is not copied. After each copy the mirror is pruned by the
    same rules as the run's folder, whatever an earlier job left there. A failure is a warning: the next copy makes up for it.
    """

    def __init__(self, cfg: RunConfig, prune: Callable[[], None]):
        self.cfg = cfg
        self.url = cfg.train.mirror.rstrip("/")  # "" without a mirror
        self.prune = prune  # removes expired checkpoints from the run's folder
        self.copied = ""  # name of the last checkpoint that was copied
        self.reading = ""  # name of the checkpoint that is being copied, which must not be removed
        self.thread = ThreadPoolExecutor(1)
        self.last_update: Future[None] = Future()  # the last one asked for
        self.last_update.set_result(None)

    def update(self) -> None:
        """Start to copy the newest checkpoint, and to remove the expired ones from the mirror; returns at once."""
        if self.url:
            self.last_update = self.thread.submit(self._update)

    def close(self, passed: Callable[[str], object]) -> None:
        """Copy the last evaluation too, and wait for all copies, each of which has a time-out of its own."""
        if self.cfg.eval.best_metric:
            self.update()
        while wait([self.last_update], 1).not_done:
            passed("the end: copies to train.mirror")
        self.thread.shutdown()

    def _update(self) -> None:
        newest = newest_checkpoint(self.cfg.run_dir)
        assert newest
        try:
            if newest.name != self.copied:
                self._copy(newest)
            if self.cfg.eval.best_metric:
                upload_evaluations(self.cfg.run_dir, self.url, self.cfg.data)
            self._remove_expired()
        except (OSError, ValueError) as error:
            late = "older ones are still" if self.copied == newest.name else f"{newest.name} is not yet"
            logging.warning(f"train.mirror={self.url}: {late} there ({one_line(error)})")
        self.reading = ""

    def _copy(self, checkpoint: Path) -> None:
        self.reading = checkpoint.name
        upload(checkpoint, self.url, self.cfg.data)
        self.copied, self.reading = checkpoint.name, ""
        self.prune()  # which left this one alone while it was read

    def _remove_expired(self) -> None:
        """Remove expired uploads, never one newer than the last copy: it may be another job's."""
        known = [name for name in uploads(self.url, self.cfg.data) if name <= self.copied]
        for name in expired(known, self.cfg):
            remove(f"{self.url}/{name}", self.cfg.data)


def _make_parent(fs: fsspec.AbstractFileSystem, path: str) -> None:
    """Make a file's folder where folders are real. Object stores (all async) have none, and s3fs would make a bucket."""
    if not fs.async_impl:
        fs.makedirs(posixpath.dirname(path), exist_ok=True)


def _manifest(text: bytes, url: str) -> dict[str, tuple[int, str]]:
    """Read {name: (size, sha256)} from a manifest's text; UserError if it cannot be trusted."""
    try:
        manifest = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in parse_json(text).items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise UserError(f"{url}/{MANIFEST} is not a readable manifest; remove that checkpoint") from None
    for name in manifest:
        if "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise UserError(f"{url}/{MANIFEST}: name {name!r} leaves the folder; remove that checkpoint")
    return manifest


def _fetch_file(fs: Any, path: str, file: Path, size: int, cfg: DataSources, passed: Callable[[str], object]) -> None:
    """Fetch a remote file of known size to the disk, a few pieces at a time, and sync it."""
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
