"""Two corrections of a layer that is to be quantized, without training.

Cross-layer equalisation (Nagel et al., Data-Free Quantization, arXiv 1906.04721, section 4.1). Of
two layers with f between them and f(s x) = s f(x) for s > 0, channel by channel:

    W2 f(W1 x + b1) = (W2 S) f(S^-1 W1 x + S^-1 b1),   s_i = sqrt(r1_i r2_i) / r2_i

with r1_i the largest weight that makes channel i and r2_i the largest that reads it: after it
both are sqrt(r1_i r2_i). Exact for f the identity, ReLU and leaky ReLU. Not for GELU, SiLU, and
not for ReLU6: there min(max(x, 0), 6) becomes min(max(x, 0), 6 / s_i), a clip of each channel's
own (`clips`), which is exact; with the clip left at 6 the network is the same only on inputs
where no channel reaches its clip, before or after (the paper puts ReLU in its place).

Bias correction (section 4.2, with measured inputs). Quantized weights move the mean output:

    b' = b - (Q - W) E[x]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penjing.errors import InputError

__all__ = ["Pair", "clips", "correct_bias", "equalize", "factors"]


class Pair(NamedTuple):
    """Two layers in a row: weights [mid, ...] and [out, mid, ...], and the first bias [mid]."""

    first: Tensor
    bias: Tensor | None
    second: Tensor


def factors(first: Tensor, second: Tensor, groups: int = 1) -> Tensor:
    """What each channel between two layers is divided by, float32 [mid].

    Args:
        first: [mid, in, ...], batch norm folded into it.
        second: [out, mid / groups, ...].
        groups: of the second layer; a depthwise convolution has as many as channels.

    Returns:
        s; 1 where a channel is made of zeros alone, or read by zeros alone.

    Raises:
        InputError: shapes that do not fit, NaN or infinite values.
    """
    mid = len(first)
    if (
        first.ndim < 2 or second.ndim < 2 or groups < 1
        or second.shape[1] * groups != mid or len(second) % groups
    ):  # fmt: skip
        raise InputError(
            "weights to equalise", got=(tuple(first.shape), tuple(second.shape)),
            allowed=f"[mid, in, ...] and [out, mid / {groups}, ...]",
        )  # fmt: skip
    if not bool(torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise InputError("weights to equalise have NaN or infinite values")
    if not first.numel() or not second.numel():
        return torch.ones(mid)
    made = first.detach().double().abs().flatten(1).amax(1)  # [mid]
    # [out, own, ...] as [groups, out of a group, own, places]
    parts = second.detach().double().abs().reshape(groups, -1, second.shape[1], _places(second))
    read = parts.amax((1, 3)).flatten()  # [mid]
    scale = (made / read).sqrt().float()
    usable = (made > 0) & (read > 0) & scale.isfinite() & (scale > 0)
    return torch.where(usable, scale, 1.0)


def equalize(pair: Pair, scale: Tensor | None = None, groups: int = 1) -> Pair:
    """The pair with its channels divided and multiplied back; the arguments stay as they are.

    Args:
        pair: two layers in a row.
        scale: [mid], above 0; `factors` without it.
        groups: of the second layer.

    Raises:
        InputError: as `factors`, or factors that do not fit.
    """
    found = factors(pair.first, pair.second, groups)
    scale = found if scale is None else scale.to(found.dtype)
    if scale.shape != found.shape or not bool((scale.isfinite() & (scale > 0)).all()):
        raise InputError(
            "factors of an equalisation", got=tuple(scale.shape),
            allowed=f"[{len(found)}], finite and above 0",
        )  # fmt: skip
    tail = [1] * (pair.first.ndim - 1)
    first = pair.first / scale.reshape(-1, *tail)
    bias = None if pair.bias is None else pair.bias / scale
    # Each output reads its own group's channels.
    own = scale.reshape(groups, -1).repeat_interleave(len(pair.second) // groups, 0)
    second = pair.second * own.reshape(*pair.second.shape[:2], *[1] * (pair.second.ndim - 2))
    return Pair(first.to(pair.first.dtype), bias, second.to(pair.second.dtype))


def clips(scale: Tensor, top: float = 6.0) -> Tensor:
    """Where ReLU6 clips each divided channel, [mid]: top / s."""
    return top / scale


def correct_bias(bias: Tensor | None, weight: Tensor, quantized: Tensor, mean: Tensor) -> Tensor:
    """The bias that gives quantized weights the mean output of the original ones.

    Args:
        bias: [out], None for none.
        weight: [out, in, ...].
        quantized: of the same shape.
        mean: E[x], [in, ...] as a row of the weight, or [in], the same at every place of a kernel.
            A convolution that pads reads zeros at its edges: there the mean is a little less.

    Returns:
        [out], in the type of the weight.

    Raises:
        InputError: shapes that do not fit, NaN or infinite values.
    """
    row = weight.shape[1:]
    if weight.ndim < 2 or quantized.shape != weight.shape:
        raise InputError(
            "a quantized weight", got=tuple(quantized.shape), allowed=tuple(weight.shape)
        )
    if mean.shape not in (row, row[:1]) or (bias is not None and bias.shape != weight.shape[:1]):
        raise InputError("mean inputs, or a bias", got=tuple(mean.shape), allowed=tuple(row))
    error = quantized.double() - weight.double()
    if not bool(error.isfinite().all() and mean.isfinite().all()):
        raise InputError("weights or mean inputs have NaN or infinite values")
    wide = mean.double().reshape(*mean.shape, *[1] * (len(row) - mean.ndim)).expand(row)
    moved = (error * wide).flatten(1).sum(1)  # [out]
    start = moved.new_zeros(len(moved)) if bias is None else bias.detach().double()
    return (start - moved).to(weight.dtype)


def _places(weight: Tensor) -> int:
    """Of a kernel; 1 of a matrix."""
    return weight[0, 0].numel()
