"""Read byte ranges of files that the kernel reads, on a local disk or a network's file system, kept open between calls.

The kernel is asked for all ranges before the first one is waited for (WILLNEED), so that on NFS their answers are under way
together, without threads. What is in the page cache costs no more for it.
"""

import collections
import contextlib
import os
import threading
from collections.abc import Iterator, Sequence

KEPT = 128  # files kept open, and ranges under way at once; a process may have 1024 files by default


class LocalFiles:
    """Reads ranges of files, and keeps open those that were read last."""

    def __init__(self) -> None:
        self.files: collections.OrderedDict[str, _OpenFile] = collections.OrderedDict()  # the last one read last
        self.lock = threading.Lock()

    def read(self, paths: Sequence[str], starts: Sequence[int], ends: Sequence[int]) -> Iterator[bytes | BaseException]:
        """Yield bytes starts[i]..ends[i] of each paths[i], fewer at the end of a file, or an exception in their place.

        The bytes are of the file that has the name now, though another one may have had it when it was opened. Each range is
        copied when it is taken, so that its checks find it in the processor's cache.
        """
        for first in range(0, len(paths), KEPT):
            part = slice(first, first + KEPT)
            ranges = list(zip(paths[part], starts[part], ends[part], strict=True))
            files = self._asked(ranges)
            yield from (self._bytes(files, *wanted) for wanted in ranges)

    def _asked(self, ranges: Sequence[tuple[str, int, int]]) -> "dict[str, _OpenFile]":
        """Ask the kernel for all ranges, and return their files without those that cannot be opened."""
        files: dict[str, _OpenFile] = {}
        for path in {path for path, _, _ in ranges}:
            with contextlib.suppress(OSError, ValueError):
                files[path] = self._opened(path)
        for path, start, end in ranges:
            if path in files:
                files[path].ask(start, end)
        return files

    def _bytes(self, files: "dict[str, _OpenFile]", path: str, start: int, end: int) -> bytes | BaseException:
        """Read one range. If that fails the file is opened once more, as what NFS has opened may become stale."""
        try:
            return files[path].read(start, end)
        except Exception:  # hostile numbers raise others than OSError
            with self.lock:
                self.files.pop(path, None)
        try:
            return self._opened(path).read(start, end)
        except Exception as error:
            return error.with_traceback(None)  # which would keep the file open

    def _opened(self, path: str) -> "_OpenFile":
        """Open a file, unless it is open and still the one of this name; raises OSError or ValueError."""
        now = os.stat(path)
        with self.lock:
            file = self.files.get(path)
            if file is None or file.identity != (now.st_dev, now.st_ino):
                file = self.files[path] = _OpenFile(os.open(path, os.O_RDONLY))
            self.files.move_to_end(path)
            while len(self.files) > KEPT:
                self.files.popitem(last=False)
        return file


class _OpenFile:
    """Holds a descriptor, closed with the last reference: that of LocalFiles, or of a call that is still reading from it."""

    def __init__(self, fd: int) -> None:
        stat = os.fstat(fd)
        self.fd, self.identity = fd, (stat.st_dev, stat.st_ino)

    def __del__(self, close=os.close) -> None:  # at the end of the process the module is gone
        close(self.fd)

    def ask(self, start: int, end: int) -> None:
        """Ask the kernel to read bytes start..end, and do not wait."""
        try:
            os.posix_fadvise(self.fd, start, end - start, os.POSIX_FADV_WILLNEED)
        except (OSError, OverflowError):  # it need not: reading says what is wrong
            pass

    def read(self, start: int, end: int) -> bytes:
        """Read bytes start..end, fewer at the end of the file."""
        blob = os.pread(self.fd, end - start, start)
        while len(blob) < end - start and (more := os.pread(self.fd, end - start - len(blob), start + len(blob))):
            blob += more
        return blob


local_files = LocalFiles()  # one of a process, as its limit of open files is
