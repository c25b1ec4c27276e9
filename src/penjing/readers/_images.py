"""Image preprocessing from a `preprocessor_config.json`: resize, crop, rescale, normalize.

x = (pixels * rescale_factor - mean) / std, channels first
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from penjing.errors import InputError

__all__ = ["image_size", "preprocessor"]

Preprocess = Callable[[Any], np.ndarray]


def _sides(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int) and not isinstance(size, bool):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    if isinstance(size, Mapping) and "height" in size and "width" in size:
        return int(size["height"]), int(size["width"])
    return None


def image_size(table: Mapping[str, Any], fallback: Any) -> tuple[int, int]:
    """Height and width of what the preprocessing gives."""
    size = table.get("size")
    if table.get("do_center_crop") and (sides := _sides(table.get("crop_size"))):
        return sides
    if sides := _sides(size):
        return sides
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return int(size["shortest_edge"]), int(size["shortest_edge"])
    return _sides(fallback) or (224, 224)


def preprocessor(table: Mapping[str, Any], fallback: Any, channels: int = 3) -> Preprocess:
    """A function from a PIL image to float32 [channels, height, width].

    Args:
        table: the preprocessor configuration; empty for scale 1/255, mean and std 0.5.
        fallback: image size of the model's configuration, used when `table` names none.
        channels: 3 for colour, 1 for grey.

    Raises:
        InputError: a value that is not what the field means.
    """
    height, width = image_size(table, fallback)
    size = table.get("size")
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else None
    if isinstance(size, int) and table.get("do_center_crop"):
        edge = size
    if edge and not table.get("do_center_crop") and "crop_pct" in table:
        # ConvNeXt: below 384 the shorter side is resized to size / crop_pct, then cropped.
        edge = int(edge / table["crop_pct"]) if edge < 384 else None
    try:
        factor = np.float32(table.get("rescale_factor", 1 / 255))
        mean = np.asarray(table.get("image_mean", [0.5] * channels), np.float32)
        std = np.asarray(table.get("image_std", [0.5] * channels), np.float32)
        resample = Image.Resampling(int(table.get("resample", 2)))
    except (TypeError, ValueError) as error:
        raise InputError("preprocessor_config.json has an odd value", got=error) from error
    if mean.shape != std.shape or mean.size not in (1, channels) or not bool((std != 0).all()):
        raise InputError("image_mean and image_std", got=(mean.size, std.size), allowed=channels)

    def preprocess(image: Any) -> np.ndarray:
        picture = image.convert("RGB" if channels == 3 else "L")
        if edge:
            scale = edge / min(picture.size)
            sides = tuple(max(1, int(side * scale)) for side in picture.size)
            picture = picture.resize(sides, resample)
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            picture = picture.crop((left, top, left + width, top + height))
        else:
            picture = picture.resize((width, height), resample)
        pixels = np.asarray(picture, np.float32).reshape(height, width, channels)  # [h, w, c]
        if table.get("do_rescale", True):
            pixels = pixels * factor
        if table.get("do_normalize", True):
            pixels = (pixels - mean) / std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1), np.float32)  # [c, h, w]

    return preprocess
