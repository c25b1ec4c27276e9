"""A folder of images: each sub-folder is a class, or all images lie flat and have no labels.

Transparent images are laid over white.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from penjing.data.dataset import Dataset
from penjing.data.labels import integer_labels
from penjing.errors import InputError

__all__ = ["SUFFIXES", "open_image", "read"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def read(path: Path) -> Dataset:
    """The images below a folder, sorted by path; only headers are read.

    Raises:
        InputError: no images, images beside class folders, a file that is no image.
    """
    flat = _images(p for p in path.iterdir())
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    inside = [(folder.name, image) for folder in folders for image in _images(folder.rglob("*"))]
    if flat and inside:
        raise InputError(
            f"{path}: images lie both beside and inside class folders",
            got=f"{flat[0].name} and {inside[0][1].relative_to(path)}",
            allowed="all in class folders, or all flat",
        )
    files = flat or [image for _, image in inside]
    if not files:
        raise InputError("no samples", got=path, allowed=f"images: {' '.join(SUFFIXES)}")
    for file in files:
        _open(file).close()
    if flat:
        return Dataset("images", tuple(files), path=str(path))
    places = [f"folder {name}" for name, _ in inside]
    labels, classes = integer_labels([name for name, _ in inside], places, str(path))
    return Dataset("images", tuple(files), labels, classes, str(path))


def open_image(image: Path | Image.Image) -> Image.Image:
    """The image in RGB, transparency over white.

    Raises:
        InputError: the file cannot be read as an image.
    """
    if isinstance(image, Image.Image):
        return _over_white(image)
    with _open(image) as opened:
        try:
            return _over_white(opened)
        except (OSError, SyntaxError, ValueError, MemoryError) as error:
            raise _unreadable(image, error) from error


def _images(paths: object) -> list[Path]:
    found = (p for p in paths if p.suffix.lower() in SUFFIXES)  # type: ignore[attr-defined]
    return sorted(p for p in found if p.is_file() and not p.name.startswith("."))


def _open(file: Path) -> Image.Image:
    try:
        return Image.open(file)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    except SyntaxError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: BaseException) -> InputError:
    return InputError(
        "cannot read an image", got=f"{file} ({error})", next="repair it or take it out"
    )


def _over_white(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
