"""Read moving pictures and sound in one forward pass through a file, from just before the interval to its end.

Times are seconds from the file's own start. The length is that of the pictures, or of the sound where there are none or a
still. Whatever is wrong with a file is a ValueError that says what.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from clip4vla.config import FramesConfig
from clip4vla.media.av_streams import AudioReader, Skipped, VideoReader
from clip4vla.media.containers import SLACK, STILL, Medium
from clip4vla.media.images import Fit, stored
from clip4vla.media.layouts import open_medium
from clip4vla.media.source import Source


class PastEndError(ValueError):
    """Reports an interval that begins where the medium has ended."""


@dataclass
class MediaClip:
    """Holds the frames and the waveform of an interval of a file."""

    seconds: float  # its length, no further than the file's end
    # (H, W, 3) uint8 RGB each; none without a video stream
    frames: list[np.ndarray] = field(default_factory=list)
    wave: Tensor | None = None  # (channels, T) float32 in [-1, 1]; one or two channels; None without an audio stream
    rate: int = 0  # Hz, 0 where there is no sound


def read_clip(
    path: Path | Source, start: float | None, end: float | None, frames: FramesConfig | None, longest: float = math.inf,
    fit: Fit | None = None,
) -> MediaClip:  # fmt: skip
    """Read frames (none if `frames` is None) and sound of [start, end) seconds; of sound, the central `longest` seconds.

    fit: of the frames; None: as shards with these settings have them.
    Raises ValueError for a file that is absent, corrupt or truncated, and for an interval that begins beyond its end.
    """
    try:
        return _read(path, start, end, frames, longest, True, fit)
    except Skipped:  # some files cannot be entered anywhere but at their start
        return _read(path, start, end, frames, longest, False, fit)


def _read(path, start, end, frames, longest, skip, fit=None) -> MediaClip:
    with open_medium(path) as medium:
        return _interval(medium, start or 0.0, end, frames, longest, skip, fit)


def iter_audio_windows(
    path: Path, seconds: float, least: float, start: float | None = None, end: float | None = None
) -> Iterator[tuple[float, float, Tensor | None, int]]:
    """Yield (begin s, finish s, waveform (channels, T) or None, rate Hz) of windows of `seconds`, one after the other.

    One pass through the file, one window in memory; each is what read_clip gives of its interval. What is left after the
    last one is a window too if it has `least` seconds, or is all there is. Raises ValueError as read_clip does.
    """
    try:
        yield from _windows(path, seconds, least, start or 0.0, end, skip=True)
    except Skipped:  # raised before the first window, if at all
        yield from _windows(path, seconds, least, start or 0.0, end, skip=False)


def window_bounds(begin: float, finish: float, seconds: float, least: float) -> Iterator[tuple[float, float]]:
    """Split an interval of seconds into the windows (begin, finish) that iter_audio_windows yields."""
    count = max(1, math.floor((finish - begin - least) / seconds) + 1)
    return ((begin + i * seconds, min(finish, begin + (i + 1) * seconds)) for i in range(count))


def _windows(path, seconds, least, begin, end, skip) -> Iterator[tuple[float, float, Tensor | None, int]]:
    with open_medium(path) as medium:
        if not medium.audio:
            raise ValueError("no sound in it")
        bounds = window_bounds(begin, _finish(medium, begin, end), seconds, least)
        for sound in _sounds(medium, bounds, begin, skip):
            yield sound.begin, sound.until, sound.wave(), sound.rate or medium.audio.sample_rate


def _finish(medium: Medium, begin: float, end: float | None) -> float:
    """Return the seconds at which the interval ends; PastEndError if it begins no earlier."""
    length = medium.seconds()
    finish = length if end is None else min(end, length)
    if begin >= finish:
        raise PastEndError(f"the interval begins at {begin:g} s, the medium ends at {length:.2f} s")
    return finish


def _sounds(medium: Medium, bounds: Iterator[tuple[float, float]], begin: float, skip: bool) -> Iterator[AudioReader]:
    """Yield the readers of windows as they are full."""
    sound = AudioReader(medium.audio, *next(bounds), medium.origin)
    for packet in medium.packets([medium.audio], begin, skip):
        for frame in sound.decoded(packet):
            sound.add_frame(frame)
            while sound.done:
                yield sound
                following = next(bounds, None)
                if not following:
                    return
                sound = AudioReader(medium.audio, *following, medium.origin)
                sound.add_frame(frame)  # it may reach into this one
    sound.close()
    _check_truncation(medium, [sound])
    yield sound


def _interval(medium: Medium, start, end, frames, longest, skip, fit) -> MediaClip:
    video, sound = medium.video if frames else None, medium.audio
    if not video and not sound:
        raise ValueError("neither pictures nor sound in it" if frames else "no sound in it")
    finish = _finish(medium, start, end)  # with the pictures where they are not wanted, too: it is the same clip
    times = frame_times(start, finish, frames) if video else []
    pictures = VideoReader(video, times, fit or stored(frames), medium.origin, skip) if video else None
    begin, until = _centre(medium, start, finish, longest)
    audio = AudioReader(sound, begin, until, medium.origin) if sound else None
    readers = {reader.stream.type: reader for reader in (pictures, audio) if reader}
    streams = [reader.stream for reader in readers.values()]
    for packet in medium.packets(streams, start if video else begin, skip):
        readers[packet.stream.type].take(packet)
        if all(reader.done for reader in readers.values()):
            break
    for reader in readers.values():
        reader.close()
    _check_truncation(medium, list(readers.values()))
    clip = MediaClip(finish - start, pictures.frames if pictures else [])
    return replace(clip, wave=audio.wave(), rate=audio.rate or 0) if audio else clip


def _centre(medium: Medium, start: float, finish: float, longest: float) -> tuple[float, float]:
    """Return the bounds of the central `longest` seconds of an interval; where pictures outlast the sound, of that with sound."""
    end = medium.stated_end(medium.audio) if medium.audio else math.inf
    if finish - start > longest and start < end < finish - SLACK:
        finish = end
    middle, half = (start + finish) / 2, min(finish - start, longest) / 2
    return middle - half, middle + half


def _check_truncation(medium: Medium, readers: list) -> None:
    """Raise ValueError if a stream ended before its header says, or if all did in files whose streams state nothing."""
    stated = [medium.stated_end(reader.stream) for reader in readers]
    short = [r.end < min(r.until, s) - SLACK for r, s in zip(readers, stated, strict=True)]
    still = [r.stream.type == "video" and r.end < STILL for r in readers]
    states = [s < math.inf and not shown for s, shown in zip(stated, still, strict=True)]
    if all(short) or any(early and sure for early, sure in zip(short, states, strict=True)):
        reader = readers[short.index(True)]
        raise ValueError(f"truncated: {reader.stream.type} ends at {reader.end:.2f} s, {reader.until:.2f} s is wanted")


def duration(path: Path | Source) -> float:
    """Return the seconds of a file's pictures, or of its sound if they are none or a still; ValueError if it cannot be read."""
    with open_medium(path) as medium:
        return medium.seconds()


def frame_times(begin: float, finish: float, cfg: FramesConfig) -> list[float]:
    """List the seconds at which frames are taken: middles of n equal parts, n = duration x fps, within 1..max_frames."""
    seconds = finish - begin
    n = min(cfg.max_frames, max(1, round(seconds * cfg.fps))) if cfg.fps else cfg.max_frames
    return [begin + (i + 0.5) * seconds / n for i in range(n)]
