"""Moving pictures and sound: one forward pass through a file, from just before the interval to its end.

Times are seconds from the file's own start. The length is that of the video stream, or of the container where the stream does
not say or there is none. Whatever is wrong with a file is a ValueError that says what.
"""

import bisect
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.stream import Disposition
from torch import Tensor

from clip4vla.config import FramesConfig

VIDEOS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".3gp", ".ts", ".wmv", ".ogv")
SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".wma")
PREROLL = 0.5  # s read before the interval: decoders of sound need some packets to settle
SLACK = 0.5  # s that streams may end before the length that the header states
GUESSED = ("mp3", "aac")  # their headers state no length: libavformat divides the file's size by a bit rate
GAP = 0.1  # s that timestamps of sound may wander before it counts as a gap
RATES = range(1000, 768001)  # Hz of sound; what claims others costs hours or gigabytes to resample
WAITING, PACKET = 1 << 26, 1 << 10  # bytes of packets that are held undecoded; of one, beside its data
LONGEST_SIDE = 200  # of a picture, in shortest sides: it is scaled whole before its centre is cut out
LONGEST = 14 * 86400  # s of a medium; what claims more would be cut into windows for years


@dataclass
class Clip:
    """What an interval of a file holds."""

    seconds: float  # its length, no further than the file's end
    frames: list[np.ndarray] = field(
        default_factory=list
    )  # (size, size, 3) uint8 RGB each; none without a video stream
    wave: Tensor | None = None  # (channels, T) float32 in [-1, 1]; one or two channels; None without an audio stream
    rate: int = 0  # Hz, 0 where there is no sound


def read_clip(
    path: Path, start: float | None, end: float | None, frames: FramesConfig | None, longest: float = math.inf
) -> Clip:
    """Frames (none if `frames` is None) and sound of [start, end) seconds; of sound, the central `longest` seconds.

    Raises ValueError for a file that is absent, corrupt or truncated, and for an interval that begins beyond its end.
    """
    try:
        return _read(path, start, end, frames, longest, skip=True)
    except _Skipped:  # some files cannot be entered anywhere but at their start
        return _read(path, start, end, frames, longest, skip=False)


class _Skipped(Exception):
    """After skipping to a keyframe the pictures begin too late or are damaged."""


def _read(path, start, end, frames, longest, skip) -> Clip:
    with _opened(path) as file:
        return _interval(file, start or 0.0, end, frames, longest, skip)


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    """The open file; what PyAV raises while it is read is a ValueError."""
    try:
        # a playlist posing as a video opens nothing but files; some AVIs have no timestamps of their own
        with av.open(str(path), container_options={"protocol_whitelist": "file", "fflags": "+genpts"}) as file:
            yield file
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"unreadable media: {getattr(error, 'strerror', None) or error}") from None
    except (AttributeError, IndexError, TypeError) as error:  # what PyAV makes of headers that contradict themselves
        raise ValueError(f"unreadable media: no codec or no timestamps where there must be some ({error})") from None


def listen(
    path: Path, seconds: float, least: float, start: float | None = None, end: float | None = None
) -> Iterator[tuple[float, float, Tensor | None, int]]:
    """(begin s, finish s, waveform (channels, T) or None, rate Hz) of windows of so many seconds, one behind the other.

    One pass through the file, one window in memory; each is what read_clip gives of its interval. What is left behind the
    last one is a window too if it has `least` seconds, or is all there is. Raises ValueError as read_clip does.
    """
    with _opened(path) as file:
        stream = _sound_stream(file)
        if not stream:
            raise ValueError("no sound in it")
        begin, length = start or 0.0, _length(file, _video_stream(file) or stream)
        finish = length if end is None else min(end, length)
        if begin >= finish:
            raise ValueError(f"the interval begins at {begin:g} s, the medium ends at {length:.2f} s")
        if begin > PREROLL:
            file.seek(int((begin - PREROLL + _origin(file)) * av.time_base))
        for sound in _windows(file, stream, edges(begin, finish, seconds, least)):
            yield sound.begin, sound.until, sound.wave(), sound.rate or stream.sample_rate


def edges(begin: float, finish: float, seconds: float, least: float) -> Iterator[tuple[float, float]]:
    """The windows that `listen` gives of an interval."""
    count = max(1, math.floor((finish - begin - least) / seconds) + 1)
    return ((begin + i * seconds, min(finish, begin + (i + 1) * seconds)) for i in range(count))


def _windows(
    file: av.container.InputContainer, stream: av.AudioStream, coming: Iterator[tuple[float, float]]
) -> Iterator["_Sound"]:
    sound = _Sound(stream, *next(coming), _origin(file))
    for packet in file.demux(stream):
        for frame in sound.decoded(packet):
            sound.hear(frame)
            while sound.done:
                yield sound
                following = next(coming, None)
                if not following:
                    return
                sound = _Sound(stream, *following, _origin(file))
                sound.hear(frame)  # it may reach into this one
        if not packet.size:
            sound.close()
    _must_be_whole(file, [sound])
    yield sound


def _interval(file, start, end, frames, longest, skip) -> Clip:
    video = _video_stream(file) if frames else None
    sound = _sound_stream(file)
    if not video and not sound:
        raise ValueError("neither pictures nor sound in it" if frames else "no sound in it")
    length = _length(file, _video_stream(file) or sound)  # also where the pictures are not wanted: it is the same clip
    finish = length if end is None else min(end, length)
    if start >= finish:
        raise ValueError(f"the interval begins at {start:g} s, the medium ends at {length:.2f} s")
    middle, half = (start + finish) / 2, min(finish - start, longest) / 2
    pictures = _Pictures(video, frame_times(start, finish, frames), frames.size, _origin(file), skip) if video else None
    heard = _Sound(sound, middle - half, middle + half, _origin(file)) if sound else None
    begin = start if video else middle - half
    if skip and begin > PREROLL:
        file.seek(int((begin - PREROLL + _origin(file)) * av.time_base))
    readers = {reader.stream.index: reader for reader in (pictures, heard) if reader}
    for packet in file.demux([reader.stream for reader in readers.values()]):
        readers[packet.stream.index].take(packet)
        if all(reader.done for reader in readers.values()):
            break
    _must_be_whole(file, list(readers.values()))
    clip = Clip(finish - start, pictures.frames if pictures else [])
    return replace(clip, wave=heard.wave(), rate=heard.rate or 0) if heard else clip


def _sound_stream(file: av.container.InputContainer) -> av.AudioStream | None:
    stream = next((s for s in file.streams.audio if s.codec_context), None)
    if stream:
        _must_be_heard(stream.sample_rate)
        stream.codec_context.thread_count = 1  # shard.py has a process for each core
    return stream


def _must_be_heard(rate: int) -> None:
    if rate not in RATES:
        raise ValueError(f"a sampling rate of {rate} Hz, not of {RATES[0]} to {RATES[-1]}")


def _must_be_whole(file: av.container.InputContainer, readers: list) -> None:
    """ValueError if a stream ended before its header says, or, in files whose streams state nothing, if all ended early."""
    stated = [_stated(file, reader.stream) for reader in readers]
    short = [r.end < min(r.until, s) - SLACK for r, s in zip(readers, stated, strict=True)]
    if all(short) or any(early and s < math.inf for early, s in zip(short, stated, strict=True)):
        reader = readers[short.index(True)]
        raise ValueError(f"truncated: {reader.stream.type} ends at {reader.end:.2f} s, {reader.until:.2f} s is wanted")


def _video_stream(file: av.container.InputContainer) -> av.VideoStream | None:
    """The first that can be decoded; a cover is none."""
    shown = (s for s in file.streams.video if s.codec_context and not s.disposition & Disposition.attached_pic)
    return next(shown, None)


def duration(path: Path) -> float:
    """Seconds of a file's pictures, or of its sound if it has none; ValueError if it cannot be read or has neither."""
    with _opened(path) as file:
        stream = _video_stream(file) or _sound_stream(file)
        if not stream:
            raise ValueError("neither pictures nor sound in it")
        return _length(file, stream)


def frame_times(begin: float, finish: float, cfg: FramesConfig) -> list[float]:
    """Seconds at which frames are taken: the middles of n equal parts, n = duration x fps, within 1..max_frames."""
    seconds = finish - begin
    n = min(cfg.max_frames, max(1, round(seconds * cfg.fps))) if cfg.fps else cfg.max_frames
    return [begin + (i + 0.5) * seconds / n for i in range(n)]


def _origin(file: av.container.InputContainer) -> float:
    """Seconds that timestamps start with: transport streams begin anywhere."""
    return (file.start_time or 0) / av.time_base


def _length(file: av.container.InputContainer, stream: av.stream.Stream) -> float:
    """Seconds from the start of the file to its end, as the headers state; by its packets where they state nothing."""
    length = _stated(file, stream)
    if length == math.inf and file.duration and file.format.name not in GUESSED:
        length = file.duration / av.time_base
    elif length == math.inf:
        ends = ((p.pts + (p.duration or 0)) * p.time_base for p in file.demux(stream) if p.pts is not None)
        length = float(max(ends, default=0)) - _origin(file)
        file.seek(int(_origin(file) * av.time_base))
    if length > LONGEST:
        raise ValueError(f"a length of {length:.3g} s, more than {LONGEST} s")
    return length


def _stated(file: av.container.InputContainer, stream: av.stream.Stream) -> float:
    """Seconds at which a stream ends by its own header; infinite if that says nothing."""
    if not stream.duration or file.format.name in GUESSED:
        return math.inf
    return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - _origin(file)


class _Pictures:
    """Takes the packets of a video stream and keeps the frames shown at the wanted times.

    Packets wait until one comes that is decoded later than the wanted time, or until they are too many. So what lies before
    the last keyframe is dropped undecoded, and frames that no other refers to are decoded only where they are wanted.
    """

    def __init__(self, stream: av.VideoStream, times: list[float], size: int, origin: float, skip: bool):
        self.stream, self.size, self.origin, self.skip = stream, size, origin, skip
        self.times = [(time + origin) / float(stream.time_base) for time in times]  # in the stream's units
        self.frames: list[np.ndarray] = []
        self.waiting: deque[av.Packet] = deque()
        self.held = 0  # bytes of those
        self.stamps: list[int] = []  # of all packets since the last keyframe that was jumped to, sorted
        self.last: av.VideoFrame | None = None
        self.until, self.end = times[-1], math.inf  # s that are wanted, and where the stream ended if that was earlier
        stream.codec_context.thread_count = 1  # shard.py has a process for each core

    @property
    def done(self) -> bool:
        """Whether every frame is there."""
        return len(self.frames) == len(self.times)

    def take(self, packet: av.Packet) -> None:
        """The next packet of the stream; an empty one ends it."""
        if self.done:
            return
        target, stamp = self.times[len(self.frames)], _stamp(packet)
        if packet.size:
            if self.skip and not self.stamps and stamp > target and self.last is None:
                raise _Skipped
            if self.skip and packet.is_keyframe and stamp <= target and self.waiting:
                self.waiting.clear()
                self.held = 0
                self.stamps.clear()
                self.stream.codec_context.flush_buffers()
            bisect.insort(self.stamps, stamp)
        self.waiting.append(packet)
        self.held += packet.size + PACKET
        # one keyframe may lie hours before the wanted time, and gigabytes
        if not packet.size or (packet.dts is not None and packet.dts > target) or self.held > WAITING:
            self._decode()
            self.held = 0

    def _decode(self) -> None:
        context = self.stream.codec_context
        while self.waiting and not self.done:
            packet = self.waiting.popleft()
            context.skip_frame = "DEFAULT" if self._wanted(packet) else "NONREF"
            try:
                for frame in context.decode(packet if packet.size else None):
                    self._show(frame)
            except av.error.InvalidDataError:
                raise ValueError(f"corrupt pictures at {self._seconds(_stamp(packet)):.2f} s") from None
            if not packet.size:
                self._end()

    def _wanted(self, packet: av.Packet) -> bool:
        """Whether the packet's frame may be on show at one of the times."""
        if not packet.size:
            return True
        after = bisect.bisect_right(self.stamps, _stamp(packet))
        until = self.stamps[after] if after < len(self.stamps) else math.inf
        return any(_stamp(packet) <= time < until for time in self.times)

    def _show(self, frame: av.VideoFrame) -> None:
        while not self.done and frame.pts > self.times[len(self.frames)]:
            self._keep(self.last or frame)
        self.last = frame

    def _end(self) -> None:
        """The stream is over: the last frame stays on show."""
        if self.last is None:
            raise ValueError("no picture can be decoded")
        self.end = self._seconds(self.last.pts + (self.last.duration or 0))
        while not self.done:
            self._keep(self.last)

    def _keep(self, frame: av.VideoFrame) -> None:
        if frame.is_corrupt:
            if self.skip:
                raise _Skipped
            raise ValueError(f"corrupt pictures at {self._seconds(frame.pts):.2f} s")
        self.frames.append(fit(frame, self.stream.sample_aspect_ratio, self.size))

    def _seconds(self, stamp: float) -> float:
        return stamp * float(self.stream.time_base) - self.origin


def _stamp(packet: av.Packet) -> Any:
    return packet.dts if packet.pts is None else packet.pts


def fit(frame: av.VideoFrame, aspect: Fraction | None, size: int) -> np.ndarray:
    """The centre (size, size, 3) of a frame whose shorter side is scaled to `size`, bicubic, upright: as CLIP does.

    aspect: width of a pixel by its height.
    """
    width, height = frame.width * float(aspect or 1), frame.height
    if max(width, height) > LONGEST_SIDE * min(width, height):
        raise ValueError(
            f"pictures of {width:.0f} x {height:.0f}: one side is more than {LONGEST_SIDE} times the other"
        )
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    picture = frame.reformat(width, height, "rgb24", interpolation="BICUBIC", threads=1).to_ndarray()
    picture = np.rot90(picture, round(frame.rotation / 90))
    top, left = (round((side - size) / 2) for side in picture.shape[:2])
    return np.ascontiguousarray(picture[top : top + size, left : left + size])


class _Sound:
    """Takes the packets of a sound stream and keeps the samples of an interval, in one or two channels."""

    def __init__(self, stream: av.AudioStream, begin: float, finish: float, origin: float):
        self.stream, self.begin, self.until, self.origin = stream, begin, finish, origin
        surround = stream.codec_context.layout.nb_channels > 2
        # mixing to integers keeps the sum within full scale, mixing to floats would not
        self.mix = av.AudioResampler("s32p", "stereo") if surround else av.AudioResampler("fltp")
        self.chunks: list[np.ndarray] = []
        self.rate: int | None = None
        self.first = self.next = 0  # samples from `begin` to the first one, and to the one that follows the last
        self.end = math.inf  # s where the stream ended, if it did within the interval

    @property
    def done(self) -> bool:
        """Whether nothing more is needed."""
        return self.rate is not None and self.next >= self.length

    @property
    def length(self) -> int:
        """Samples in the interval."""
        assert self.rate
        return round((self.until - self.begin) * self.rate)

    def take(self, packet: av.Packet) -> None:
        """The next packet of the stream; an empty one ends it."""
        if self.done:
            return
        for frame in self.decoded(packet):
            self.hear(frame)
        if not packet.size and not self.done:
            self.close()

    def decoded(self, packet: av.Packet) -> list[av.AudioFrame]:
        """The frames of a packet; ValueError if it is corrupt and lies in the interval."""
        try:
            return self.stream.codec_context.decode(packet if packet.size else None)
        except av.error.InvalidDataError:
            time = float((_stamp(packet) or 0) * self.stream.time_base) - self.origin
            if time >= self.begin:
                raise ValueError(f"corrupt sound at {time:.2f} s") from None
            return []

    def close(self) -> None:
        """The stream is over, and nothing more comes."""
        self.end = self.begin + self.next / self.rate if self.rate else 0.0

    def hear(self, frame: av.AudioFrame) -> None:
        """Keep what of a decoded frame lies in the interval."""
        if not self.rate:
            _must_be_heard(frame.sample_rate)
            self.rate = frame.sample_rate
        at = round((float(frame.pts * frame.time_base) - self.origin - self.begin) * self.rate)
        if at + frame.samples <= 0:
            return  # before the interval; decoders shift their first packets, so none of them sets the clock
        if not self.chunks:
            self.first = self.next = at
        elif at - self.next > GAP * self.rate:  # sound is missing; what follows stays in step with the pictures
            self._silence(min(at, self.length) - self.next)
        for part in self.mix.resample(frame):
            samples = part.to_ndarray()
            self.chunks.append(samples if samples.dtype == np.float32 else (samples / 2**31).astype(np.float32))
            self.next += part.samples

    def _silence(self, samples: int) -> None:
        self.chunks.append(np.zeros((len(self.chunks[0]), max(0, samples)), np.float32))
        self.next += self.chunks[-1].shape[1]

    def wave(self) -> Tensor | None:
        """(channels, T) from begin to finish, or to the end of the sound; None if there is none."""
        if not self.chunks:
            return None
        late = np.zeros((len(self.chunks[0]), min(self.length, max(0, self.first))), np.float32)
        wave = np.concatenate([late, *self.chunks], 1)[:, max(0, -self.first) :][:, : self.length]
        if not np.isfinite(wave).all():
            raise ValueError("the sound holds samples that are not finite")
        return torch.from_numpy(np.ascontiguousarray(wave)) if wave.shape[1] else None
