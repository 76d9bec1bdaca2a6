"""Read still pictures to pixels, and encode pixels as JPEG and PNG; what is wrong with a file is a ValueError that says it."""

import io
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from clip4vla.config import FramesConfig
from clip4vla.errors import UserError
from clip4vla.media.source import Source, source_of

ORIENTATION = 0x0112  # in EXIF
BAND = 256  # rows that are laid on white at once
LONGEST_SIDE = 200  # of a frame, in shortest sides: it is scaled whole before its centre is cut out
SOI, SOF, SOS = b"\xff\xd8", (0xFFC0, 0xFFC1, 0xFFC2), 0xFFDA  # markers of a JPEG: its begin, its size, its first scan
PLAIN = {
    0xFFC4,
    0xFFDB,
    0xFFDD,
    0xFFFE,
    *range(0xFFE0, 0xFFF0),
}  # tables, restart interval, comment, applications' data
UNREADABLE = "unreadable picture: "


@dataclass(frozen=True)
class Fit:
    """Says how pictures are brought to one size, in open_clip's words.

    resize_mode: shortest scales the shorter side and cuts out the centre, squash scales both sides, longest scales the longer
    side and pads with black.
    """

    size: tuple[int, int]  # H, W
    interpolation: str = "bicubic"  # or bilinear, or another of Pillow's filters
    resize_mode: str = "shortest"

    def scaled(self, width: float, height: float) -> tuple[int, int]:
        """Return the (width, height) that a picture of this width and height is scaled to: whole on one side at least."""
        rows, columns = self.size
        if self.resize_mode == "squash":
            return columns, rows
        if self.resize_mode == "longest":
            scale = min(columns / width, rows / height)
            return max(1, round(width * scale)), max(1, round(height * scale))
        scale = max(columns / width, rows / height)
        return max(columns, round(width * scale)), max(rows, round(height * scale))

    def cut(self, picture: np.ndarray) -> np.ndarray:
        """Cut out the centre (H, W, 3) of a scaled picture, or pad what is smaller with black."""
        for axis, size in enumerate(self.size):
            spare = picture.shape[axis] - size
            first = max(0, round(spare / 2))
            picture = picture.take(range(first, first + min(size, picture.shape[axis])), axis)
            before = max(0, -spare) // 2
            picture = np.pad(picture, [(before, max(0, -spare) - before) if i == axis else (0, 0) for i in range(3)])
        return picture


def stored(frames: FramesConfig) -> Fit:
    """Say how the frames of shards with these settings are fitted."""
    return Fit((frames.size, frames.size), resize_mode=frames.resize_mode)


def read_picture(path: Path | Source, fit: Fit) -> np.ndarray:
    """Read a picture to (H, W, 3) uint8 as `fitted` does; one of more than 178,956,970 pixels is refused by its header."""
    source = source_of(path)
    try:
        with source.open() as file:
            is_drawing = source.suffix == ".svg"
            with Image.open(io.BytesIO(_render_svg(file.read(), fit.size[1])) if is_drawing else file) as image:
                return fitted(image, fit)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise ValueError("not a picture that Pillow can read") from None
    except Exception as error:  # Pillow raises whatever its parsers raise
        reason = str(error).removeprefix(UNREADABLE)
        raise ValueError(f"{UNREADABLE}{' '.join(reason.split())[:200] or type(error).__name__}") from None


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Read the (width, height) of a JPEG from its header, or None unless that is as plain as encoders write it.

    Plain: up to the first scan each segment follows the one before it, and a single one has the size (ITU-T T.81, B.2).
    """
    size, at, end = None, 2, len(data) - 10  # what is read at a marker
    while data.startswith(SOI) and at <= end:
        marker, length, precision, height, width, components = struct.unpack_from(">HHBHHB", data, at)
        if marker == SOS:
            return size
        if marker in SOF:
            if size or precision != 8 or components not in (1, 3) or length != 8 + 3 * components:
                return None
            size = width, height
        elif marker not in PLAIN:
            return None
        at += 2 + length
    return None


def fitted(image: Image.Image, fit: Fit) -> np.ndarray:
    """Fit a still picture into (H, W, 3) uint8: upright, transparency on white, and whole.

    Where a CLIP would cut the sides off (shortest) it is padded with white instead: a still has no other frame to show them.
    """
    image.load()
    if image.getexif().get(ORIENTATION, 1) != 1:  # not otherwise: it would copy
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would cut them off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    flat = Image.new("RGB", image.size)
    for top in range(0, image.height, BAND):  # three copies of a large picture would fill the memory
        band = image.crop((0, top, image.width, min(top + BAND, image.height))).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        flat.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    if fit.resize_mode != "shortest":
        return resized(flat, fit)
    (rows, columns), method = fit.size, Image.Resampling[fit.interpolation.upper()]
    if not round(min(flat.size) / max(flat.size) * min(fit.size)):  # a line, that would be thinner than a pixel
        flat = flat.resize((columns, 1) if flat.width > flat.height else (1, rows), method)
    return np.asarray(ImageOps.pad(flat, (columns, rows), method, color="white"))


def resized(image: Image.Image, fit: Fit) -> np.ndarray:
    """Scale an RGB picture and cut or pad it to (H, W, 3) uint8, to the last bit as open_clip's preprocess does."""
    width, height = fit.scaled(*image.size)
    if fit.resize_mode == "shortest" and fit.size[0] == fit.size[1]:  # torchvision's Resize rounds the longer side down
        short, size = min(image.size), fit.size[0]
        width, height = (int(size * side / short) for side in image.size)
    return fit.cut(np.asarray(image.resize((width, height), Image.Resampling[fit.interpolation.upper()])))


def check_aspect_ratio(width: float, height: float) -> None:
    """Raise ValueError for pictures whose shorter side cannot be scaled to a frame without filling the memory."""
    if max(width, height) > LONGEST_SIDE * min(width, height):
        raise ValueError(
            f"pictures of {width:.0f} x {height:.0f}: one side is more than {LONGEST_SIDE} times the other"
        )


def _render_svg(data: bytes, size: int) -> bytes:
    """Draw an SVG file's bytes to PNG bytes, twice as wide as needed; it may hold entities and pictures, but fetches none."""
    try:
        from cairosvg.surface import PNGSurface
        from cairosvg.url import fetch
    except ImportError:
        raise UserError("drawings (.svg) need cairosvg: pip install 'clip4vla[train]' or 'clip4vla[web]'") from None

    def fetch_embedded(url: str, kind: str) -> bytes:
        if not url.startswith("data:"):
            raise ValueError(f"the drawing refers to {url}")
        return fetch(url, kind)

    try:
        return PNGSurface.convert(bytestring=data, unsafe=True, url_fetcher=fetch_embedded, output_width=2 * size)
    except Exception as error:  # cairosvg raises whatever its parsers and cairo raise
        raise ValueError(f"unreadable drawing: {type(error).__name__}: {error}") from None


def jpeg(pixels: np.ndarray, quality: int, subsampling: str = "4:2:0") -> bytes:
    """Encode pixels (H, W, 3) or (H, W, 1) uint8 as JPEG bytes."""
    return _encode(pixels, "JPEG", quality=quality, subsampling=subsampling)


def png(pixels: np.ndarray) -> bytes:
    """Encode pixels (H, W, 3) or (H, W, 1) uint8 as PNG bytes."""
    return _encode(pixels, "PNG", optimize=False)


def _encode(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(out, kind, **options)
    return out.getvalue()
