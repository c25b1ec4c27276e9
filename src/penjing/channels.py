"""Which layers write and read the same channels, found by running the network once.

A set of tensors shares channels when the operations between them let a positive factor of each
channel through, f(s x) = s f(x): additions, ReLU and leaky ReLU, padding with zeros, pooling,
means over places, views that keep the channels apart. Layers whose outputs are in the set write
it, layers whose inputs are in it read it, and

    writers W -> W / s,  b -> b / s;   readers W -> W s

leaves the network as it was. A set with any other operation at it (ReLU6, GELU, a product of two
tensors), with an input or the output of the network, or with a layer that runs twice, is not free
and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from penjing.model import Model
from penjing.tensorsets import TensorSets

__all__ = ["Channels", "shared_channels"]

_AFTER_EACH_OTHER = {
    "relu", "leaky_relu", "alias", "detach", "clone", "add", "constant_pad_nd", "mean",
    "max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "view", "_unsafe_view",
    "reshape", "squeeze",
}  # fmt: skip


@dataclass(frozen=True)
class Channels:
    """One set.

    Attributes:
        count: channels.
        writers: paths of the layers that write them, in the order they run.
        readers: paths of the layers that read them, likewise.
    """

    count: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]


def shared_channels(model: Model) -> list[Channels]:
    """The free sets with at least one writer and one reader, in the order of their writers.

    Layers are `nn.Conv2d` and, behind the places, `nn.Linear`.
    """
    watch = _Watch()
    handles = []
    for name, module in model.module.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_pre_hook(watch.enter(name), prepend=True))
            handles.append(module.register_forward_hook(watch.leave(name)))
    inputs = [x for x in model.example.values() if isinstance(x, Tensor)]
    try:
        with torch.no_grad(), watch:
            output = model.run(model.example)
    finally:
        for handle in handles:
            handle.remove()
    for tensor in (*inputs, output):
        watch.close(tensor)
    owners: dict[int, list[str]] = {}
    for name, parameter in model.module.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.rpartition(".")[0])
    for names in owners.values():  # a weight that two layers share
        for name in names if len(names) > 1 else ():
            watch.freeze(name)
    return watch.found()


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tensors of one run, joined where channels pass from one to the other."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sets = TensorSets("nothing that was seen made it: a constant, or an input")
        self._inside: str | None = None
        self._writes: list[tuple[str, Tensor]] = []
        self._reads: list[tuple[str, Tensor]] = []

    def close(self, tensor: Tensor) -> None:
        """Its channels must stay as they are."""
        self._sets.close(tensor, "it must stay as it is")

    def freeze(self, name: str) -> None:
        """The layer must stay as it is."""
        for layer, tensor in (*self._writes, *self._reads):
            if layer == name:
                self.close(tensor)

    def enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._sets.top(args[0])
            self._reads.append((name, args[0]))
            self._inside = name

        return hook

    def leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._inside = None
            self._sets.new(output)
            self._writes.append((name, output))
            flat = isinstance(module, nn.Linear)
            for tensor in (args[0], output):
                if tensor.ndim != (2 if flat else 4):
                    self.close(tensor)

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._inside is not None:  # the layer as a whole is known
            return result
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        passes = _passes(func, args, given, made)
        for tensor in given:
            self._sets.top(tensor)
        for tensor in made:
            self._sets.new(tensor)
        if passes:
            for tensor in given:
                self._sets.join(made[0], tensor)
        else:
            for tensor in (*given, *made):
                self.close(tensor)
        return result

    def found(self) -> list[Channels]:
        """What is free."""
        names = [[n for n, _ in side] for side in (self._writes, self._reads)]
        for name in {n for n in names[0] if names[0].count(n) > 1}:
            self.freeze(name)
        sets: dict[int, tuple[list[str], list[str]]] = {}
        widths: dict[int, int] = {}
        for index, side in enumerate((self._writes, self._reads)):
            for name, tensor in side:
                top = self._sets.top(tensor)
                if not self._sets.reason(top):
                    sets.setdefault(top, ([], []))[index].append(name)
                    widths[top] = tensor.shape[1]
        return [Channels(widths[t], tuple(w), tuple(r)) for t, (w, r) in sets.items() if w and r]


def _passes(func: Any, args: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether a factor of each channel passes from all of `given` to the first of `made`."""
    name = func.overloadpacket.__name__.removesuffix("_") if func is not None else ""
    if name not in _AFTER_EACH_OTHER or not given or not made:
        return False
    result = made[0]
    if any(x.ndim < 2 or x.shape[1] != result.shape[1] for x in (*given, result) if x.ndim):
        return False
    if any(not x.ndim for x in given) or result.ndim < 2:
        return False
    if name == "add":  # of two tensors; a number added is no factor
        return len(given) == 2 and all(x.shape[2:] == result.shape[2:] for x in given)
    if name == "constant_pad_nd":  # of places, with zeros
        return len(args[1]) <= 2 * (result.ndim - 2) and (len(args) < 3 or args[2] == 0)
    if name == "mean":
        return len(args) > 1 and not {0, 1, -given[0].ndim, 1 - given[0].ndim} & set(args[1])
    if name in ("view", "_unsafe_view", "reshape", "squeeze"):
        # Rows and channels first, as they were.
        return bool(given[0].shape[:2] == result.shape[:2])
    return True
