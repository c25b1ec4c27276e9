"""Migration: difficulty moves from a layer's inputs into its weights, channel by channel.

    x W^T = (x / s) (W s)^T,    s_j = p_j^alpha / w_j^(1 - alpha), over its geometric mean

with p_j the largest input of channel j and w_j its largest weight over all layers that read
the input (Xiao et al., SmoothQuant, arXiv 2211.10438). Channels that calibration hardly woke
get p_j = floor * rms(p) at the least: other data will wake them, and a tiny s_j would clip.

For weights alone (Lin et al., AWQ, arXiv 2306.00978) it goes the other way: a weight of a large
input is multiplied so that its rounding counts less,

    argmin over a of  sum over layers of tr(E H E^T),  E = Q(W s) / s - W,  s_j = norm_j^a

over the geometric mean. No multiplication is left at run time only where what makes the input can
hold 1 / s: the weight of a norm, rows of a layer before that is linear up to there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from penjing.errors import InputError

__all__ = ["activation_aware", "divisors", "input_scales"]

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


def activation_aware(
    gram: Tensor,
    weights: Sequence[Tensor],
    quantize: Callable[[Tensor, Tensor], Tensor],
    steps: int = 20,
) -> Tensor:
    """AWQ's divisors of the input channels, float32 [in], geometric mean 1.

    Args:
        gram: H [in, in], mean outer product of the input.
        weights: [out, in] each, of every layer that reads the input.
        quantize: (W s, H over s by rows and columns) to what the stored weight is, [out, in].
        steps: powers a tried, 0 to 1 - 1 / steps. With 0 nothing is divided: of equals it wins,
            and no result has more error than it.

    Raises:
        InputError: widths that do not agree, or values that are not finite.
    """
    gram = gram.double()
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise InputError("a Gram matrix", got=tuple(gram.shape), allowed="[in, in]")
    norm = gram.diagonal().clamp_min(0).sqrt()
    # Checks all widths, and that everything is finite.
    best = torch.ones_like(divisors(norm, list(weights), 1.0, 0.0))
    if not bool(torch.isfinite(gram).all()):
        raise InputError("a Gram matrix has NaN or infinite values")
    log, least = _log(norm), torch.inf
    for step in range(steps):
        ratio = log * (step / steps)
        scale = (ratio - ratio.mean()).exp().float()  # [in]
        seen, total = gram / torch.outer(scale, scale).double(), 0.0
        for weight in weights:
            off = (quantize(weight * scale, seen) / scale - weight).double()
            total += float(((off @ gram) * off).sum())
        if total < least:
            best, least = scale, total
    return best


def _log(size: Tensor) -> Tensor:
    """Of sizes over the largest one; zeros where there is nothing at all."""
    if not size.numel() or not float(size.max()):
        return torch.zeros_like(size)
    return (size / size.max()).clamp_min(_TINY).log()


def input_scales(low: Tensor, high: Tensor) -> Tensor:
    """The largest absolute value of each channel, [in], from its range."""
    return torch.maximum(low.abs(), high.abs())
