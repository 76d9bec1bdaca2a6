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

from clip4vla.media.images import Fit, check_aspect_ratio

GAP = 0.1  # s that timestamps of sound may wander before it counts as a gap
WAITING, PACKET = 1 << 26, 1 << 10  # bytes of packets that are held undecoded; of one, beside its data
RATES = range(1000, 768001)  # Hz of sound; what claims others costs hours or gigabytes to resample


class Skipped(Exception):
    """Says that after skipping to a keyframe the pictures begin too late or are corrupt."""


def check_sampling_rate(rate: int) -> None:
    """Raise ValueError for a sampling rate in Hz that would cost hours or gigabytes to resample."""
    if rate not in RATES:
        raise ValueError(f"a sampling rate of {rate} Hz, not of {RATES[0]} to {RATES[-1]}")


class VideoReader:
    """Takes the packets of a video stream and keeps the frames shown at the wanted times, each (H, W, 3) uint8.

    Packets wait until one comes that is decoded later than the wanted time, or until they are too many. So what lies before
    the last keyframe is dropped undecoded, and frames that no other refers to are decoded only where they are wanted.
    """

    def __init__(self, stream: av.VideoStream, times: list[float], fit: Fit, origin: float, skip: bool):
        self.stream, self.fit, self.origin, self.skip = stream, fit, origin, skip
        self.times = [(time + origin) / float(stream.time_base) for time in times]  # in the stream's units
        self.frames: list[np.ndarray] = []
        self.waiting: deque[av.Packet] = deque()
        self.held = 0  # bytes of those
        self.stamps: list[int] = []  # of all packets since the last keyframe that was jumped to, sorted
        self.last: av.VideoFrame | None = None
        self.repeated: float = -math.inf  # the end of the last packet that repeats a picture, in the stream's units
        self.until, self.end = times[-1], math.inf  # s that are wanted, and where the stream ended if that was earlier
        stream.codec_context.thread_count = 1  # shard.py has a process for each core

    @property
    def done(self) -> bool:
        """Tell whether every frame is there."""
        return len(self.frames) == len(self.times)

    def take(self, packet: av.Packet) -> None:
        """Take the next packet of the stream; an empty one without a time ends it."""
        if self.done:
            return
        target, stamp = self.times[len(self.frames)], _stamp(packet)
        if not packet.size and stamp is not None:  # the picture before stays on show: Theora and AVI have such packets
            self.repeated = stamp + (packet.duration or 0)
            return
        if stamp is not None:
            self._skip_to(packet, stamp, target)
            bisect.insort(self.stamps, stamp)
        self.waiting.append(packet)
        self.held += packet.size + PACKET
        # one keyframe may lie hours before the wanted time, and gigabytes
        if not packet.size or (packet.dts is not None and packet.dts > target) or self.held > WAITING:
            self._decode()
            self.held = 0
        if not packet.size:
            self.close()

    def _skip_to(self, packet: av.Packet, stamp: int, target: float) -> None:
        """Drop what waits if this packet is a keyframe before the wanted time; Skipped if the first one is after it."""
        if self.skip and not self.stamps and stamp > target and self.last is None:
            raise Skipped
        if self.skip and packet.is_keyframe and stamp <= target and self.waiting:
            self.waiting.clear()
            self.held = 0
            self.stamps.clear()
            self.stream.codec_context.flush_buffers()

    def _decode(self) -> None:
        context = self.stream.codec_context
        while self.waiting and not self.done:
            packet = self.waiting.popleft()
            context.skip_frame = "DEFAULT" if self._wanted(packet) else "NONREF"
            try:
                for frame in context.decode(packet if packet.size else None):
                    self._show(frame)
            except av.error.InvalidDataError:
                raise ValueError(f"corrupt pictures at {self._seconds(_stamp(packet) or 0):.2f} s") from None

    def _wanted(self, packet: av.Packet) -> bool:
        """Tell whether the packet's frame may be on show at one of the times."""
        stamp = _stamp(packet)
        if stamp is None:
            return True
        after = bisect.bisect_right(self.stamps, stamp)
        until = self.stamps[after] if after < len(self.stamps) else math.inf
        return any(stamp <= time < until for time in self.times)

    def _show(self, frame: av.VideoFrame) -> None:
        if frame.pts is None:
            frame.pts = self._next_stamp() if frame.dts is None else frame.dts
        while not self.done and frame.pts > self.times[len(self.frames)]:
            self._keep(self.last or frame)
        self.last = frame

    def _next_stamp(self) -> int:
        """Return the time after the last frame, in the stream's units, or of the file's start; Skipped if neither is known."""
        if self.last is None and self.skip:
            raise Skipped
        unit = float(self.stream.time_base)
        if self.last is None:
            return round(self.origin / unit)
        return self.last.pts + (self.last.duration or round(1 / float(self.stream.average_rate or 25) / unit))

    def close(self) -> None:
        """End the stream: the last frame stays on show."""
        if self.done:
            return
        if self.last is None:
            if self.skip:
                raise Skipped
            raise ValueError("no picture can be decoded")
        self.end = self._seconds(max(self.last.pts + (self.last.duration or 0), self.repeated))
        while not self.done:
            self._keep(self.last)

    def _keep(self, frame: av.VideoFrame) -> None:
        if frame.is_corrupt:
            if self.skip:
                raise Skipped
            raise ValueError(f"corrupt pictures at {self._seconds(frame.pts):.2f} s")
        self.frames.append(fitted_frame(frame, self.stream.sample_aspect_ratio, self.fit))

    def _seconds(self, stamp: float) -> float:
        return stamp * float(self.stream.time_base) - self.origin


def _stamp(packet: av.Packet) -> Any:
    return packet.dts if packet.pts is None else packet.pts


def fitted_frame(frame: av.VideoFrame, aspect: Fraction | None, fit: Fit) -> np.ndarray:
    """Fit a frame into (H, W, 3) uint8, upright, scaled by FFmpeg; aspect: width of a pixel by its height."""
    width, height = frame.width * float(aspect or 1), frame.height
    check_aspect_ratio(width, height)
    lies, mirrored = _turned(frame)
    width, height = fit.scaled(height, width)[::-1] if lies else fit.scaled(width, height)
    method = fit.interpolation.upper()
    picture = frame.reformat(width, height, "rgb24", interpolation=method, threads=1).to_ndarray()
    picture = picture.swapaxes(0, 1) if lies else picture
    return np.ascontiguousarray(fit.cut(picture[mirrored]))


def _turned(frame: av.VideoFrame) -> tuple[bool, tuple[slice, slice]]:
    """Say how a frame is made upright by its display matrix, to the nearest quarter of a turn: (rows are columns, mirrors)."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, (slice(None), slice(None))
    (a, b, _), (c, d, _), _ = np.frombuffer(matrix, np.int32).reshape(3, 3)  # x' = a x + c y, y' = b x + d y
    lies = abs(int(a)) + abs(int(d)) < abs(int(b)) + abs(int(c))
    across, down = (c, b) if lies else (a, d)
    return lies, (slice(None, None, -1 if down < 0 else 1), slice(None, None, -1 if across < 0 else 1))


class AudioReader:
    """Takes the packets of a sound stream and keeps the samples of an interval, in one or two channels.

    Where the sound changes its sampling rate, the higher one is kept; where it changes from one channel to two, both.
    """

    def __init__(self, stream: av.AudioStream, begin: float, finish: float, origin: float):
        self.stream, self.begin, self.until, self.origin = stream, begin, finish, origin
        self.form: tuple[str, str, int] | None = None  # sample format, channel layout and rate of the last frame
        self.mix = av.AudioResampler()  # of frames of this form
        self.chunks: list[np.ndarray] = []  # (1 or 2, T) each
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
        """Take the next packet of the stream."""
        if self.done:
            return
        for frame in self.decoded(packet):
            self.add_frame(frame)

    def decoded(self, packet: av.Packet) -> list[av.AudioFrame]:
        """Decode the frames of a packet; ValueError if it is corrupt and lies in the interval."""
        if not packet.size and _stamp(packet) is not None:
            return []  # an empty one would end the stream
        try:
            frames = packet.decode()
            if not _is_broken(packet, frames):
                return frames
        except av.error.InvalidDataError:
            pass
        at = self._seconds(packet)
        if at >= self.begin:
            raise ValueError(f"corrupt sound at {at:.2f} s")
        return []

    def _seconds(self, packet: av.Packet) -> float:
        if _stamp(packet) is None:
            return self.begin + self.next / self.rate if self.rate else 0.0
        return float(_stamp(packet) * packet.time_base) - self.origin

    def close(self) -> None:
        """End the stream: nothing more comes."""
        if not self.done:
            self._append(self.mix.resample(None))
            self.end = self.begin + self.next / self.rate if self.rate else 0.0

    def add_frame(self, frame: av.AudioFrame) -> None:
        """Keep what of a decoded frame lies in the interval."""
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if form != self.form:
            self._change(frame)
            self.form = form
        assert self.rate
        at = self.next  # of a frame without a time, such as the last one of WMA and every second one of ADPCM
        if frame.time is not None:
            at = round((frame.time - self.origin - self.begin) * self.rate)
        after = at + round(frame.samples * self.rate / frame.sample_rate)
        if after <= 0:
            self.next = after
            return  # before the interval; decoders shift their first packets, so none of them sets the clock
        if not self.chunks:
            self.first = self.next = at
        elif at - self.next > GAP * self.rate:  # sound is missing; what follows stays in step with the pictures
            self._silence(min(at, self.length) - self.next)
        self._append(self.mix.resample(frame))

    def _change(self, frame: av.AudioFrame) -> None:
        """Prepare for frames of another form than those before."""
        check_sampling_rate(frame.sample_rate)
        self._append(self.mix.resample(None))
        if self.rate and frame.sample_rate > self.rate:
            self._raise_rate(frame.sample_rate)
        self.rate = max(self.rate or 0, frame.sample_rate)
        # mixing to integers keeps the sum within full scale, mixing to floats would not
        surround = frame.layout.nb_channels > 2
        self.mix = av.AudioResampler("s32p" if surround else "fltp", "stereo" if surround else None, self.rate)

    def _raise_rate(self, rate: int) -> None:
        """Resample what is kept to a higher rate."""
        assert self.rate
        chunks, mix = self.chunks, av.AudioResampler("fltp", None, rate)
        self.chunks, self.first = [], round(self.first * rate / self.rate)
        self.next = self.first if chunks else round(self.next * rate / self.rate)
        if chunks:
            kept = _joined(chunks)
            frame = av.AudioFrame.from_ndarray(kept, "fltp", "mono" if len(kept) == 1 else "stereo")
            frame.sample_rate = self.rate
            self._append([*mix.resample(frame), *mix.resample(None)])

    def _append(self, frames: list[av.AudioFrame]) -> None:
        for frame in frames:
            samples = frame.to_ndarray()
            self.chunks.append(samples if samples.dtype == np.float32 else (samples / 2**31).astype(np.float32))
            self.next += frame.samples

    def _silence(self, samples: int) -> None:
        self.chunks.append(np.zeros((1, max(0, samples)), np.float32))
        self.next += self.chunks[-1].shape[1]

    def wave(self) -> Tensor | None:
        """Join the waveform (channels, T) from begin to finish, or to the end of the sound; None if there is none."""
        if not self.chunks:
            return None
        late = np.zeros((1, min(self.length, max(0, self.first))), np.float32)
        wave = _joined([late, *self.chunks])[:, max(0, -self.first) :][:, : self.length]
        if not np.isfinite(wave).all():
            raise ValueError("the sound holds samples that are not finite")
        return torch.from_numpy(np.ascontiguousarray(wave)) if wave.shape[1] else None


def _is_broken(packet: av.Packet, frames: list[av.AudioFrame]) -> bool:
    """Tell whether a packet of a FLAC file holds not one numbered frame, as packets without errors do."""
    numbered = [frame.pts for frame in frames] == [packet.pts]
    return bool(packet.size) and not numbered and packet.stream.container.format.name == "flac"


def _joined(chunks: list[np.ndarray]) -> np.ndarray:
    """Join waveforms (1 or 2, T); where any has two channels, one channel becomes both."""
    channels = max(map(len, chunks))
    return np.concatenate([c if len(c) == channels else c.repeat(channels, 0) for c in chunks], 1)
