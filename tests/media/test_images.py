"""images.py: stills of every kind to pixels, and the size in a header."""

import io
import struct

import pytest
from PIL import Image

from clip4vla.media.images import Fit, jpeg_size, read_picture


def test_pictures_are_composited_on_white_and_padded(tmp_path):
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png", Fit((32, 32))) == 255).all()
    Image.new("LA", (40, 20), (0, 255)).save(tmp_path / "wide.png")
    wide = read_picture(tmp_path / "wide.png", Fit((32, 32)))
    assert (
        wide.shape == (32, 32, 3) and (wide[9:23] == 0).all() and (wide[:7] == 255).all() and (wide[25:] == 255).all()
    )
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert (read_picture(tmp_path / "palette.png", Fit((4, 4))) == (0, 255, 0)).all()


def test_drawings_render_but_fetch_nothing(tmp_path):
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="10" height="20">'
    (tmp_path / "a.svg").write_text(head + '<rect width="10" height="20" fill="blue"/></svg>')
    pixels = read_picture(tmp_path / "a.svg", Fit((64, 64)))
    assert (pixels[32, 32] == (0, 0, 255)).all() and (pixels[32, 2] == 255).all()
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (tmp_path / "b.svg").write_text(
        head + f'<image width="9" height="9" xlink:href="file://{tmp_path}/secret.png"/></svg>'
    )
    with pytest.raises(ValueError, match="the drawing refers to file"):
        read_picture(tmp_path / "b.svg", Fit((64, 64)))


def test_a_line_is_drawn_one_pixel_wide(tmp_path):
    for size in ((5000, 3), (3, 5000), (9000, 1)):
        Image.new("RGB", size, "blue").save(tmp_path / "line.png")
        pixels = read_picture(tmp_path / "line.png", Fit((64, 64)))
        is_blue = (pixels == (0, 0, 255)).all(2)
        assert is_blue.sum() == 64 and (is_blue.all(1).sum(), is_blue.all(0).sum()) == (
            (1, 0) if size[0] > size[1] else (0, 1)
        )
        assert (pixels[~is_blue] == 255).all()


def saved(mode="RGB", kind="JPEG", size=(30, 70), **options):
    Image.new(mode, size).save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


def test_the_size_in_the_header_of_a_plain_jpeg_is_that_which_pillow_reads():
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = [dict(mode="L"), dict(progressive=True), dict(subsampling=0, comment=b"x" * 999), dict(exif=exif)]
    for options in [*plain, dict(optimize=True), dict(restart_marker_blocks=2), dict(size=(65000, 1))]:
        data = saved(**options)
        assert jpeg_size(data) == Image.open(io.BytesIO(data)).size, options


def test_of_headers_that_are_not_plain_no_size_is_claimed():
    data = saved()
    frame, scan = (data.index(marker) for marker in (b"\xff\xc0", b"\xff\xda"))
    (length,) = struct.unpack_from(">H", data, frame + 2)
    segment = data[frame : frame + 2 + length]
    larger = segment[:5] + struct.pack(">HH", 60_000, 60_000) + segment[9:]
    hostile = [
        data[:frame] + larger + data[frame:],  # decoders take one of two sizes
        data[:scan] + larger + data[scan:],
        data[:frame] + b"\0" + data[frame:],
        data[:frame] + b"\xff\xe0\0\0" + data[frame:],
        data[:frame] + segment[:4] + b"\x0c" + segment[5:] + data[frame + 2 + length :],  # 12 bits
        data[:frame] + data[frame + 2 + length :],
        *(data[:end] for end in range(scan + 2)),
        saved("CMYK"), saved(kind="PNG"), saved(kind="GIF"), b"\xff\xd8" + bytes(500), b"",
    ]  # fmt: skip
    assert jpeg_size(data) == (30, 70) and [jpeg_size(bad) for bad in hostile] == [None] * len(hostile)
