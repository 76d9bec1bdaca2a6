"""Open media files: their streams, how long they are, and their packets in order, also of files joined end to end.

Timestamps are corrected where a file was joined to another, or changes its sampling rate.

Times are seconds from the file's own start. Whatever is wrong with a file is a ValueError that says what.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import av
from av.stream import Disposition

from clip4vla.media.av_streams import Skipped, check_sampling_rate
from clip4vla.media.source import Source

PREROLL = 0.5  # s read before the interval: decoders of sound need some packets to settle
SLACK = 0.5  # s that streams may end before the length that the header states, or after it
STILL = 1.0  # s; pictures that end before, while sound goes on, are a still that stays on show
LONGEST = 14 * 86400  # s of a medium; what claims more would be cut into windows for years
GUESSED = ("mp3", "aac")  # their headers state no length: libavformat divides the file's size by a bit rate
LATE_IN_OGG = ("flac", "speex")  # after a seek, libavformat gives their first page the time of its end
RESTART = 0.5  # s that timestamps go back where another file was joined
# Hz, by their number in an ADTS header
ADTS_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)
ADTS_BLOCK = 1024  # samples


class JoinedClock:
    """Lets timestamps that begin again go on from the latest end before: those of all streams by the same time."""

    def __init__(self) -> None:
        self.shifts = [0.0]  # s, of each file that was joined
        self.file: dict[int, int] = {}  # by stream: number of the file that it has come to
        self.last: dict[int, float] = {}  # by stream: s of its last packet, as that had it
        self.end = 0.0

    def go_on(self, packet: av.Packet) -> av.Packet:
        """Return the next packet, with its timestamps corrected."""
        if packet.dts is None:
            return packet
        stream, unit = packet.stream.index, float(packet.time_base)
        time, file = packet.dts * unit, self.file.get(stream, 0)
        if time < self.last.get(stream, -math.inf) - RESTART:
            file += 1
            if file == len(self.shifts):
                self.shifts.append(self.end - time)
        self.file[stream], self.last[stream] = file, time
        self.end = max(self.end, time + self.shifts[file] + (packet.duration or 0) * unit)
        return shifted(packet, round(self.shifts[file] / unit))


class AdtsClock:
    """Gives packets of raw AAC the times of their own sampling rates; libavformat takes the first one for all."""

    def __init__(self) -> None:
        self.rates: set[int] = set()  # Hz, of all packets
        self.next = 0  # units of time

    def go_on(self, packet: av.Packet) -> av.Packet:
        """Return the next packet, with its timestamps corrected."""
        header = bytes(memoryview(packet)[:7])
        number = header[2] >> 2 & 15 if len(header) == 7 else len(ADTS_RATES)
        if number < len(ADTS_RATES):
            self.rates.add(ADTS_RATES[number])
            packet.pts = packet.dts = self.next
            packet.duration = round(ADTS_BLOCK * (1 + (header[6] & 3)) / ADTS_RATES[number] / packet.time_base)
            self.next += packet.duration
        return packet


def shifted(packet: av.Packet, units: int) -> av.Packet:
    """Return the packet, later by `units` of its time base."""
    if units and packet.dts is not None:
        packet.dts += units
    if units and packet.pts is not None:
        packet.pts += units
    return packet


class Layout(NamedTuple):
    """Says what no header does of a file."""

    ends: dict[str, float] = {}  # s at which its "video" and its "audio" end, if its packets were counted
    parts: tuple[Source, ...] = ()  # the files that were joined in it; one if something else follows it
    seconds: tuple[float, ...] = ()  # of each part
    clock: type[JoinedClock] | type[AdtsClock] | None = None  # what corrects its timestamps, if they are wrong


class Medium:
    """Holds an open file with its first video stream, if any but a cover, and its first audio stream."""

    def __init__(self, source: Source, file: av.container.InputContainer) -> None:
        self.source, self.file = source, file
        self.video, self.audio = _video(file), _audio(file)
        self.origin = (file.start_time or 0) / av.time_base  # s at which its timestamps begin
        self.layout = Layout()

    def seconds(self) -> float:
        """Return the length: of the pictures, or of the sound where there are none or a still."""
        stream = self.video or self.audio
        if not stream:
            raise ValueError("neither pictures nor sound in it")
        length = self.end(stream)
        if self.video and self.audio and (self.video.frames == 1 or length < STILL):
            length = max(length, self.end(self.audio))
        if length > LONGEST:
            raise ValueError(f"a length of {length:.3g} s, more than {LONGEST} s")
        return length

    def end(self, stream: av.stream.Stream) -> float:
        """Return the seconds at which a stream ends, as the headers state; by its packets where they state nothing."""
        end = self.layout.ends.get(stream.type, self.stated_end(stream))
        if end == math.inf and self.file.duration and self.file.format.name not in GUESSED:
            end = self.file.duration / av.time_base
        elif end == math.inf:
            stamps = ((p.pts + (p.duration or 0)) * p.time_base for p in self.file.demux(stream) if p.pts is not None)
            end = float(max(stamps, default=0)) - self.origin
            self.rewind()
        return end

    def stated_end(self, stream: av.stream.Stream) -> float:
        """Return the seconds at which a stream ends by its own header; infinite if that says nothing."""
        if not stream.duration or self.file.format.name in GUESSED or self.layout.ends:
            return math.inf
        return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - self.origin

    def rewind(self) -> None:
        """Go back to the first packet."""
        self.file.seek(int(self.origin * av.time_base))

    def packets(self, streams: list[av.stream.Stream], begin: float, skip: bool) -> Iterator[av.Packet]:
        """Yield the packets of streams from the first one on, or if `skip` from one before `begin`; an empty one ends each.

        Where files were joined, timestamps go on. Raises Skipped if the file cannot be entered there.
        """
        if len(self.layout.parts) > 1:
            yield from self._packets_of_parts(begin)
        elif self.layout.clock:
            yield from map(self.layout.clock().go_on, self.file.demux(streams))
        else:
            if skip and begin > PREROLL and self._is_seekable():
                self._seek(begin - PREROLL)
            yield from self.file.demux(streams)

    def _is_seekable(self) -> bool:
        """Tell whether libavformat gives right times after a seek."""
        codec = self.audio.codec_context.name if self.audio else ""
        if self.file.format.name == "wav":  # it counts bytes, as if all were alike
            return codec.startswith("pcm_")
        return self.file.format.name != "ogg" or codec not in LATE_IN_OGG

    def _seek(self, time: float) -> None:
        try:
            self.file.seek(int((time + self.origin) * av.time_base))
        except av.FFmpegError:
            raise Skipped from None

    def _packets_of_parts(self, begin: float) -> Iterator[av.Packet]:
        start = 0.0
        for part, seconds in zip(self.layout.parts, self.layout.seconds, strict=True):
            if start + seconds > begin - PREROLL:
                with opened(part) as file:
                    medium = Medium(part, file)
                    assert medium.audio
                    shift = round((start + self.origin - medium.origin) / medium.audio.time_base)
                    for packet in file.demux(medium.audio):
                        yield shifted(packet, shift)
            start += seconds


@contextmanager
def opened(source: Source) -> Iterator[av.container.InputContainer]:
    """Open a file for the block; what PyAV raises while it is read is a ValueError."""
    try:
        # a name with a colon would be taken for a protocol; a part of a file is read through Python
        with nullcontext(os.path.abspath(source.path)) if source.end is None else source.open() as opening:
            # a playlist posing as a video opens nothing but files; some AVIs have no timestamps of their own
            with av.open(opening, container_options={"protocol_whitelist": "file", "fflags": "+genpts"}) as file:
                yield file
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"unreadable media: {getattr(error, 'strerror', None) or error}") from None
    except (AttributeError, IndexError, TypeError) as error:  # what PyAV makes of headers that contradict themselves
        raise ValueError(f"unreadable media: no codec or no timestamps where there must be some ({error})") from None


def _video(file: av.container.InputContainer) -> av.VideoStream | None:
    shown = (s for s in file.streams.video if s.codec_context and not s.disposition & Disposition.attached_pic)
    return next(shown, None)


def _audio(file: av.container.InputContainer) -> av.AudioStream | None:
    stream = next((s for s in file.streams.audio if s.codec_context), None)
    if stream:
        check_sampling_rate(stream.sample_rate)
        stream.codec_context.thread_count = 1  # shard.py has a process for each core
    return stream
