"""Find shard folders and read their files, on local disks or at any fsspec URL, also in processes that were forked."""

import errno
import os
import posixpath
import stat
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from clip4vla.data.shards import INDEX, ShardFolder
from clip4vla.errors import UserError, one_line
from clip4vla.io import remote
from clip4vla.io.out_folder import list_files, open_url
from clip4vla.io.walk import is_hidden, walk


def where(folder: ShardFolder) -> str:
    """Return the path of a local folder, else its URL."""
    return folder.path if isinstance(folder.fs, LocalFileSystem) else folder.url


def shard_folders(place: str) -> list[str]:
    """List the folders of a tree that have an index, without hidden ones; UserError for a URL that cannot be listed."""
    if "://" not in place:
        return sorted(str(Path(folder)) for folder, _, names in walk(place) if INDEX in names)
    names = [name.split("/") for name in list_files(place.rstrip("/"), remote.DEFAULT)]
    folders = [folder for *folder, name in names if name == INDEX and not any(map(is_hidden, folder))]
    return sorted("/".join([place.rstrip("/"), *folder]) for folder in folders)


def read(folder: str, name: str, start: int, most: int) -> tuple[bytes, int]:
    """Read at most `most` bytes from `start` of a file in a folder, and its size.

    Raises OSError for what is not there, and UserError for a URL that does not answer: its clips are not corrupt.
    """
    if "://" not in folder:
        return _read_local(Path(folder, name), start, most)
    fs, root = open_url(folder, os.getpid())
    path = posixpath.join(root, name)
    try:
        size = remote.size(fs, path)
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None  # as a disk says it
    except OSError as error:
        raise _unanswered(folder, name, error) from None
    starts = range(start, min(start + most, size), remote.PIECE)
    ends = [min(at + remote.PIECE, start + most, size) for at in starts]
    blobs = []
    for blob in remote.read_ranges(fs, [path] * len(ends), [*starts], ends):
        if isinstance(blob, BaseException):
            raise _unanswered(folder, name, blob)
        blobs.append(blob)
    return b"".join(blobs), size


def _unanswered(folder: str, name: str, error: BaseException) -> UserError:
    return UserError(f"{folder}/{name}: cannot be checked: {one_line(error, 300)}; start again when it answers")


def _read_local(path: Path, start: int, most: int) -> tuple[bytes, int]:
    """Read from a local file; raises OSError for what may never end, such as a pipe."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "no regular file")
    with path.open("rb") as stream:
        stream.seek(start)
        return stream.read(min(most, status.st_size)), status.st_size
