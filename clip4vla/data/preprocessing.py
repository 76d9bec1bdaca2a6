"""Turn media files, waveforms, pictures and shard samples into the towers' inputs, without DALI and the loader.

What is read here and what shard.py stores differ by its JPEGs alone: the spectrogram goes through the same 8-bit code.
"""

import io
import math
import os
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip4vla.config import FramesConfig, SpectrogramConfig
from clip4vla.data.batch import Batch
from clip4vla.media.av_reader import iter_audio_windows, read_clip, window_bounds
from clip4vla.media.av_streams import check_sampling_rate
from clip4vla.media.images import Fit, check_aspect_ratio, fitted, read_picture, resized, stored
from clip4vla.media.source import PICTURES
from clip4vla.media.spectrogram import crop, encode, is_silent, log_mel

CLIPS, TILES = 64, 256  # of a pass through the towers, at most: clips, frames and segments
LOUDEST = 2**0.5  # of samples: those of decoders and resamplers go a little beyond 1
AHEAD = 16  # clips that are read while the towers are busy
T = TypeVar("T")


@dataclass
class ClipInput:
    """Holds a clip: frames (F, 3, H, W) uint8 RGB; segments (S, C, 224, 224), uint8 code of dB; their valid rows in all.

    None: it has no pictures, no sound, or digital silence.
    """

    frames: Tensor | None = None
    segments: Tensor | None = None
    rows: int = 0


def max_clip_seconds(spec: SpectrogramConfig) -> float:
    """Return the seconds of sound that a clip holds at most: 17.92 with the defaults."""
    return spec.max_segments * _segment(spec)


def _segment(spec: SpectrogramConfig) -> float:
    return spec.segment_rows * spec.hop_length / spec.sample_rate


def read(
    path: str | os.PathLike[str], spec: SpectrogramConfig, frames: FramesConfig, kinds: str = "av",
    start: float | None = None, end: float | None = None, fit: Fit | None = None,
) -> ClipInput:  # fmt: skip
    """Read the interval [start, end) of a medium as shard.py does: frames, and the central max_clip_seconds of sound.

    fit: of the frames, Model.pictures for a model; None: as shards have them.

    kinds: v, a or av, what is wanted of it. A still picture has one frame. Raises ValueError for a corrupt or absent file,
    and for one with nothing of these kinds.
    """
    path, fit = Path(path), fit or stored(frames)
    if path.suffix.lower() in PICTURES:
        if "v" not in kinds:
            raise ValueError("a picture has no sound")
        return of_frames(read_picture(path, fit)[None], fit)
    clip = read_clip(path, start, end, frames if "v" in kinds else None, max_clip_seconds(spec), fit)
    if kinds == "v" and not clip.frames:
        raise ValueError("no pictures in it")
    audio = of_wave(clip.wave, clip.rate, spec) if clip.wave is not None and "a" in kinds else ClipInput()
    visual = of_frames(np.stack(clip.frames), fit) if clip.frames else ClipInput()
    return ClipInput(visual.frames, audio.segments, audio.rows)


def windows(
    path: str | os.PathLike[str], spec: SpectrogramConfig, start: float | None = None, end: float | None = None
) -> Iterator[tuple[float, float, ClipInput]]:
    """Yield (begin s, finish s, sound) of each window of max_clip_seconds of a file: one pass, one window in memory.

    A tail shorter than a segment is left out, unless it is all there is. Raises ValueError as `read` does.
    """
    for begin, finish, wave, rate in iter_audio_windows(Path(path), max_clip_seconds(spec), _segment(spec), start, end):
        yield begin, finish, ClipInput() if wave is None else of_wave(wave, rate, spec)


def windows_of(
    wave: np.ndarray | Tensor, rate: int | None, spec: SpectrogramConfig, whole: bool = True
) -> Iterator[ClipInput]:
    """Yield the windows of samples (T,) or (channels, T), or if not `whole` their centre alone.

    Raises ValueError for what is no waveform.
    """
    wave, rate = _checked(wave, rate)
    total, most = wave.shape[1] / rate, max_clip_seconds(spec)
    centre = max(0.0, (total - most) / 2)
    for begin, finish in (
        window_bounds(0.0, total, most, _segment(spec)) if whole else [(centre, min(total, centre + most))]
    ):
        first = round(begin * rate)
        yield of_wave(wave[:, first : first + round((finish - begin) * rate)], rate, spec)


def _checked(samples: np.ndarray | Tensor, rate: int | None) -> tuple[Tensor, int]:
    """Return a waveform (channels, T) float32 and its rate in Hz; ValueError for what is none."""
    is_float = samples.is_floating_point() if isinstance(samples, Tensor) else samples.dtype.kind == "f"
    wave = _float32(samples) if is_float else torch.zeros(0)
    wave = wave[None] if wave.ndim == 1 else wave
    shaped = wave.ndim == 2 and 0 < wave.shape[0] <= wave.shape[1]
    peak = float(wave.abs().max()) if shaped else math.nan
    if not peak <= LOUDEST or not isinstance(rate, Real) or not float(rate).is_integer() or rate < 1:
        given = f"{tuple(samples.shape)}, {samples.dtype} up to {peak:.4g}, {rate!r} Hz"
        raise ValueError(
            f"samples are (T,) or (channels, T), floats in -1..1, with their rate in whole Hz; these are {given}"
        )
    check_sampling_rate(int(rate))
    return wave, int(rate)


def _float32(samples: np.ndarray | Tensor) -> Tensor:
    if isinstance(samples, np.ndarray):  # also with steps backwards, and of the other order of bytes
        samples = torch.from_numpy(np.ascontiguousarray(samples, np.float32))
    return samples.detach().cpu().float()


def of_wave(wave: Tensor, rate: int, spec: SpectrogramConfig) -> ClipInput:
    """Turn a waveform (channels, T) in [-1, 1] at `rate` Hz, or its centre if it is too long, into segments (S, C, 224, 224)."""
    decibels = crop(log_mel(wave, rate, spec), spec)
    if is_silent(decibels, spec):
        return ClipInput()
    code = torch.from_numpy(encode(decibels, spec))  # S*224 M C
    return ClipInput(segments=_tiles(code, spec.segment_rows), rows=decibels.shape[1])


def of_frames(frames: np.ndarray, fit: Fit) -> ClipInput:
    """Turn RGB frames (F, h, w, 3) uint8 into (F, 3, H, W) as the CLIP with this fit does."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"frames are (F, H, W, 3) uint8, not {frames.shape} {frames.dtype}")
    check_aspect_ratio(frames.shape[2], frames.shape[1])
    if frames.shape[1:3] != fit.size:
        frames = np.stack([resized(Image.fromarray(frame), fit) for frame in frames])
    return ClipInput(torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2))


def sample_uniformly(frames: np.ndarray, most: int) -> np.ndarray:
    """Sample at most `most` of the frames (F, ...), the middles of equal parts."""
    if len(frames) <= most:
        return frames
    return frames[((np.arange(most) + 0.5) * len(frames) / most).astype(int)]


def of_image(image: Image.Image, fit: Fit) -> ClipInput:
    """Turn a still picture into one frame (1, 3, H, W), as one in a file is."""
    return of_frames(fitted(image, fit)[None], fit)


def of_shard(
    meta: dict[str, Any], members: dict[str, bytes], spec: SpectrogramConfig, fit: Fit | None = None
) -> ClipInput:
    """Decode a sample of a shard, its frames resized as the fit says; None: as they are.

    meta: its json, members: what ShardFolder.read gives of "frames" and "fbank".
    """
    sample = ClipInput()
    if "frames" in members:
        strip = _decoded(members["frames"], "RGB", meta["n_frames"], 1)  # F*224 224 3
        size = strip.shape[1]
        sample.frames = of_frames(strip.view(-1, size, size, 3).numpy(), fit or Fit((size, size))).frames
    if "fbank" in members:
        shape = spec.segment_rows / spec.n_mels
        code = _decoded(members["fbank"], "L" if spec.channels == "mono" else "RGB", meta["n_segments"], shape)
        if code.shape[1] != spec.n_mels:
            raise ValueError(f"a spectrogram {code.shape[1]} pixels wide, not {spec.n_mels}")
        sample.segments, sample.rows = _tiles(code, spec.segment_rows), meta["n_rows"]
    return sample


def _decoded(data: bytes, mode: str, tiles: int, shape: float) -> Tensor:
    """Decode a strip of `tiles` tiles, each `shape` times as high as wide, to (H, W, C) uint8; ValueError if it is none."""
    try:
        with Image.open(io.BytesIO(data), formats=["JPEG", "PNG"]) as image:
            if not tiles or image.height != round(tiles * shape * image.width):
                raise ValueError(f"{image.width} x {image.height} pixels are not {tiles} tiles")
            pixels = np.array(image.convert(mode))
    except Exception as error:  # Pillow raises whatever its parsers raise
        raise ValueError(f"a picture that cannot be decoded: {error}") from None
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None])


def _tiles(strip: Tensor, height: int) -> Tensor:
    """Cut a strip (n height, W, C) into tiles (n, C, height, W)."""
    return strip.view(-1, height, *strip.shape[1:]).permute(0, 3, 1, 2)


def batches(clips: Iterable[ClipInput], spec: SpectrogramConfig, fit: Fit) -> Iterator[Batch]:
    """Yield batches of consecutive clips, none larger than CLIPS and TILES unless a single clip is; clips are read AHEAD."""
    some: list[ClipInput] = []
    tiles = 0
    for clip in prefetch(clips, AHEAD):
        own = sum(len(part) for part in (clip.frames, clip.segments) if part is not None)
        if some and (len(some) == CLIPS or tiles + own > TILES):
            yield batch(some, spec, fit)
            some, tiles = [], 0
        some.append(clip)
        tiles += own
    if some:
        yield batch(some, spec, fit)


def batch(clips: list[ClipInput], spec: SpectrogramConfig, fit: Fit) -> Batch:
    """Pack these clips into a Batch without text, of both audio types."""
    channels = 1 if spec.channels == "mono" else 3
    sizes = {"frames": (3, *fit.size), "segments": (channels, spec.segment_rows, spec.n_mels)}
    packs, owners = {}, {}
    for name, size in sizes.items():
        parts = [torch.zeros(0, *size, dtype=torch.uint8) if (x := getattr(c, name)) is None else x for c in clips]
        packs[name] = torch.cat(parts)
        owners[name] = torch.repeat_interleave(torch.tensor([len(part) for part in parts]))
    rows = [r for c in clips for r in _rows(c, spec.segment_rows)]
    count, tiles = len(clips), len(packs["segments"])
    return Batch(
        ids=[str(i) for i in range(count)], captions=[""] * count, tokens=torch.zeros(count, 0, dtype=torch.int64),
        frame_clip=owners["frames"], segment_clip=owners["segments"], segment_rows=torch.tensor(rows, dtype=torch.int64),
        hidden_rows=torch.zeros(tiles, spec.segment_rows, dtype=torch.bool),
        hidden_channels=torch.zeros(tiles, spec.n_mels, dtype=torch.bool),
        audio_type=torch.full((count,), 2), group=torch.arange(count), has_text=torch.zeros(count, dtype=torch.bool),
        has_frames=torch.tensor([c.frames is not None for c in clips]),
        has_audio=torch.tensor([c.segments is not None for c in clips]), meta=[{"id": ""}] * count,
        frames=packs["frames"], segments=packs["segments"],
    )  # fmt: skip


def _rows(clip: ClipInput, height: int) -> list[int]:
    """Count the valid rows of each of a clip's segments."""
    count = 0 if clip.segments is None else len(clip.segments)
    return [min(max(clip.rows - height * i, 0), height) for i in range(count)]


def prefetch(items: Iterable[T], depth: int) -> Iterator[T]:
    """Yield the items, up to `depth` of them made ahead in a thread; its errors are raised here."""
    made: queue.Queue = queue.Queue(depth)
    left = threading.Event()

    def put(item: tuple[bool, Any]) -> None:
        while not left.is_set():
            try:
                return made.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((True, item))
                if left.is_set():
                    return
            put((False, None))
        except BaseException as error:
            put((False, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        while (got := made.get())[0]:
            yield got[1]
        if got[1] is not None:
            raise got[1]
    finally:
        left.set()
