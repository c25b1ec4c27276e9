"""One recorded call of a block: its hidden state, and everything else it was given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Call", "record"]


@dataclass
class Call:
    """A block's input.

    Attributes:
        hidden: [batch, length, width], or whatever the block takes first.
        args, kwargs: everything else, as the network gave it.
        named: the hidden state was given as `hidden_states=`.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool

    @torch.no_grad()
    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The hidden state that `block` makes of `hidden`."""
        return self.forward(block, hidden)

    def forward(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The same, for gradients."""
        if self.named:
            output = block(*self.args, **(self.kwargs | {"hidden_states": hidden}))
        else:
            output = block(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]

    def free(self) -> None:
        """Forget the hidden state; a view of it would keep its memory."""
        self.hidden = self.hidden.new_empty(0)

    def empty(self) -> Call:
        """The call without its hidden state."""
        return replace(self, hidden=self.hidden.new_empty(0))

    def first(self, batch: int, length: int) -> Call:
        """The call on the first samples and positions, for probing.

        Of the other arguments, a dimension as large as the batch or the length is cut with it:
        masks [batch, 1, length, length] and [batch, length], positions [batch or 1, length, ...],
        [length].
        """
        samples, places = self.hidden.shape[:2]

        def cut(value: Tensor) -> Tensor:
            if value.ndim == 1:
                short = length if value.shape[0] == places else batch
                return value[:short] if value.shape[0] in (samples, places) else value
            if value.ndim and value.shape[0] == samples:
                value = value[:batch]
            for dim in range(1, value.ndim):
                if value.shape[dim] == places and (dim == 1 or value.ndim == 4):
                    value = value.narrow(dim, 0, min(length, places))
            return value

        return self._mapped(cut)

    def samples(self, rows: slice) -> Call:
        """The call on some of the samples: what has as many as the hidden state is cut with it.

        A vector as long as the samples are is one of positions.
        """
        count, places = (*self.hidden.shape, 0)[:2]

        def cut(value: Tensor) -> Tensor:
            vector = value.ndim == 1 and count == places
            return value[rows] if value.ndim and len(value) == count and not vector else value

        return self._mapped(cut)

    def double(self) -> Call:
        """The call with every float tensor in float64."""
        return self._mapped(lambda t: t.double() if t.is_floating_point() else t)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        def visit(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(visit(v) for v in value)
            return change(value) if isinstance(value, Tensor) else value

        kwargs = {name: visit(value) for name, value in self.kwargs.items()}
        return Call(change(self.hidden), tuple(visit(a) for a in self.args), kwargs, self.named)


def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The call that a block got.

    A key-value cache is left out: it would grow with every run of the block.
    """
    args = tuple(None if _is_cache(a) else a for a in args)
    kwargs = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
    if args:
        return Call(args[0], args[1:], kwargs, named=False)
    hidden = kwargs.pop("hidden_states")
    return Call(hidden, (), kwargs, named=True)


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length") and hasattr(value, "update")
