"""Blocks that for a while give something else than what they compute.

A cut can be tried without being made: the blocks that would go hand on what comes, or what a patch
makes of it, and the blocks before them need not run when what reaches the gap is known.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from penjing.graph import given
from penjing.model import Batch, Model

__all__ = ["Detours", "Passed", "Way", "silent", "zeros"]

# What a block gives of the hidden state that comes; None to hand it on.
Way = Callable[[Tensor], Tensor] | None


class Passed:
    """The hidden states of one run: what entered each block and what it gave, by its index."""

    def __init__(self) -> None:
        self.entered: dict[int, Tensor] = {}
        self.left: dict[int, Tensor] = {}


class Detours:
    """Runs of a network with some blocks left out.

    Args:
        model: stays as it is.
        sample: a small batch, to see once what blocks give besides the hidden state.
    """

    def __init__(self, model: Model, sample: Batch) -> None:
        self.model = model
        self._blocks = [model.module.get_submodule(path) for path in model.blocks]
        self._more: dict[int, int] = {}  # of blocks that give a tuple, its further members

        def see(_: nn.Module, args: Any, output: Any, index: int) -> None:
            if isinstance(output, tuple):
                self._more[index] = len(output) - 1

        with self._hooks(lambda m, a, o, i: see(m, a, o, i)), torch.no_grad():
            model.run(sample)

    @contextlib.contextmanager
    def _hooks(self, leave: Any, enter: Any = None) -> Iterator[None]:
        handles = []
        for index, block in enumerate(self._blocks):
            if enter is not None:  # prepended: before a patch of an earlier cut
                handles.append(block.register_forward_pre_hook(
                    lambda m, a, k, i=index: enter(a, k, i), with_kwargs=True, prepend=True
                ))  # fmt: skip
            handles.append(block.register_forward_hook(lambda m, a, o, i=index: leave(m, a, o, i)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(
        self, batch: Batch, ways: Mapping[int, Way], passed: Passed | None = None,
        without: Iterable[str] = (), slopes: bool = False,
    ) -> Tensor:  # fmt: skip
        """The network's output where blocks give `ways` of what comes.

        Args:
            batch: as `Model.run` takes it.
            ways: by index of a block; its own hooks do not run.
            passed: gets the hidden states of this run.
            without: paths of layers that give zeros.
            slopes: for training: the output can be differentiated.
        """

        def enter(args: Any, kwargs: Any, index: int) -> None:
            if passed is not None:
                passed.entered[index] = _hidden(args, kwargs)

        def leave(_: nn.Module, args: Any, output: Any, index: int) -> None:
            if passed is not None:
                passed.left[index] = output[0] if isinstance(output, tuple) else output

        with torch.set_grad_enabled(slopes), contextlib.ExitStack() as stack:
            for index, way in ways.items():
                stack.enter_context(self._instead(index, way))
            stack.enter_context(self._hooks(leave, enter))
            stack.enter_context(silent(self.model.module, without))
            return self.model.run(batch)

    @contextlib.contextmanager
    def _instead(self, index: int, way: Way) -> Iterator[None]:
        block = self._blocks[index]

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = _hidden(args, kwargs)
            made = hidden if way is None else way(hidden)
            more = self._more.get(index)
            return made if more is None else (made, *[None] * more)

        kept = {name: vars(block)[name] for name in ("_forward_hooks", "_forward_pre_hooks")}
        own = vars(block).get("forward")
        block.forward = forward
        for name in kept:
            setattr(block, name, OrderedDict())
        try:
            yield
        finally:
            for name, hooks in kept.items():
                setattr(block, name, hooks)
            if own is None:
                del block.forward
            else:
                block.forward = own


def _hidden(args: Any, kwargs: Any) -> Tensor:
    return given(args, {}) if args else kwargs["hidden_states"]


@contextlib.contextmanager
def silent(module: nn.Module, paths: Iterable[str]) -> Iterator[None]:
    """Layers, by path inside a module, give zeros for a while."""
    handles = [module.get_submodule(path).register_forward_hook(zeros) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def zeros(_: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Hook of a layer that gives zeros."""
    return torch.zeros_like(output)
