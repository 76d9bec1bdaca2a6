"""Read uploaded files as queries: content, not name, decides what a file is, and it can make no other file be read."""

from pathlib import Path

import av
import numpy as np
from PIL import Image, UnidentifiedImageError

from clip4vla.config import FramesConfig, SpectrogramConfig
from clip4vla.data import preprocessing
from clip4vla.data.preprocessing import ClipInput
from clip4vla.media.av_reader import read_clip
from clip4vla.media.images import Fit, jpeg
from clip4vla.report.preview import RATE, ClipPreview, film_strip, mono, ogg, spectrogram_jpeg

PICTURES = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MEDIA = (
    "wav,w64,mp3,flac,ogg,aac,aiff,au,caf,mov,matroska,avi,flv,asf,mpeg,mpegts"  # no playlists: they name other files
)
PIXELS = 64_000_000  # of a picture or frame: 1.5 GB while it is decoded and fitted


def read(path: Path, spec: SpectrogramConfig, frames: FramesConfig, fit: Fit) -> tuple[ClipInput, ClipPreview]:
    """Read a file as the towers take it, a sound's central part, and as the page shows it; fit: Model.pictures.

    ValueError if it cannot be read.
    """
    if not path.stat().st_size:
        raise ValueError("the file is empty")
    shown = ClipPreview(path.name, [])
    try:
        clip = _picture(path, fit)
    except UnidentifiedImageError:
        clip = _medium(path, spec, frames, fit, shown)
    if clip.frames is not None:
        strip = clip.frames.permute(0, 2, 3, 1).reshape(-1, fit.size[1], 3)  # F*H W 3
        shown.picture = film_strip(jpeg(strip.numpy(), frames.quality))
    if clip.segments is not None:
        code = clip.segments[:, clip.segments.shape[1] // 2]  # S 224 M; of left, mid, right the middle
        shown.spectrogram = spectrogram_jpeg(code.flatten(0, 1)[: clip.rows].numpy())
    return clip, shown


def _picture(path: Path, fit: Fit) -> ClipInput:
    try:
        with Image.open(path, formats=PICTURES) as image:
            _must_be_small(*image.size)
            return preprocessing.of_image(image, fit)
    except (UnidentifiedImageError, ValueError):
        raise
    except Image.DecompressionBombError:
        raise ValueError(LARGE) from None
    except Exception as error:  # Pillow raises whatever its parsers raise
        raise ValueError(f"a picture that cannot be read: {error}") from None


def _medium(path: Path, spec: SpectrogramConfig, frames: FramesConfig, fit: Fit, shown: ClipPreview) -> ClipInput:
    try:
        with av.open(str(path), container_options={"protocol_whitelist": "file", "format_whitelist": MEDIA}) as file:
            for stream in file.streams.video:
                _must_be_small(stream.width, stream.height)
    except (av.FFmpegError, OSError, AttributeError):  # the last: a stream without a codec
        raise ValueError("not a sound, picture or video that can be read") from None
    clip = read_clip(path, None, None, frames, preprocessing.max_clip_seconds(spec), fit)
    query = ClipInput()
    if clip.frames:
        query.frames = preprocessing.of_frames(np.stack(clip.frames), fit).frames
    if clip.wave is not None:
        audio = preprocessing.of_wave(clip.wave, clip.rate, spec)
        query.segments, query.rows = audio.segments, audio.rows
        shown.audio = ogg(mono(clip.wave, clip.rate, RATE), RATE)
    if query.frames is None and query.segments is None:
        raise ValueError("nothing but silence in it")
    return query


LARGE = f"more than {PIXELS // 10**6} megapixels"


def _must_be_small(width: int, height: int) -> None:
    if width * height > PIXELS:
        raise ValueError(LARGE)
