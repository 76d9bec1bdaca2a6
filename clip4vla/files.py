"""Files that are complete or absent, and that one process writes at a time."""

import contextlib
import fcntl
import functools
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from clip4vla.config import UserError


def lock(stream: IO, shared: bool = False, wait: bool = False) -> bool:
    """Whether the file is this process's now, alone unless shared, until it is closed or the process is gone.

    On file systems that have no locks (Lustre without flock, NFS without lockd) it is, with a warning.
    """
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        _no_locks(error.strerror)
    return True


@functools.cache
def _no_locks(reason: str) -> None:
    """Once."""
    logging.warning(f"no files can be locked there ({reason}): let no two commands write into one folder")


def own(path: str) -> BinaryIO:
    """The file, emptied, locked until it is closed; UserError if another process has it."""
    stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
    try:
        free = lock(stream) and os.stat(path).st_ino == os.fstat(stream.fileno()).st_ino
    except FileNotFoundError:
        free = False
    if not free:  # or another process has just finished it
        stream.close()
        raise UserError(f"{path}: another run is writing it; wait for it, or choose another folder")
    stream.truncate()
    return stream


def line(tree: Any) -> str:
    """JSON as the files of a shard folder have it."""
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":")) + "\n"


def write_json(path: str | Path, tree: Any) -> None:
    """JSON that is complete or absent: written aside, synced, renamed."""
    write_text(path, line(tree))


def write_text(path: str | Path, text: str) -> None:
    """A text file that is complete or absent: written aside, synced, renamed."""
    write_bytes(path, text.encode())


def write_bytes(path: str | Path, data: bytes) -> None:
    """The same of any file."""
    with complete(path) as stream:
        stream.write(data)


@contextlib.contextmanager
def complete(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name when all of it is on the disk."""
    try:
        with own(f"{path}.partial") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            os.replace(f"{path}.partial", path)  # while the lock holds
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk does not say which file
        raise
