from pathlib import Path

import pytest
from PIL import Image

from penjing.data.images import open_image
from penjing.errors import InputError


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 51)).save(tmp_path / "a.png")
    image = open_image(tmp_path / "a.png")
    # By hand: 51 / 255 = 0.2 of red over white is (255, 204, 204).
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 204, 204))
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([10, 20, 30])
    palette.save(tmp_path / "p.png", transparency=0)
    assert open_image(tmp_path / "p.png").getpixel((1, 1)) == (255, 255, 255)
    assert open_image(Image.new("L", (1, 1), 7)).getpixel((0, 0)) == (7, 7, 7)


def test_truncated_image_is_named(tmp_path: Path) -> None:
    Image.effect_noise((64, 64), 50).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"cannot read an image; got .*a\.png"):
        open_image(tmp_path / "a.png")
