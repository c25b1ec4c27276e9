"""Low-rank adaptation: a matrix moves by a product of two thin ones, merged at the end.

    w' = w + mask * (B A),   B [out, rank] begins at 0,  A [rank, in]

(LoRA, Hu et al., arXiv 2106.09685). Removed connections stay removed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing.model import Model, parent_of

__all__ = ["LowRank", "adapt"]


class LowRank(nn.Module):
    """A parametrization of a weight [out, ...].

    Args:
        weight: where training starts.
        rank: of what is added.
        mask: kept connections, of the weight's shape, or None.
    """

    mask: Tensor | None

    def __init__(self, weight: Tensor, rank: int, mask: Tensor | None) -> None:
        super().__init__()
        out, inputs = weight.flatten(1).shape
        self.a = nn.Parameter(torch.randn(rank, inputs) / inputs**0.5)
        self.b = nn.Parameter(torch.zeros(out, rank))
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight and what was added to it."""
        more = (self.b @ self.a).reshape(weight.shape)
        return weight + (more if self.mask is None else more * self.mask)


def adapt(model: Model, names: list[str], rank: int) -> dict[str, LowRank]:
    """Make matrices of `model` computed from themselves and trainable factors.

    Args:
        model: a copy that is given up afterwards.
        names: of parameters with two dimensions or more.
        rank: at most that of the matrix.

    Returns:
        By name; weights that an embedding holds, and those smaller than their factors would be,
        are left out.
    """
    tied = {name: group for group in model.tied() for name in group}
    made = {}
    for name in names:
        holders = [parent_of(model.module, other) for other in tied.get(name, (name,))]
        weight = model.module.get_parameter(name)
        out, inputs = weight.flatten(1).shape
        if rank * (out + inputs) >= weight.numel():
            continue
        if any(isinstance(holder, nn.Embedding) for holder, _ in holders):
            continue
        made[name] = LowRank(weight, rank, model.masks.get(name))
        for holder, own in holders:
            parametrize.register_parametrization(holder, own, made[name], unsafe=True)
    return made
