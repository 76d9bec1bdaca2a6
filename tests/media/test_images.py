"""pictures.py: stills of every kind to pixels."""

import pytest
from PIL import Image

from clip4vla.media.images import read_picture


def test_pictures_are_composited_on_white_and_padded(tmp_path):
    Image.new("RGBA", (40, 20), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "clear.png", 32) == 255).all()
    Image.new("LA", (40, 20), (0, 255)).save(tmp_path / "wide.png")
    wide = read_picture(tmp_path / "wide.png", 32)
    assert (
        wide.shape == (32, 32, 3) and (wide[9:23] == 0).all() and (wide[:7] == 255).all() and (wide[25:] == 255).all()
    )
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert (read_picture(tmp_path / "palette.png", 4) == (0, 255, 0)).all()


def test_drawings_render_but_fetch_nothing(tmp_path):
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="10" height="20">'
    (tmp_path / "a.svg").write_text(head + '<rect width="10" height="20" fill="blue"/></svg>')
    pixels = read_picture(tmp_path / "a.svg", 64)
    assert (pixels[32, 32] == (0, 0, 255)).all() and (pixels[32, 2] == 255).all()
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (tmp_path / "b.svg").write_text(
        head + f'<image width="9" height="9" xlink:href="file://{tmp_path}/secret.png"/></svg>'
    )
    with pytest.raises(ValueError, match="the drawing refers to file"):
        read_picture(tmp_path / "b.svg", 64)


def test_a_line_is_drawn_one_pixel_wide(tmp_path):
    for size in ((5000, 3), (3, 5000), (9000, 1)):
        Image.new("RGB", size, "blue").save(tmp_path / "line.png")
        pixels = read_picture(tmp_path / "line.png", 64)
        is_blue = (pixels == (0, 0, 255)).all(2)
        assert is_blue.sum() == 64 and (is_blue.all(1).sum(), is_blue.all(0).sum()) == (
            (1, 0) if size[0] > size[1] else (0, 1)
        )
        assert (pixels[~is_blue] == 255).all()
