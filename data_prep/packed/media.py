"""Open the media of a manifest row, wherever they lie: a file, a member of a tar, a cell of a table."""

import contextlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from clip4vla.config import DataConfig
from clip4vla.media.layouts import open_medium
from clip4vla.media.source import Source
from data_prep.manifest import ManifestRow, inside
from data_prep.packed import tables
from data_prep.packed.listing import base_of, read_remote


@contextmanager
def open_media(cfg: DataConfig, row: ManifestRow, path: str) -> Iterator[Source]:
    """Name the bytes of a row's picture or medium for the block.

    Members of local tars are read where they lie; what comes from a URL or a table is in memory meanwhile. Raises ValueError
    for what is not there.
    """
    base, place = base_of(cfg.dataset, cfg.media_root), row.places.get(path)
    if not place:
        yield Source(os.path.join(base, inside(path)))
        return
    archive, *numbers = place
    if isinstance(numbers[-1], str):
        data = tables.read_cell(base, archive, *numbers)
    elif "://" in base:
        data = read_remote(base, archive, *numbers)
    else:
        offset, size = numbers
        yield Source(os.path.join(base, archive), offset, offset + size, path)
        return
    with _memory_file(data) as file:
        yield Source(file, 0, len(data), path)


@contextmanager
def _memory_file(data: bytes) -> Iterator[str]:
    """Make a file of bytes in memory, and give its path for the block."""
    with open(os.memfd_create("medium"), "wb") as file:
        file.write(data)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


def suffix_of_bytes(data: bytes) -> str:
    """Return .png for the bytes of a picture, .mp4 of a video, .wav of a sound, of whatever format; ValueError for others."""
    with contextlib.suppress(ValueError, OSError, Image.DecompressionBombError), Image.open(io.BytesIO(data)):
        return ".png"
    with _memory_file(data) as file, open_medium(Source(file, 0, len(data), "first cell")) as medium:
        if not medium.video and not medium.audio:
            raise ValueError("neither pictures nor sound in it")
        return ".mp4" if medium.video else ".wav"
