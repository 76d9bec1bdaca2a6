"""Read moving pictures and sound in one forward pass through a file, from just before the interval to its end.

Times are seconds from the file's own start. The length is that of the video stream, or of the container where the stream does
not say or there is none. Whatever is wrong with a file is a ValueError that says what.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition
from torch import Tensor

from clip4vla.config import FramesConfig
from clip4vla.media.av_streams import AudioReader, Skipped, VideoReader, check_sampling_rate

VIDEOS = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".3gp", ".ts", ".wmv", ".ogv")
SOUNDS = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".wma")
PREROLL = 0.5  # s read before the interval: decoders of sound need some packets to settle
SLACK = 0.5  # s that streams may end before the length that the header states
GUESSED = ("mp3", "aac")  # their headers state no length: libavformat divides the file's size by a bit rate
LONGEST = 14 * 86400  # s of a medium; what claims more would be cut into windows for years


@dataclass
class MediaClip:
    """Holds the frames and the waveform of an interval of a file."""

    seconds: float  # its length, no further than the file's end
    # (size, size, 3) uint8 RGB each; none without a video stream
    frames: list[np.ndarray] = field(default_factory=list)
    wave: Tensor | None = None  # (channels, T) float32 in [-1, 1]; one or two channels; None without an audio stream
    rate: int = 0  # Hz, 0 where there is no sound


def read_clip(
    path: Path, start: float | None, end: float | None, frames: FramesConfig | None, longest: float = math.inf
) -> MediaClip:
    """Read frames (none if `frames` is None) and sound of [start, end) seconds; of sound, the central `longest` seconds.

    Raises ValueError for a file that is absent, corrupt or truncated, and for an interval that begins beyond its end.
    """
    try:
        return _read(path, start, end, frames, longest, skip=True)
    except Skipped:  # some files cannot be entered anywhere but at their start
        return _read(path, start, end, frames, longest, skip=False)


def _read(path, start, end, frames, longest, skip) -> MediaClip:
    with _opened(path) as file:
        return _interval(file, start or 0.0, end, frames, longest, skip)


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    """Open a file for the block; what PyAV raises while it is read is a ValueError."""
    try:
        # a playlist posing as a video opens nothing but files; some AVIs have no timestamps of their own; FFmpeg takes a name
        # before a colon for a protocol, but for absolute paths
        with av.open(
            str(path.absolute()), container_options={"protocol_whitelist": "file", "fflags": "+genpts"}
        ) as file:
            yield file
    except (av.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"unreadable media: {getattr(error, 'strerror', None) or error}") from None
    except (AttributeError, IndexError, TypeError) as error:  # what PyAV makes of headers that contradict themselves
        raise ValueError(f"unreadable media: no codec or no timestamps where there must be some ({error})") from None


def iter_audio_windows(
    path: Path, seconds: float, least: float, start: float | None = None, end: float | None = None
) -> Iterator[tuple[float, float, Tensor | None, int]]:
    """Yield (begin s, finish s, waveform (channels, T) or None, rate Hz) of windows of `seconds`, one after the other.

    One pass through the file, one window in memory; each is what read_clip gives of its interval. What is left after the
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
        for sound in _windows(file, stream, window_bounds(begin, finish, seconds, least)):
            yield sound.begin, sound.until, sound.wave(), sound.rate or stream.sample_rate


def window_bounds(begin: float, finish: float, seconds: float, least: float) -> Iterator[tuple[float, float]]:
    """Split an interval of seconds into the windows (begin, finish) that iter_audio_windows yields."""
    count = max(1, math.floor((finish - begin - least) / seconds) + 1)
    return ((begin + i * seconds, min(finish, begin + (i + 1) * seconds)) for i in range(count))


def _windows(
    file: av.container.InputContainer, stream: av.AudioStream, coming: Iterator[tuple[float, float]]
) -> Iterator["AudioReader"]:
    sound = AudioReader(stream, *next(coming), _origin(file))
    for packet in file.demux(stream):
        for frame in sound.decoded(packet):
            sound.add_frame(frame)
            while sound.done:
                yield sound
                following = next(coming, None)
                if not following:
                    return
                sound = AudioReader(stream, *following, _origin(file))
                sound.add_frame(frame)  # it may reach into this one
        if not packet.size:
            sound.close()
    _check_truncation(file, [sound])
    yield sound


def _interval(file, start, end, frames, longest, skip) -> MediaClip:
    video = _video_stream(file) if frames else None
    sound = _sound_stream(file)
    if not video and not sound:
        raise ValueError("neither pictures nor sound in it" if frames else "no sound in it")
    length = _length(file, _video_stream(file) or sound)  # also where the pictures are not wanted: it is the same clip
    finish = length if end is None else min(end, length)
    if start >= finish:
        raise ValueError(f"the interval begins at {start:g} s, the medium ends at {length:.2f} s")
    middle, half = (start + finish) / 2, min(finish - start, longest) / 2
    pictures = (
        VideoReader(video, frame_times(start, finish, frames), frames.size, _origin(file), skip) if video else None
    )
    audio = AudioReader(sound, middle - half, middle + half, _origin(file)) if sound else None
    begin = start if video else middle - half
    if skip and begin > PREROLL:
        file.seek(int((begin - PREROLL + _origin(file)) * av.time_base))
    readers = {reader.stream.index: reader for reader in (pictures, audio) if reader}
    for packet in file.demux([reader.stream for reader in readers.values()]):
        readers[packet.stream.index].take(packet)
        if all(reader.done for reader in readers.values()):
            break
    _check_truncation(file, list(readers.values()))
    clip = MediaClip(finish - start, pictures.frames if pictures else [])
    return replace(clip, wave=audio.wave(), rate=audio.rate or 0) if audio else clip


def _sound_stream(file: av.container.InputContainer) -> av.AudioStream | None:
    stream = next((s for s in file.streams.audio if s.codec_context), None)
    if stream:
        check_sampling_rate(stream.sample_rate)
        stream.codec_context.thread_count = 1  # shard.py has a process for each core
    return stream


def _check_truncation(file: av.container.InputContainer, readers: list) -> None:
    """Raise ValueError if a stream ended before its header says, or if all did in files whose streams state nothing."""
    stated = [_stated(file, reader.stream) for reader in readers]
    short = [r.end < min(r.until, s) - SLACK for r, s in zip(readers, stated, strict=True)]
    if all(short) or any(early and s < math.inf for early, s in zip(short, stated, strict=True)):
        reader = readers[short.index(True)]
        raise ValueError(f"truncated: {reader.stream.type} ends at {reader.end:.2f} s, {reader.until:.2f} s is wanted")


def _video_stream(file: av.container.InputContainer) -> av.VideoStream | None:
    """Find the first video stream that can be decoded; a cover is none."""
    shown = (s for s in file.streams.video if s.codec_context and not s.disposition & Disposition.attached_pic)
    return next(shown, None)


def duration(path: Path) -> float:
    """Return the seconds of a file's pictures, or of its sound if it has none; ValueError if unreadable or without both."""
    with _opened(path) as file:
        stream = _video_stream(file) or _sound_stream(file)
        if not stream:
            raise ValueError("neither pictures nor sound in it")
        return _length(file, stream)


def frame_times(begin: float, finish: float, cfg: FramesConfig) -> list[float]:
    """List the seconds at which frames are taken: middles of n equal parts, n = duration x fps, within 1..max_frames."""
    seconds = finish - begin
    n = min(cfg.max_frames, max(1, round(seconds * cfg.fps))) if cfg.fps else cfg.max_frames
    return [begin + (i + 0.5) * seconds / n for i in range(n)]


def _origin(file: av.container.InputContainer) -> float:
    """Return the seconds that timestamps start with: transport streams begin anywhere."""
    return (file.start_time or 0) / av.time_base


def _length(file: av.container.InputContainer, stream: av.stream.Stream) -> float:
    """Return the seconds from a file's start to its end, as the headers state; by its packets where they state nothing."""
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
    """Return the seconds at which a stream ends by its own header; infinite if that says nothing."""
    if not stream.duration or file.format.name in GUESSED:
        return math.inf
    return float(((stream.start_time or 0) + stream.duration) * stream.time_base) - _origin(file)
