"""Gates in a network: numbers that multiply weights, or what blocks add to what enters them.

    weight = gate * weight        block(x) = x + gate (block(x) - x)

A gate of 1 changes nothing; of 0 the weight is not there, or the block passes on what it gets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing.model import Model, parent_of

__all__ = ["Gates"]

# Of all gates [n], what a parameter is multiplied by, broadcast to its shape.
Spread = Callable[[Tensor], Tensor]


class Gates:
    """All gates of a network.

    Attributes:
        values: [n], set before each run.

    Args:
        model: a copy that is given up afterwards; its gated parameters stay so.
    """

    def __init__(self, model: Model) -> None:
        self.values = torch.empty(0)
        self._model = model
        self._tied = {name: group for group in model.tied() for name in group}

    def on_parameter(self, name: str, spread: Spread) -> None:
        """Gates on a parameter, under all its names."""
        product = _Product(self, spread)
        for other in self._tied.get(name, (name,)):
            holder, own = parent_of(self._model.module, other)
            parametrize.register_parametrization(holder, own, product, unsafe=True)

    def on_block(self, path: str, number: int) -> None:
        """One gate on the difference that a block makes."""

        def mix(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            x = args[0] if args else kwargs["hidden_states"]
            first = output[0] if isinstance(output, tuple) else output
            mixed = x + self.values[number].to(first) * (first - x)
            return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

        self._model.module.get_submodule(path).register_forward_hook(mix, with_kwargs=True)


class _Product(nn.Module):
    def __init__(self, gates: Gates, spread: Spread) -> None:
        super().__init__()
        self._gates, self._spread = gates, spread

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self._spread(self._gates.values).to(weight)
