"""Runs of a block, or of the whole network, that stop before some of its layers.

All batches go as far as a layer, the layer is edited, and they go on from there: everything is run
once, and later layers see what the edits before them give. A run under way keeps what Python keeps
of it, no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from penjing.graph import given

__all__ = ["Paused", "paused"]


class Paused:
    """One run, under way.

    Args:
        run: gives a tensor.

    Attributes:
        output: that tensor, once it is through.
    """

    def __init__(self, run: Callable[[], Tensor]) -> None:
        self._task = _Task(run)
        self._place = -1  # of the layer that it stands before
        self._input: Tensor | None = None
        self.output: Tensor | None = None

    def until(self, place: int) -> Tensor | None:
        """Go on to layer number `place`; its input, None where the run does not reach it."""
        while self.output is None and self._place < place:
            self._go()
        return self._input if self._place == place else None

    def finish(self) -> Tensor:
        """Go on to the end; the run's tensor."""
        while self.output is None:
            self._go()
        return self.output

    def close(self) -> None:
        """Give up the run."""
        self._input = None
        self._task.throw()

    def _go(self) -> None:
        self._input = None
        # Here and not inside: the mode belongs to the thread, which all runs share.
        with torch.no_grad():
            modes = _modes()
            found = self._task.switch()
        if _modes() != modes:
            self.close()
            raise RuntimeError("a run was stopped within torch.autocast")
        if self._task.dead:
            self.output = found
        else:
            self._place, self._input = found


class _Task(greenlet):
    pass


def _modes() -> list[object]:
    """What belongs to the thread, and a run under way would change for all others."""
    kinds = ("cpu", "cuda")
    return [(torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds]


@contextmanager
def paused(
    layers: Sequence[nn.Module], runs: Sequence[Callable[[], Tensor]]
) -> Iterator[list[Paused]]:
    """Runs that stop before each of `layers`, which are numbered in the order they run."""
    handles = [
        layer.register_forward_pre_hook(partial(_stop, place=place), with_kwargs=True)
        for place, layer in enumerate(layers)
    ]
    found = [Paused(run) for run in runs]
    try:
        yield found
    finally:
        for one in found:
            one.close()
        for handle in handles:
            handle.remove()


def _stop(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], place: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    own = getcurrent()
    if not isinstance(own, _Task) or own.parent is None:
        return args, kwargs
    known = set(layer._forward_pre_hooks)
    own.parent.switch((place, given(args, kwargs)))
    # The list of hooks was read before the stop, and an edit may have added one since.
    for key, hook in layer._forward_pre_hooks.items():
        if key in known:
            continue
        named = key in layer._forward_pre_hooks_with_kwargs
        changed = hook(layer, args, kwargs) if named else hook(layer, args)
        if changed is not None:
            args, kwargs = changed if named else (changed, kwargs)
    return args, kwargs
