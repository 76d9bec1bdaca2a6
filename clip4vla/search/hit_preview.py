"""Preview an item of a search index from its shard or its medium, as long as that is what was indexed."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from clip4vla.config import FramesConfig, SpectrogramConfig
from clip4vla.data.shards import ShardFolder
from clip4vla.media.av_reader import read_clip
from clip4vla.media.images import jpeg, read_picture, stored
from clip4vla.media.source import PICTURES
from clip4vla.media.spectrogram import encode, is_silent, log_mel
from clip4vla.report.preview import RATE, ClipPreview, film_strip, mono, ogg, preview_sample, spectrogram_jpeg
from clip4vla.search.sources import file_state, parsed


def of_shard(place: str, state: str, shown: dict[str, Any]) -> ClipPreview:
    """Preview the sample with the key of `shown` in a shard (its FOLDER/NAME, and sha256).

    It has captions alone if the sample is not there any more.
    """
    url, _, name = place.rpartition("/")
    try:
        folder = opened(url)
        number = [(shard.name, shard.sha256) for shard in folder.shards].index((name, state))
        entry = folder.entries(number).keys().index(shown["key"])
        meta = parsed(folder.read([(number, entry)], ("json",))[0])
    except ValueError:  # UserError is one
        return ClipPreview(shown["name"], shown["captions"])
    return preview_sample(folder, number, entry, meta)


@functools.lru_cache(64)
def opened(url: str) -> ShardFolder:
    """Open a folder, once: later calls return it as it was then."""
    return ShardFolder.open(url)


def of_file(
    path: Path, state: str, shown: dict[str, Any], spec: SpectrogramConfig, frames: FramesConfig
) -> ClipPreview:
    """Preview an interval of a media file.

    It has captions alone if the file is not the one that was indexed, or cannot be read.
    """
    exhibit = ClipPreview(shown["name"], shown["captions"])
    try:
        if file_state(path) == state:
            _fill(exhibit, path, shown["start"], shown["end"], spec, frames)
    except (OSError, ValueError):
        pass
    return exhibit


def _fill(
    exhibit: ClipPreview,
    path: Path,
    start: float | None,
    end: float | None,
    spec: SpectrogramConfig,
    frames: FramesConfig,
) -> None:
    if path.suffix.lower() in PICTURES:
        exhibit.picture = jpeg(read_picture(path, stored(frames)), frames.quality)
        return
    clip = read_clip(path, start, end, frames)
    if clip.frames:
        exhibit.picture = film_strip(jpeg(np.concatenate(clip.frames), frames.quality))
    if clip.wave is None:
        return
    decibels = log_mel(clip.wave, clip.rate, spec)
    if not is_silent(decibels, spec):
        code = encode(decibels, spec)[: decibels.shape[1], :, decibels.shape[0] // 2]  # of left, mid, right the middle
        exhibit.spectrogram = spectrogram_jpeg(code)
        exhibit.audio = ogg(mono(clip.wave, clip.rate, RATE), RATE)
