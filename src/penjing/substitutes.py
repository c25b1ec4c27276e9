"""Modules that stand where something was cut: patches, and zeros in place of half a block."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from penjing.recipe import Nothing, Patch

__all__ = ["LowRank", "Zeros", "patch_after", "patch_before", "placed"]


class LowRank(nn.Module):
    """y = x + up inner x + bias."""

    def __init__(self, width: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.inner = nn.Linear(width, rank, bias=False, device=device)
        self.up = nn.Linear(rank, width, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.inner(x))  # type: ignore[no-any-return]


class Zeros(nn.Module):
    """Gives zeros for whatever comes, see `Nothing`."""

    def __init__(self, nothing: Nothing) -> None:
        super().__init__()
        self.width, self.more = nothing.width, nothing.more

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        zeros = x.new_zeros(*x.shape[:-1], self.width)
        return zeros if self.more is None else (zeros, *[None] * self.more)


def placed(patch: Any, position: Literal["before", "after"]) -> Patch:
    """The patch that a module is."""
    if isinstance(patch, nn.Linear):
        return Patch(patch.weight.data, patch.bias.data, position)
    return Patch(patch.up.weight.data, patch.up.bias.data, position, patch.inner.weight.data)


def patch_before(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Hook that patches what comes."""
    patch: nn.Module = block.penjing_before  # type: ignore[assignment]
    if args:
        return (patch(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": patch(kwargs["hidden_states"])}


def patch_after(block: nn.Module, args: Any, output: Any) -> Any:
    """Hook that patches what a block gives."""
    patch: nn.Module = block.penjing_after  # type: ignore[assignment]
    if isinstance(output, tuple):
        return (patch(output[0]), *output[1:])
    return patch(output)
