"""What a person sees and hears of a clip: film strip, spectrogram and sound, small enough that a page holds thousands."""

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

from clip4vla.shards import Damaged, ShardFolder

if TYPE_CHECKING:
    from clip4vla.loader import Loader
    from clip4vla.order import Place

LISTEN = 10.0  # s of sound in a player
RATE = 16000  # Hz of a player in a page of queries
STRIP = 6  # frames of a film strip
HIGH = 96  # pixels of them


@dataclass
class Exhibit:
    """One clip as a person meets it."""

    title: str
    captions: list[str]
    picture: bytes | None = None  # JPEG
    spectrogram: bytes | None = None  # JPEG
    audio: bytes | None = None
    audio_mime: str = "audio/ogg"


def exhibit(folder: ShardFolder, place: "Place", meta: dict) -> Exhibit:
    """The clip at a place of its folder, as far as it has pictures and sound; meta: its json.

    A sample that cannot be read has its captions alone, a clip whose medium cannot be read has no sound to play.
    """
    return of_sample(folder, place.shard, place.entry, meta)


def of_sample(folder: ShardFolder, shard: int, entry: int, meta: dict) -> Exhibit:
    """The same of an entry of a shard, both by number."""
    found = folder.read([(shard, entry)], ("frames", "fbank"))[0]
    members = {} if isinstance(found, Damaged) else found
    shown = Exhibit(meta["id"], meta["captions"])
    if "frames" in members:
        shown.picture = film_strip(members["frames"])
    if "fbank" in members:
        shown.spectrogram = spectrogram_jpeg(grey(members["fbank"])[: meta["n_rows"]])
        wave = original_sound(folder, meta, RATE)
        shown.audio = None if wave is None else ogg(wave, RATE)
    return shown


def of_clip(loader: "Loader", clip: int, clips: dict[int, dict], modalities: str) -> Exhibit:
    """A clip of a loader by its place in the order, without the medium that takes no part."""
    place = loader.order.places[clip]
    shown = exhibit(loader.folders[place.source], place, clips[clip])
    unseen: dict[str, Any] = {"v": {"spectrogram": None, "audio": None}, "a": {"picture": None}, "av": {}}[modalities]
    return replace(shown, **unseen)


def film_strip(data: bytes) -> bytes:
    """JPEG of at most six frames side by side, spread over a shard's vertical strip; a single frame stays as it is."""
    with Image.open(io.BytesIO(data)) as image:
        size, n = image.width, image.height // image.width
        if n == 1:
            return data
        count = min(n, STRIP)
        strip = Image.new("RGB", (count * HIGH, HIGH))
        for i in range(count):
            top = (2 * i + 1) * n // (2 * count) * size  # the middle of the i-th part
            strip.paste(image.crop((0, top, size, top + size)).resize((HIGH, HIGH)), (i * HIGH, 0))
    return encoded(lambda buffer: strip.save(buffer, "JPEG", quality=80))


def grey(data: bytes) -> np.ndarray:
    """The 8-bit spectrogram (rows, mel) of a shard's picture; of left, mid, right the middle."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.array(image)
    return pixels if pixels.ndim == 2 else pixels[..., 1]


def spectrogram_jpeg(grey: np.ndarray, width: int = 448, height: int = 112) -> bytes:
    """JPEG in magma of an 8-bit spectrogram (rows, mel), at most `width` pixels wide.

    Time runs to the right, low frequencies are at the bottom.
    """
    image = Image.fromarray(np.ascontiguousarray(grey.T[::-1]))  # mel rows
    image = image.resize((min(width, image.width), height))
    return encoded(lambda buffer: Image.fromarray(_magma()[np.asarray(image)]).save(buffer, "JPEG", quality=75))


@functools.cache
def _magma() -> np.ndarray:
    """The colours (256, 3), 8 bits each."""
    import matplotlib  # here: training loads this module, and draws nothing

    return (matplotlib.colormaps["magma"](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def original_sound(folder: ShardFolder, meta: dict, rate: int) -> Tensor | None:
    """The central 10 s at most of a clip's waveform, mono (T,) at `rate` Hz, from its medium.

    None if that is gone, damaged or, by its name, outside of the folder's media_root, or if PyAV is not installed.
    """
    try:
        from clip4vla.media import read_clip
    except ImportError:
        return None
    root = Path(os.path.abspath(folder.media_root))
    path = Path(os.path.abspath(root / (meta["media"]["audio"] or "")))  # an absolute name replaces the root
    if root not in path.parents:
        return None
    try:
        heard = read_clip(path, meta["start"], meta["end"], None, LISTEN)
    except (ValueError, OverflowError):
        return None
    if heard.wave is None:
        return None
    return mono(heard.wave, heard.rate, rate)


def mono(wave: Tensor, rate: int, wanted: int) -> Tensor:
    """A waveform (channels, T) at `rate` Hz as (T,) at the rate wanted."""
    ratio = Fraction(wanted, rate).limit_denominator(1000)  # as in spectrogram.log_mel
    return AF.resample(wave.mean(0), ratio.denominator, ratio.numerator)


def ogg(wave: Tensor, rate: int) -> bytes:
    """Ogg (Vorbis) of the central 10 s at most of a waveform (T,)."""
    length = int(LISTEN * rate)
    part = wave[max(0, len(wave) - length) // 2 :][:length].numpy()
    return encoded(lambda buffer: soundfile.write(buffer, part, rate, format="OGG", subtype="VORBIS"))


def data_uri(data: bytes, mime: str) -> str:
    """The bytes as a URI that a page can hold."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def encoded(save: Callable[[io.BytesIO], object]) -> bytes:
    """The bytes that `save` writes to the file it is given."""
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()
