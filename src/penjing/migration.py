"""Migration: difficulty moves from a layer's inputs into its weights, channel by channel.

    x W^T = (x / s) (W s)^T,    s_j = p_j^alpha / w_j^(1 - alpha), over its geometric mean

with p_j the largest input of channel j and w_j its largest weight over all layers that read
the input (Xiao et al., SmoothQuant, arXiv 2211.10438). Channels that calibration hardly woke
get p_j = floor * rms(p) at the least: other data will wake them, and a tiny s_j would clip.

For weights alone (Lin et al., AWQ, arXiv 2306.00978) it goes the other way: a weight of a large
input is multiplied so that its rounding counts less,

    argmin over a of  sum over layers of tr(E H E^T),  E = Q(W s) / s - W,  s_j = norm_j^a

over the geometric mean. No multiplication is left at run time only where what makes the input can
hold 1 / s: the weight of a norm, rows of a layer before that is linear up to there
(`penjing.channels`). One channel may be several columns of a matrix: the places of a kernel, the
heads that share a head of values.
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
    grams: Sequence[Tensor],
    weights: Sequence[Tensor],
    quantize: Callable[[Tensor, Tensor], Tensor],
    steps: int = 20,
    columns: Sequence[Tensor] = (),
) -> Tensor:
    """AWQ's divisors of the channels that some layers read, float32 [channels], geometric mean 1.

    Args:
        grams: H [in, in] of each layer, mean outer product of its input.
        weights: [out, in] of each layer.
        quantize: (W s, H over s by rows and columns) to what the stored weight is, [out, in].
        steps: powers a tried, 0 to 1 - 1 / steps. With 0 nothing is divided: of equals it wins,
            and no result has more error than it.
        columns: int64 [in] of each layer, the channel that each column reads; its own number
            without.

    Raises:
        InputError: widths that do not agree, or values that are not finite.
    """
    columns = columns or [torch.arange(w.shape[-1]) for w in weights]
    _check(grams, weights, columns)
    count = 1 + max(int(own.max()) for own in columns)
    power, times = torch.zeros(count, dtype=torch.float64), torch.zeros(count)
    for gram, own in zip(grams, columns, strict=True):
        power.index_add_(0, own, gram.diagonal().double().clamp_min(0))
        times.index_add_(0, own, torch.ones(len(own)))
    log = _log((power / times.clamp_min(1)).sqrt())  # [channels]
    # In units of the largest, so that float32 does; the sum over layers stays one of errors.
    unit = max(float(g.diagonal().max()) for g in grams) or 1.0
    held = [(gram.double() / unit).float() for gram in grams]
    best, least = torch.ones(count), torch.inf
    for step in range(steps):
        ratio = log * (step / steps)
        scale = (ratio - ratio.mean()).exp().float()  # [channels]
        total = 0.0
        for gram, near, weight, own in zip(grams, held, weights, columns, strict=True):
            s = scale[own]  # [in]
            seen = gram / torch.outer(s, s).double()
            off = quantize(weight * s, seen) / s - weight
            total += float(((off @ near) * off).double().sum())
        if total < least:
            best, least = scale, total
    return best


def _check(grams: Sequence[Tensor], weights: Sequence[Tensor], columns: Sequence[Tensor]) -> None:
    for gram in grams:
        if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
            raise InputError("a Gram matrix", got=tuple(gram.shape), allowed="[in, in]")
        if not bool(torch.isfinite(gram).all()):
            raise InputError("a Gram matrix has NaN or infinite values")
    widths, numbers = [len(gram) for gram in grams], [len(own) for own in columns]
    fits = [w.ndim == 2 and len(w) > 0 and w.shape[1] > 0 for w in weights]
    if not weights or not all(fits) or [w.shape[1] for w in weights] != widths:
        got = [tuple(w.shape) for w in weights]
        raise InputError("weights of a migration", got=got, allowed=f"[out, in] with in {widths}")
    if numbers != widths:
        raise InputError("columns of a migration", got=numbers, allowed=widths)
    if not all(bool(torch.isfinite(w).all()) for w in weights):
        raise InputError("inputs or weights of a migration are NaN or infinite")


def _log(size: Tensor) -> Tensor:
    """Of sizes over the largest one; zeros where there is nothing at all."""
    if not size.numel() or not float(size.max()):
        return torch.zeros_like(size)
    return (size / size.max()).clamp_min(_TINY).log()


def input_scales(low: Tensor, high: Tensor) -> Tensor:
    """The largest absolute value of each channel, [in], from its range."""
    return torch.maximum(low.abs(), high.abs())
