"""Name the bytes of a medium: a file, or a part of one, such as a member of a tar; open them as a file of their own.

The suffixes of media are in the order of preference. Imports nothing large.
"""

import io
import os
from pathlib import Path
from typing import BinaryIO, NamedTuple

VIDEOS = (
    *(".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".3gp", ".ts", ".wmv", ".ogv"),
    *(".mts", ".m2ts", ".m2t", ".3g2", ".vob", ".asf", ".f4v", ".mxf", ".qt", ".mpe", ".divx", ".ogm"),
    ".",  # names that end in a dot, as a downloader writes that does not know the suffix
)
SOUNDS = (
    *(".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".wma"),
    *(".mka", ".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".mp2", ".m4b", ".oga", ".weba", ".ac3", ".amr"),
    *(".w64", ".wv", ".ape", ".tta", ".spx"),
)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".svg")


class Source(NamedTuple):
    """Names a file, or the bytes [begin, end) of one."""

    path: str
    begin: int = 0
    end: int | None = None
    name: str = ""  # of what lies there, with its suffix; empty: the path
    is_joined: bool = False  # one of several files that were joined end to end

    def part(self, begin: int, end: int) -> "Source":
        """Name the bytes [begin, end) of this source, which is several files joined."""
        return self._replace(begin=self.begin + begin, end=self.begin + end, is_joined=True)

    def open(self) -> BinaryIO:
        """Open it to be read; raises OSError. The file's `name` has the suffix that libavformat may need to know a format."""
        if self.end is None:
            return open(self.path, "rb")
        return io.BufferedReader(_Bytes(self))

    @property
    def suffix(self) -> str:
        """Return the suffix of its name in lower case, as .mp4."""
        return suffix_of(self.name or self.path)


def source_of(path: Path | Source) -> Source:
    """Return the source that is a whole file, or the source itself."""
    return path if isinstance(path, Source) else Source(str(path))


def suffix_of(path: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot; of a name that ends in a dot, the dot."""
    stem, dot, suffix = path.rpartition("/")[2].rpartition(".")
    return (dot + suffix).lower() if stem else ""


def stem_of(path: str) -> str:
    """Return a file's name without its suffix."""
    name = path.rpartition("/")[2]
    return name.rpartition(".")[0] or name


class RangeReader(io.RawIOBase):
    """Reads `size` bytes of something by ranges, which a subclass fetches, as a file that can be sought in."""

    size: int
    at = 0  # where the next read begins

    def fill(self, buffer: memoryview, at: int) -> int:
        """Read the bytes from `at` on into the buffer, all of which are there, and return how many were read."""
        raise NotImplementedError

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # of any writable buffer, says typeshed
        """Read the next bytes into the buffer, and return how many."""
        wanted = max(0, min(len(buffer), self.size - self.at))
        count = self.fill(memoryview(buffer)[:wanted], self.at) if wanted else 0
        self.at += count
        return count

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to an offset from the start, from here or from the end, and return it from the start."""
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}[whence]
        return self.at


class _Bytes(RangeReader):
    """Reads the bytes [begin, end) of a file as if they were all of it."""

    def __init__(self, source: Source) -> None:
        assert source.end is not None
        self.name = source.name or source.path
        self.begin, self.size = source.begin, source.end - source.begin
        self.file = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)

    def fill(self, buffer: memoryview, at: int) -> int:
        """Read from the file, without moving its own offset."""
        return os.preadv(self.file, [buffer], self.begin + at)

    def close(self) -> None:
        """Close the file."""
        if not self.closed:
            os.close(self.file)
        super().close()
