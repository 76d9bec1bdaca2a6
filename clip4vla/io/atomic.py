"""Write files that are complete or absent, one process at a time."""

import contextlib
import fcntl
import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from clip4vla.errors import UserError


def lock(stream: IO, shared: bool = False, wait: bool = False) -> bool:
    """Lock a file until it is closed or the process is gone; returns False if another process has locked it, or has removed it.

    File systems without locks (Lustre without flock, NFS without lockd) give True, with a warning.
    """
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        _no_locks(error.strerror)
    try:
        return os.stat(stream.name).st_ino == os.fstat(stream.fileno()).st_ino
    except FileNotFoundError:
        return False


@functools.cache
def _no_locks(reason: str) -> None:
    """Warn that files cannot be locked, once for each reason."""
    logging.warning(f"no files can be locked there ({reason}): let no two commands write into one folder")


def open_exclusive(path: str) -> BinaryIO:
    """Open a file, emptied, and lock it until it is closed; UserError if another process has it."""
    stream = open(path, "r+b", opener=lambda name, flags: os.open(name, flags | os.O_CREAT, 0o644))
    if not lock(stream):  # or another process has just finished it
        stream.close()
        raise UserError(f"{path}: another run is writing it; wait for it, or choose another folder")
    stream.truncate()
    return stream


@contextlib.contextmanager
def removed_if_empty(folder: Path, *locks: str) -> Iterator[None]:
    """Where the block fails, remove a folder that it made and left nothing in but `locks`, with the parents that it made."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            _remove_empty(missing, [folder / name for name in locks])
        raise


def _remove_empty(folders: list[Path], locks: list[Path]) -> None:
    """Remove folders, the innermost first, unless that holds more than these files or another process has locked one."""
    if not folders or not set(folders[0].iterdir()) <= {*locks}:
        return
    with contextlib.ExitStack() as held:
        there = [path for path in locks if path.exists()]
        if all(lock(held.enter_context(path.open("a", encoding="utf-8"))) for path in there):
            for path in there:
                path.unlink()
            for path in folders:
                path.rmdir()


def line(tree: Any) -> str:
    """Encode a tree as the one line of JSON that the files of a shard folder hold."""
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":")) + "\n"


def write_json(path: str | Path, tree: Any) -> None:
    """Write a tree as JSON, complete or not at all."""
    write_text(path, line(tree))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, complete or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file, complete or not at all."""
    with atomic_write(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Yield a stream to write PATH: PATH.partial, locked, which is synced and renamed when the block ends without error."""
    try:
        with open_exclusive(f"{path}.partial") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(f"{path}.partial", path)  # while the lock holds
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file
        raise


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield PATH.partial, for a library that writes by name; synced and renamed when the block ends without error."""
    partial = Path(f"{path}.partial")
    yield partial
    fsync(partial)
    os.replace(partial, path)


def fsync(path: Path) -> None:
    """Sync a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_folder(place: Path, fill: Callable[[Path], object]) -> None:
    """Make a file or folder that is complete or absent: fill(aside), sync, rename; into a filled folder, file by file."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(removed_if_empty(place.parent))
        place.parent.mkdir(parents=True, exist_ok=True)
        prefix = f"{place.name}.partial-"
        temporary = stack.enter_context(tempfile.TemporaryDirectory(dir=place.parent, prefix=prefix))
        aside = Path(temporary, place.name)
        fill(aside)
        for file in (*aside.glob("*"), aside):
            fsync(file)
        if place.is_dir() and any(place.iterdir()):
            for file in aside.iterdir():
                file.replace(place / file.name)
        else:
            aside.rename(place)
    fsync(place.parent)
