"""Inputs and outputs of layers rounded to the grids that runtimes use, by hooks.

What is measured is what is shipped: the torch module rounds where the exported file does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from penjing.graph import given
from penjing.recipe import ActivationRange

__all__ = ["round_input", "round_output", "rounded"]


def round_input(layer: nn.Module, found: ActivationRange) -> None:
    """Round what `layer` is given from now on; a range that it had goes."""
    if not hasattr(layer, "penjing_range"):
        layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    layer.penjing_range = found  # type: ignore[assignment]


def round_output(layer: nn.Module, found: ActivationRange) -> None:
    """Round what `layer` gives from now on; a range that it had goes."""
    if not hasattr(layer, "penjing_output"):
        layer.register_forward_hook(_quantize_output)
    layer.penjing_output = found  # type: ignore[assignment]


def _quantize_input(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    found: ActivationRange | None = layer.penjing_range  # type: ignore[assignment]
    if found is None:
        return None
    return (rounded(given(args, kwargs), found), *args[1:]), kwargs if args else {}


def _quantize_output(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return rounded(output, layer.penjing_output)  # type: ignore[arg-type]


def rounded(x: Tensor, found: ActivationRange) -> Tensor:
    """x [..., in] over its channels' divisors, on the grid of a range."""
    if found.channels is not None:
        x = x / found.channels.to(x)
    scale, zero = torch.tensor(found.scale), torch.tensor(float(found.zero_point))
    if found.scale == 0:
        low, high = x.amin().clamp_max(0), x.amax().clamp_min(0)
        scale = ((high - low) / 255).clamp_min(1e-12)
        zero = torch.round(-low / scale)
    grid = torch.clamp(torch.round(x / scale.to(x)) + zero.to(x), 0, 255)
    made = (grid - zero.to(x)) * scale.to(x)
    if x.requires_grad and torch.is_grad_enabled():
        # Rounding has no slope; training goes straight through it.
        return x + (made - x).detach()
    return made
