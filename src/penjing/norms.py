"""Norms over the last dimension: what they multiply by, found by what they compute.

    y = gain * x / rms(x) + bias

with x - mean(x) in place of x in a layer norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Gain", "gain_of"]


@dataclass(frozen=True, eq=False)
class Gain:
    """Of a norm: gain * x / rms(x) + bias.

    Attributes:
        gain: [width].
        bias: [width], or None.
        neutral: the norm's weight [width] that stands for a gain of one.
        centred: whether it takes away the mean of x first.
    """

    gain: Tensor
    bias: Tensor | None
    neutral: Tensor
    centred: bool


def gain_of(module: nn.Module) -> Gain | None:
    """What a norm over the last dimension multiplies by; None for what is no such norm.

    Root-mean-square norms are known by what they compute: gains that are the one parameter, or one
    more than it.
    """
    parameters = list(module.parameters())
    if isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) != 1 or not parameters:
            return None
        bias = None if module.bias is None else module.bias.detach()
        gain = module.weight.detach()
        return Gain(gain, bias, torch.ones_like(gain), centred=True)
    single = len(parameters) == 1 and parameters[0].ndim == 1 and not list(module.children())
    if not single or isinstance(module, nn.modules.batchnorm._NormBase | nn.PReLU):
        return None
    weight = parameters[0].detach()
    generator = torch.Generator().manual_seed(0)
    # Large, so that what is added to the mean square does not show.
    x = 100 * torch.randn(4, 8, len(weight), generator=generator).to(weight)
    try:
        with torch.no_grad():
            y = module(x)
    except Exception:  # a module of another kind
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    unit = x / x.square().mean(-1, keepdim=True).sqrt()
    for gain, neutral in ((weight, torch.ones_like), (1 + weight, torch.zeros_like)):
        if torch.allclose(y, unit * gain, rtol=1e-3, atol=1e-3 * float(y.abs().max())):
            return Gain(gain, None, neutral(weight), centred=False)
    return None
