"""Write a folder at any fsspec URL as if it were local: in its place a local one, whose finished files are uploaded whole.

What is at the URL is all that counts. In the local folder every file of the URL has a stand-in, a hole of its size, until
pull() brings its bytes; so a program looks there for what is finished, and needs no second way for URLs.
"""

import contextlib
import functools
import os
import posixpath
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clip4vla.config import DataSources
from clip4vla.errors import UserError, one_line
from clip4vla.io import remote

SLOWEST = 1e6  # bytes/s that an upload must reach not to be called hung
PIECE = 2 << 20  # bytes of a request; remote.CONCURRENT of them are in memory at once
AGAIN = "what is finished stays: start again when it answers"


@dataclass(frozen=True)
class OutFolder:
    """Name a folder that is written, and the local one in its place; where `url` is a local path they are the same."""

    url: str
    local: Path
    depth: int = 0  # folders between it and its files, or their .parts/
    cfg: DataSources = field(default_factory=DataSources)  # time-out and retries

    @property
    def is_remote(self) -> bool:
        """Tell whether files are uploaded."""
        return "://" in self.url

    def shown(self, path: Path) -> str:
        """Return the path or URL that a local path stands for."""
        return f"{self.url}/{path.relative_to(self.local).as_posix()}" if self.is_remote else str(path)

    def refresh(self) -> None:
        """Make a hole for each .tar, .json and .jsonl that is at the URL now, unless a local file has its size.

        Raises UserError if the URL cannot be listed.
        """
        if not self.is_remote:
            return
        ours = re.compile(rf"([^/]+/){{{self.depth}}}(\.parts/)?[^/]+\.(tar|jsonl?)(\.partial)?|[^/]+\.jsonl?")
        for name, size in list_files(self.url, self.cfg).items():
            file = self.local / name
            if ours.fullmatch(name) and not (file.exists() and file.stat().st_size == size):
                _make_hole(file, size)

    def pull(self, paths: Iterable[Path]) -> None:
        """Give those of these local files that are there the bytes that the URL has; UserError if they cannot be had."""
        if not self.is_remote:
            return
        fs, root = self._opened()
        sizes = {path: path.stat().st_size for path in paths if path.exists()}
        pieces = [(path, at, min(size, at + PIECE)) for path, size in sizes.items() for at in range(0, size, PIECE)]
        for first in range(0, len(pieces), remote.CONCURRENT):
            some = pieces[first : first + remote.CONCURRENT]
            names = [f"{root}/{self._name(path)}" for path, _, _ in some]
            blobs = remote.read_ranges(fs, names, [start for _, start, _ in some], [end for *_, end in some], self.cfg)
            for (path, start, _), blob in zip(some, blobs, strict=True):
                if isinstance(blob, BaseException):
                    raise self._failed("read", path, blob)
                with path.open("r+b") as file:
                    file.seek(start)
                    file.write(blob)

    def publish(self, path: Path, keep: bool = True) -> None:
        """Upload a finished local file, which appears whole or not at all; without `keep` a hole of its size stays here.

        Raises UserError if that cannot be done.
        """
        if not self.is_remote:
            return
        size = path.stat().st_size
        with self._failing("written", path) as (fs, target):
            aside = target if fs.async_impl else f"{target}.partial"  # object stores (all async) show whole files alone
            if not fs.async_impl:
                fs.makedirs(posixpath.dirname(target), exist_ok=True)
            seconds = self.cfg.request_timeout + size / SLOWEST
            remote.call(fs, "put_file", str(path), aside, cfg=self.cfg, seconds=seconds)
            if aside != target:
                _move(fs, aside, target, self.cfg)
        if not keep:
            _make_hole(path, size)

    def remove(self, path: Path) -> None:
        """Remove a file, here and at the URL, if it is here; UserError if that cannot be done."""
        if self.is_remote and path.exists():
            with self._failing("removed", path) as (fs, target), contextlib.suppress(FileNotFoundError):
                remote.call(fs, "rm_file", target, cfg=self.cfg)
        path.unlink(missing_ok=True)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.local).as_posix()

    def _opened(self) -> tuple[Any, str]:
        return open_url(self.url, os.getpid())

    @contextlib.contextmanager
    def _failing(self, how: str, path: Path) -> Iterator[tuple[Any, str]]:
        """Yield (file system, path in it) of a local path; what the block raises becomes one line on it."""
        fs, root = self._opened()
        try:
            yield fs, f"{root}/{self._name(path)}"
        except OSError as error:
            raise self._failed(how, path, error) from None

    def _failed(self, how: str, path: Path, error: BaseException) -> UserError:
        return UserError(f"{self.shown(path)}: cannot be {how}: {one_line(error, 300)}; {AGAIN}")


@contextlib.contextmanager
def open_out(url: str, depth: int = 0, cfg: DataSources = remote.DEFAULT) -> Iterator[OutFolder]:
    """Yield a folder to write; for a URL with a temporary folder in its place, whose name no error of the block shows."""
    if "://" not in url:
        yield OutFolder(url, Path(url), depth, cfg)
        return
    with tempfile.TemporaryDirectory(prefix="clip4vla-out-") as folder:
        out = OutFolder(url.rstrip("/"), Path(folder), depth, cfg)
        out.refresh()
        try:
            yield out
        except UserError as error:
            raise UserError(str(error).replace(folder, out.url)) from None


def list_files(url: str, cfg: DataSources) -> dict[str, int]:
    """List the sizes of the files below a URL by their names, which are relative to it; UserError if that cannot be done."""
    fs, root = open_url(url, os.getpid())
    fs.invalidate_cache()  # others write there
    try:
        files = remote.call(fs, "find", root, detail=True, cfg=cfg)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"{url}: cannot be listed: {error}; check the URL and the credentials") from None
    sizes = {path.removeprefix(f"{root}/"): info["size"] for path, info in files.items()}
    return {name: size for name, size in sizes.items() if not {"", ".", ".."} & {*name.split("/")}}  # of object stores


@functools.cache
def open_url(url: str, process: int) -> tuple[Any, str]:
    """Open a URL for a process: a fork may not use its parent's event loop."""
    try:
        fs, root = remote.open_folder(url)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: cannot be opened: {one_line(error)}; name a URL that fsspec knows") from None
    return fs, root.rstrip("/")


def _move(fs: Any, aside: str, target: str, cfg: DataSources) -> None:
    """Give a whole file its name, which many file systems refuse where another has it."""
    if remote.call(fs, "exists", target, cfg=cfg):
        remote.call(fs, "rm_file", target, cfg=cfg)
    remote.call(fs, "mv", aside, target, cfg=cfg)


def _make_hole(path: Path, size: int) -> None:
    """Make a file of `size` zeros that takes no room on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
