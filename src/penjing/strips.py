"""Convolutions of images in strips, where all at once would take much memory.

Without a library for their precision (float64 has none) torch writes every patch of the input down
and multiplies that: [in * h * w, places], nine times the input for kernels of 3x3. Strips of the
output's rows need a strip of it each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Strips"]

# Bytes of patches at a time.
_MOST = 1 << 23


class Strips(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs float64 convolutions so; modes that are entered inside see them whole."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _CONVOLUTION and len(args) == 9 and not kwargs:
            x, weight, bias, stride, padding, dilation, turned, _, groups = args
            if x.ndim == 4 and x.dtype == torch.float64 and not turned:
                return _convolved(x, weight, bias, stride, padding, dilation, groups)
        return func(*args, **(kwargs or {}))


_CONVOLUTION = torch.ops.aten.convolution.default


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int],
    dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """[batch, in, height, width] to [batch, out, height, width]."""

    def run(part: Tensor, padding: list[int]) -> Tensor:
        found: Tensor = _CONVOLUTION(
            part, weight, bias, stride, padding, dilation, False, [0, 0], groups
        )
        return found

    spans = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    height, width = (
        (n + 2 * p - span) // s + 1
        for n, p, span, s in zip(x.shape[2:], padding, spans, stride, strict=True)
    )
    row = 8 * len(x) * weight[0].numel() * width  # patches of a row, of one group
    rows = max(1, _MOST // max(row, 1))
    if rows >= height:
        return run(x, padding)
    made = x.new_empty(len(x), len(weight), height, width)
    for start in range(0, height, rows):
        stop = min(start + rows, height)
        top = start * stride[0] - padding[0]
        bottom = (stop - 1) * stride[0] - padding[0] + spans[0]
        part = x[:, :, max(top, 0) : max(bottom, 0)]
        lead = min(max(-top, 0), bottom - top)
        part = F.pad(part, (0, 0, lead, bottom - top - lead - part.shape[2]))
        made[:, :, start:stop] = run(part, [0, padding[1]])
    return made
