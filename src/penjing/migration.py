"""Migration: difficulty moves from a layer's inputs into its weights, channel by channel.

    x W^T = (x / s) (W s)^T,    s_j = p_j^alpha / w_j^(1 - alpha), over its geometric mean

with p_j the largest input of channel j and w_j its largest weight over all layers that read
the input (Xiao et al., SmoothQuant, arXiv 2211.10438). Channels that calibration hardly woke
get p_j = floor * rms(p) at the least: other data will wake them, and a tiny s_j would clip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.errors import InputError

__all__ = ["divisors", "input_scales"]

# Least input or weight of a channel, relative to the largest of all.
_TINY = 1e-5


def divisors(peak: Tensor, weights: list[Tensor], alpha: float = 0.9, floor: float = 0.5) -> Tensor:
    """What each input channel is divided by, float32 [in], geometric mean 1.

    Args:
        peak: [in], largest absolute input of each channel.
        weights: [out, in] each, of every layer that reads the input.
        alpha: 0 takes the weights alone into account, 1 the inputs alone.
        floor: least peak of a channel, relative to the root mean square of all.

    Raises:
        InputError: widths that do not agree, or values that are not finite.
    """
    fits = (w.ndim == 2 and len(w) and w.shape[1] == len(peak) for w in weights)
    if not weights or not all(fits):
        got = [tuple(w.shape) for w in weights]
        raise InputError("weights of a migration", got=got, allowed=f"[out, {len(peak)}]")
    widest = torch.stack([w.abs().amax(0) for w in weights]).amax(0).double()  # [in]
    peak = peak.double()
    if not bool(torch.isfinite(peak).all() and torch.isfinite(widest).all()):
        raise InputError("inputs or weights of a migration are NaN or infinite")
    least = floor * peak.square().mean().sqrt()
    peak = torch.maximum(peak, least)
    ratio = alpha * _log(peak) - (1 - alpha) * _log(widest)
    return (ratio - ratio.mean()).exp().float()


def _log(size: Tensor) -> Tensor:
    """Of sizes over the largest one; zeros where there is nothing at all."""
    if not size.numel() or not float(size.max()):
        return torch.zeros_like(size)
    return (size / size.max()).clamp_min(_TINY).log()


def input_scales(low: Tensor, high: Tensor) -> Tensor:
    """The largest absolute value of each channel, [in], from its range."""
    return torch.maximum(low.abs(), high.abs())
