"""What the kernels of a grouped convolution see: sums over all patches of its input.

    H_g = mean over images and places of x x^T,   x [row] = group g's part of the patch,
                                                  row = in / groups * h * w

The patches are those of the convolution inside the layer: a layer that pads its input itself (as
TensorFlow's "same") is seen after it padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Patches", "is_grouped", "patches_of"]


def is_grouped(layer: nn.Module) -> bool:
    """Whether a layer is a convolution of images with more than one group."""
    return isinstance(layer, nn.Conv2d) and layer.groups > 1


class Patches:
    """Mean and mean outer product of the patches of each group, float64.

    Attributes:
        count: patches of a group that were added.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | float = 0.0
        self._gram: Tensor | float = 0.0

    def add(self, layer: nn.Module, x: Tensor) -> None:
        """Add the inputs of a layer, image by image."""
        for image in torch.split(x, 1):
            found = patches_of(layer, image)  # [groups, row, places]
            self.count += found.shape[2]
            self._mean = self._mean + found.double().sum(2)
            self._gram = self._gram + (found @ found.transpose(1, 2)).double()

    @property
    def mean(self) -> Tensor:
        """[groups, row]."""
        return torch.as_tensor(self._mean) / self.count

    @property
    def grams(self) -> Tensor:
        """[groups, row, row]."""
        return torch.as_tensor(self._gram) / self.count


def patches_of(layer: nn.Module, image: Tensor) -> Tensor:
    """Patches [groups, row, places] of one image [1, in, height, width]."""
    watch = _Watch()
    with torch.no_grad(), watch:
        layer.forward(image)  # without the layer's hooks
    x, kernel, stride, padding, dilation, groups = watch.found
    if isinstance(padding, str):  # "same": nothing, or stride 1 and what is left goes behind
        sides = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if padding == "same":
            x = F.pad(x, [s for n in reversed(sides) for s in (n // 2, n - n // 2)])
        padding = 0
    found = F.unfold(x, kernel, dilation, padding, stride)[0]  # [in * h * w, places]
    return found.reshape(groups, -1, found.shape[1])


class _Watch(TorchFunctionMode):
    """Keeps the arguments of the convolution inside a layer."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv2d:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            given = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.found = (
                given["input"], given["weight"].shape[2:], given.get("stride", 1),
                given.get("padding", 0), given.get("dilation", 1), given.get("groups", 1),
            )  # fmt: skip
        return func(*args, **(kwargs or {}))
