"""Preview a clip: film strip, spectrogram and sound, small enough that a page holds thousands."""

import base64
import functools
import io
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torchaudio.functional as AF
from PIL import Image
from torch import Tensor

from clip4vla.data.shards import CorruptSample, ShardFolder
from clip4vla.media.spectrogram import mix

if TYPE_CHECKING:
    from clip4vla.data.loader import Loader
    from clip4vla.data.sampler import SampleIndex

LISTEN = 10.0  # s of sound in a player
RATE = 16000  # Hz of a player in a page of queries
STRIP = 6  # frames of a film strip
HIGH = 96  # pixels of them


@dataclass
class ClipPreview:
    """Hold what a page shows of one clip."""

    title: str
    captions: list[str]
    picture: bytes | None = None  # JPEG
    spectrogram: bytes | None = None  # JPEG
    audio: bytes | None = None
    audio_mime: str = "audio/ogg"


def preview(folder: ShardFolder, place: "SampleIndex", meta: dict) -> ClipPreview:
    """Preview the clip at a place of its folder, as far as it has pictures and sound; meta: its json.

    A sample that cannot be read has its captions alone, a clip whose medium cannot be read has no sound to play.
    """
    return preview_sample(folder, place.shard, place.entry, meta)


def preview_sample(folder: ShardFolder, shard: int, entry: int, meta: dict) -> ClipPreview:
    """Preview the clip at an entry of a shard, both by number; as `preview` in all else."""
    sample = folder.read([(shard, entry)], ("frames", "fbank"))[0]
    members = {} if isinstance(sample, CorruptSample) else sample
    shown = ClipPreview(meta["id"], meta["captions"])
    if "frames" in members:
        shown.picture = film_strip(members["frames"])
    if "fbank" in members:
        shown.spectrogram = spectrogram_jpeg(grey(members["fbank"])[: meta["n_rows"]])
        wave = original_sound(folder, meta, RATE)
        shown.audio = None if wave is None else ogg(wave, RATE)
    return shown


def preview_clip(loader: "Loader", clip: int, clips: dict[int, dict], modalities: str) -> ClipPreview:
    """Preview a clip of a loader by its place in the order, without the medium that takes no part."""
    place = loader.order.places[clip]
    shown = preview(loader.folders[place.source], place, clips[clip])
    hidden: dict[str, Any] = {"v": {"spectrogram": None, "audio": None}, "a": {"picture": None}, "av": {}}[modalities]
    return replace(shown, **hidden)


def film_strip(data: bytes) -> bytes:
    """Return a JPEG of at most six frames side by side, spread over a shard's vertical strip.

    A single frame stays as it is.
    """
    with Image.open(io.BytesIO(data)) as image:
        size, n = image.width, image.height // image.width
        if n == 1:
            return data
        count = min(n, STRIP)
        strip = Image.new("RGB", (count * HIGH, HIGH))
        for i in range(count):
            top = (2 * i + 1) * n // (2 * count) * size  # the middle of the i-th part
            strip.paste(image.crop((0, top, size, top + size)).resize((HIGH, HIGH)), (i * HIGH, 0))
    return to_bytes(lambda buffer: strip.save(buffer, "JPEG", quality=80))


def grey(data: bytes) -> np.ndarray:
    """Return the 8-bit spectrogram (rows, mel) of a shard's picture; of left, mid, right the middle."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(image)
    return pixels if pixels.ndim == 2 else pixels[..., 1]


def spectrogram_jpeg(grey: np.ndarray, width: int = 448, height: int = 112) -> bytes:
    """Return a JPEG in magma of an 8-bit spectrogram (rows, mel), at most `width` pixels wide.

    Time runs to the right, low frequencies are at the bottom.
    """
    image = Image.fromarray(np.ascontiguousarray(grey.T[::-1]))  # mel rows
    image = image.resize((min(width, image.width), height))
    return to_bytes(lambda buffer: Image.fromarray(_magma()[np.asarray(image)]).save(buffer, "JPEG", quality=75))


@functools.cache
def _magma() -> np.ndarray:
    """Return the colours (256, 3), 8 bits each."""
    import matplotlib  # here: training loads this module, and draws nothing

    return (matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def original_sound(folder: ShardFolder, meta: dict, rate: int) -> Tensor | None:
    """Read the central 10 s at most of a clip's waveform, mono (T,) at `rate` Hz, from its medium.

    None if that is gone, corrupt or, by its name, outside of the folder's media_root, or if PyAV is not installed.
    """
    try:
        from clip4vla.media.av_reader import read_clip
    except ImportError:
        return None
    root = Path(os.path.abspath(folder.media_root))
    path = Path(os.path.abspath(root / (meta["media"]["audio"] or "")))  # an absolute name replaces the root
    if root not in path.parents:
        return None
    try:
        clip = read_clip(path, meta["start"], meta["end"], None, LISTEN)
    except (ValueError, OverflowError):
        return None
    if clip.wave is None:
        return None
    return mono(clip.wave, clip.rate, rate)


def mono(wave: Tensor, rate: int, wanted: int) -> Tensor:
    """Resample a waveform (channels, T) at `rate` Hz to (T,) at the rate wanted."""
    ratio = Fraction(wanted, rate).limit_denominator(1000)  # as in spectrogram.log_mel
    return AF.resample(mix(wave)[0], ratio.denominator, ratio.numerator)


def ogg(wave: Tensor, rate: int) -> bytes:
    """Encode as Ogg (Vorbis) the central 10 s at most of a waveform (T,)."""
    length = int(LISTEN * rate)
    part = wave[max(0, len(wave) - length) // 2 :][:length].numpy()
    return to_bytes(lambda buffer: soundfile.write(buffer, part, rate, format="OGG", subtype="VORBIS"))


def data_uri(data: bytes, mime: str) -> str:
    """Return the bytes as a URI that a page can hold."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def to_bytes(save: Callable[[io.BytesIO], object]) -> bytes:
    """Return the bytes that `save` writes to the file it is given."""
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()
