"""Find what no header says of a file: whether it is several that were joined, where its media end, how long they are.

Ogg files may be chained. MP3 files and transport streams are joined end to end, and anything may follow the last frame: tags,
zeros, a page of HTML. What follows is left out; what breaks off or is broken inside stays an error of the readers.
"""

import mmap
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

from clip4vla.media.containers import SLACK, AdtsClock, JoinedClock, Layout, Medium, opened
from clip4vla.media.source import Source, source_of

# of the first three bytes of a frame, those bits that are the same in the frame before
FRAME = {"mp3": 0xFFFE0C, "aac": 0xFFFFFC}
SYNC = 0xFFE000  # in these bits
TAG = re.compile(rb"TAG|APETAGEX|LYRICSBEGIN")  # between MP3 files that were joined
ID3 = re.compile(rb"ID3[\2-\4]\0.(.{4})", re.DOTALL)  # and its size, 7 bits a byte
XING = re.compile(rb"(?:Xing|Info)\0\0\0[\1\3\5\7\x09\x0b\x0d\x0f](.{4})", re.DOTALL)  # and the number of frames
LARGEST_FRAME = 2881  # bytes, of MP3
MISSING = 20  # frames of MP3 that may be fewer than stated
PAGE, FIRST_PAGE, LAST = b"OggS\0", b"OggS\0\2", 4  # of an Ogg stream: first bytes of pages, a bit of the sixth byte
FLAC = b"fLaC\0\0\0\x22"  # first bytes of a FLAC file
RIFF = re.compile(rb"RIFF(.{4})WAVE", re.DOTALL)  # of a WAV file, and its size without the first 8 bytes
ASF = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")  # of a WMA or WMV file
ASF_SIZE = re.compile(re.escape(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")) + rb".{24}(.{8})", re.DOTALL)
HEAD = 1 << 16  # bytes in which an ASF file states its size
KEPT = 256  # files whose layout is remembered: clips of one file are read one after the other
_layouts: dict[tuple[Source, int, int], Layout] = {}


@contextmanager
def open_medium(path: Path | Source) -> Iterator[Medium]:
    """Open a file for the block, without what follows its media; what PyAV raises while it is read is a ValueError."""
    source = source_of(path)
    with opened(source) as file:
        medium = _with_layout(Medium(source, file))
        if len(medium.layout.parts) != 1:
            yield medium
            return
    (part,) = medium.layout.parts
    with opened(part) as file:
        yield _with_layout(Medium(part, file))


def _with_layout(medium: Medium) -> Medium:
    scan = SCANS.get(medium.file.format.name) if medium.video or medium.audio else None
    if scan and (not medium.source.is_joined or scan is _scan_frames):  # of a part, the length alone may be unknown
        stat = os.stat(medium.source.path)
        key = (medium.source, stat.st_mtime_ns, stat.st_size)
        if key not in _layouts:
            if len(_layouts) >= KEPT:
                _layouts.clear()
            _layouts[key] = scan(medium)
        medium.layout = _layouts[key]
    return medium


def _of_parts(medium: Medium, ranges: list[tuple[int, int]]) -> Layout:
    """Lay out a file whose bytes in these ranges are files of sound."""
    parts = tuple(medium.source.part(*bounds) for bounds in ranges)
    if len(parts) == 1:
        return Layout(parts=parts)
    seconds = tuple(_seconds(part) for part in parts)
    return Layout({"audio": sum(seconds)}, parts, seconds)


def _seconds(part: Source) -> float:
    with opened(part) as file:
        medium = _with_layout(Medium(part, file))
        if medium.video:
            raise ValueError("several files with pictures, joined to one")
        return medium.seconds()


def _scan_ogg(medium: Medium) -> Layout:
    """Look for pages that begin streams after others, and for what follows the last page."""
    with _mapped(medium.source) as (data, first, size):
        begins, page, after = [], data.find(FIRST_PAGE, first, size), -1
        while page >= 0:
            if page != after:  # those of the streams of one file lie side by side
                begins.append(page - first)
            after = _page_end(data, page)
            page = data.find(FIRST_PAGE, page + 1, size)
        last = data.rfind(PAGE, first, size)
        end = min(size, _page_end(data, last)) - first if data[last + 5] & LAST else size - first
        size -= first
    ranges = list(zip([0, *begins[1:]], [*begins[1:], end], strict=True))
    return Layout() if ranges == [(0, size)] else _of_parts(medium, ranges)


@contextmanager
def _mapped(source: Source) -> Iterator[tuple[mmap.mmap, int, int]]:
    """Map the file of a source for the block, and return the first byte of the source in it and the one after its last."""
    with open(source.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data, source.begin, len(data) if source.end is None else min(len(data), source.end)


def _page_end(data: mmap.mmap, page: int) -> int:
    lengths = data[page + 27 : page + 27 + int.from_bytes(data[page + 26 : page + 27], "big")]
    return page + 27 + len(lengths) + sum(lengths)


def _scan_frames(medium: Medium) -> Layout:
    """Look for tags between the frames of MP3 and AAC, and for what follows the last one."""
    assert medium.audio
    frames, clock = _Frames(FRAME[medium.file.format.name]), AdtsClock()
    packets = (packet for packet in medium.file.demux(medium.audio) if packet.size)
    readable = True
    try:
        for packet in map(clock.go_on, packets) if medium.file.format.name == "aac" else packets:
            frames.take(packet)
    except av.error.InvalidDataError:
        readable = False
        if not _is_foreign(medium.source, frames.after):
            raise
    ranges = frames.ranges()
    if readable and ranges == [(0, frames.after)]:
        medium.rewind()
        return Layout({"audio": frames.seconds(medium)}, clock=AdtsClock if len(clock.rates) > 1 else None)
    stated = _stated_frames(medium.source, frames.first)
    if len(ranges) == 1 and frames.count + MISSING < stated:  # not the end of the sound: a download that broke off
        end, wanted = frames.seconds(medium), frames.seconds(medium) * stated / frames.count
        raise ValueError(f"truncated: {medium.audio.type} ends at {end:.2f} s, {wanted:.2f} s is wanted")
    return _of_parts(medium, ranges)


class _Frames:
    """Follows the frames of a stream of MP3 or AAC: the last is one whose header is like that of the frame before."""

    def __init__(self, kept: int) -> None:
        self.kept = kept  # bits of a header that are compared
        self.before: list[tuple[int, int]] = []  # bytes of the files before the last tag
        self.begin = self.end = self.after = 0  # bytes: of the file that it is in, its last frame, the last packet
        self.first = self.count = self.ticks = 0  # byte of the first frame, frames, end of the last in units of time
        self.header = -1

    def take(self, packet: av.Packet) -> None:
        """Take the next packet with data in it."""
        assert packet.pos is not None
        self.after = packet.pos + packet.size
        if packet.pos < self.begin:
            return  # in a tag
        header = int.from_bytes(memoryview(packet)[:3], "big") & self.kept
        if header & SYNC != SYNC:
            self._end_at_tag(packet)
        elif header == self.header or not self.count:
            self.first = self.first if self.count else packet.pos
            self.end, self.count = self.after, self.count + 1
            self.ticks = max(self.ticks, (packet.pts or 0) + (packet.duration or 0))
        self.header = header

    def _end_at_tag(self, packet: av.Packet) -> None:
        data = bytes(packet)
        tag = ID3.search(data)
        if not tag and not TAG.match(data):
            return
        self.before.append((self.begin, self.end))
        self.begin = self.after
        if tag:
            size = sum((byte & 127) << shift for byte, shift in zip(tag[1], (21, 14, 7, 0), strict=True))
            self.begin = self.after - len(data) + tag.end() + size

    def ranges(self) -> list[tuple[int, int]]:
        """List the bytes of the files that were joined."""
        return [(begin, end) for begin, end in [*self.before, (self.begin, self.end)] if begin < end]

    def seconds(self, medium: Medium) -> float:
        """Return the seconds at which the last frame ends."""
        assert medium.audio
        return float(self.ticks * medium.audio.time_base) - medium.origin


def _is_foreign(source: Source, at: int) -> bool:
    """Tell whether no frame begins at this byte, not even one that is cut off."""
    with source.open() as file:
        file.seek(at)
        return file.read(1) != b"\xff"


def _stated_frames(source: Source, first: int) -> int:
    """Return the number of frames that an MP3 states before its first one; 0 if it states none."""
    with source.open() as file:
        file.seek(max(0, first - LARGEST_FRAME))
        stated = XING.search(file.read(min(first, LARGEST_FRAME)))
    return int.from_bytes(stated[1], "big") if stated else 0


def _scan_clocks(medium: Medium) -> Layout:
    """Follow the timestamps of a transport or program stream, which begin again where another was joined."""
    clock, ends = JoinedClock(), {stream.type: 0.0 for stream in (medium.video, medium.audio) if stream}
    with opened(medium.source) as file:
        scanned = Medium(medium.source, file)
        streams = [stream for stream in (scanned.video, scanned.audio) if stream]
        try:
            for packet in map(clock.go_on, file.demux(streams)):
                unit, kind = float(packet.time_base), packet.stream.type
                begin = ends[kind] if packet.pts is None else packet.pts * unit - medium.origin
                ends[kind] = max(ends[kind], begin + (packet.duration or 0) * unit)
        except av.error.BlockingIOError:  # what follows is no stream
            return Layout()
        longer = any(ends[stream.type] > scanned.stated_end(stream) + SLACK for stream in streams)
    if len(clock.shifts) > 1:
        return Layout(ends, clock=JoinedClock)
    return Layout(ends) if longer else Layout()


def _scan_flac(medium: Medium) -> Layout:
    """Look for a FLAC file after another."""
    with _mapped(medium.source) as (data, first, end):
        begins, at = [0], data.find(FLAC, first + 1, end)
        while at >= 0:
            begins.append(at - first)
            at = data.find(FLAC, at + 1, end)
    ranges = list(zip(begins, [*begins[1:], end - first], strict=True))
    return _of_parts(medium, ranges) if len(ranges) > 1 else Layout()


def _scan_sizes(medium: Medium) -> Layout:
    """Look for a WAV or WMA file where one ends by its own header; libavformat would count what follows a WMA as sound."""
    ranges, end = [], 0
    with medium.source.open() as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        while stated := _stated_size(file.read(HEAD)):
            ranges.append((end, min(end + stated, size)))
            end += stated
            file.seek(end)
    is_followed = medium.file.format.name == "asf" and 0 < end < size
    return _of_parts(medium, ranges) if is_followed or len(ranges) > 1 else Layout()


def _stated_size(head: bytes) -> int:
    """Return the bytes that a file's header states for all of it; 0 if it is no WAV and no ASF file, or states none."""
    if riff := RIFF.match(head):
        return 8 + int.from_bytes(riff[1], "little")
    size = ASF_SIZE.search(head) if head.startswith(ASF) else None
    return int.from_bytes(size[1], "little") if size else 0


SCANS = {
    "ogg": _scan_ogg, "mp3": _scan_frames, "aac": _scan_frames, "flac": _scan_flac, "wav": _scan_sizes, "asf": _scan_sizes,
    "mpegts": _scan_clocks, "mpeg": _scan_clocks,
}  # fmt: skip
