"""Decode the streams of a medium: packets of video to the frames at wanted times, packets of sound to one waveform."""

import bisect
import math
from collections import deque
from fractions import Fraction
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

GAP = 0.1  # s that timestamps of sound may wander before it counts as a gap
LONGEST_SIDE = 200  # of a picture, in shortest sides: it is scaled whole before its centre is cut out
WAITING, PACKET = 1 << 26, 1 << 10  # bytes of packets that are held undecoded; of one, beside its data
RATES = range(1000, 768001)  # Hz of sound; what claims others costs hours or gigabytes to resample


class Skipped(Exception):
    """Says that after skipping to a keyframe the pictures begin too late or are corrupt."""


def check_sampling_rate(rate: int) -> None:
    """Raise ValueError for a sampling rate in Hz that would cost hours or gigabytes to resample."""
    if rate not in RATES:
        raise ValueError(f"a sampling rate of {rate} Hz, not of {RATES[0]} to {RATES[-1]}")


class VideoReader:
    """Takes the packets of a video stream and keeps the frames shown at the wanted times, each (size, size, 3) uint8.

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
        """Tell whether every frame is there."""
        return len(self.frames) == len(self.times)

    def take(self, packet: av.Packet) -> None:
        """Take the next packet of the stream; an empty one ends it."""
        if self.done:
            return
        target, stamp = self.times[len(self.frames)], _stamp(packet)
        if packet.size:
            if self.skip and not self.stamps and stamp > target and self.last is None:
                raise Skipped
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
        """Tell whether the packet's frame may be on show at one of the times."""
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
        """End the stream: the last frame stays on show."""
        if self.last is None:
            raise ValueError("no picture can be decoded")
        self.end = self._seconds(self.last.pts + (self.last.duration or 0))
        while not self.done:
            self._keep(self.last)

    def _keep(self, frame: av.VideoFrame) -> None:
        if frame.is_corrupt:
            if self.skip:
                raise Skipped
            raise ValueError(f"corrupt pictures at {self._seconds(frame.pts):.2f} s")
        self.frames.append(fit(frame, self.stream.sample_aspect_ratio, self.size))

    def _seconds(self, stamp: float) -> float:
        return stamp * float(self.stream.time_base) - self.origin


def _stamp(packet: av.Packet) -> Any:
    return packet.dts if packet.pts is None else packet.pts


def fit(frame: av.VideoFrame, aspect: Fraction | None, size: int) -> np.ndarray:
    """Cut the centre (size, size, 3) of a frame whose shorter side is scaled to `size`, bicubic, upright: as CLIP does.

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


class AudioReader:
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
        """Tell whether nothing more is needed."""
        return self.rate is not None and self.next >= self.length

    @property
    def length(self) -> int:
        """Count the samples in the interval."""
        assert self.rate
        return round((self.until - self.begin) * self.rate)

    def take(self, packet: av.Packet) -> None:
        """Take the next packet of the stream; an empty one ends it."""
        if self.done:
            return
        for frame in self.decoded(packet):
            self.add_frame(frame)
        if not packet.size and not self.done:
            self.close()

    def decoded(self, packet: av.Packet) -> list[av.AudioFrame]:
        """Decode the frames of a packet; ValueError if it is corrupt and lies in the interval."""
        try:
            return self.stream.codec_context.decode(packet if packet.size else None)
        except av.error.InvalidDataError:
            time = float((_stamp(packet) or 0) * self.stream.time_base) - self.origin
            if time >= self.begin:
                raise ValueError(f"corrupt sound at {time:.2f} s") from None
            return []

    def close(self) -> None:
        """End the stream: nothing more comes."""
        self.end = self.begin + self.next / self.rate if self.rate else 0.0

    def add_frame(self, frame: av.AudioFrame) -> None:
        """Keep what of a decoded frame lies in the interval."""
        if not self.rate:
            check_sampling_rate(frame.sample_rate)
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
        """Join the waveform (channels, T) from begin to finish, or to the end of the sound; None if there is none."""
        if not self.chunks:
            return None
        late = np.zeros((len(self.chunks[0]), min(self.length, max(0, self.first))), np.float32)
        wave = np.concatenate([late, *self.chunks], 1)[:, max(0, -self.first) :][:, : self.length]
        if not np.isfinite(wave).all():
            raise ValueError("the sound holds samples that are not finite")
        return torch.from_numpy(np.ascontiguousarray(wave)) if wave.shape[1] else None
