"""The residual stream of a network: what writes it, and the norms and layers that read it.

Found by running the network once. Tensors whose last dimension is the same channels are one set:
sums, views and copies that leave that dimension alone, products with a number. With an orthogonal
Q on a set, and g the gain of a norm, which moves into what reads it,

    writers W -> Q W, b -> Q b, tables E -> E Q^T;   readers W -> W diag(g) Q^T

leave the network as it was (SliceGPT, Ashkboos et al., arXiv 2401.15024, section 3), as
rms(Q x) = rms(x). A layer norm takes the mean away as well, and agrees with every Q that keeps the
direction of the mean, Q 1 = 1. A norm whose own output is added to the stream (post-norm) does
not: its gain cannot leave. A set with any other operation at it is not free and says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from penjing.model import Model
from penjing.norms import gain_of
from penjing.tensorsets import TensorSets

__all__ = ["Norm", "Residual", "residual_streams"]

_COPIES = {"alias", "detach", "clone", "_to_copy", "slice", "unsqueeze", "squeeze", "expand"}
_POST = "the network normalises after the addition"
_VIEWS = {"view", "_unsafe_view", "reshape"}


@dataclass(frozen=True)
class Norm:
    """A norm that reads a stream, and the linear layers that alone read what it gives."""

    path: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Residual:
    """One stream that at least one norm reads.

    Attributes:
        width: channels.
        writers: paths of the linear layers and embeddings whose outputs are added to it.
        readers: paths of linear layers that read it without a norm.
        norms: what reads it by a norm.
        reason: why it is not free; empty when it is.
    """

    width: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    norms: tuple[Norm, ...]
    reason: str


def residual_streams(model: Model) -> list[Residual]:
    """The streams of a network, in the order of their first norms."""
    watch = _Watch()
    handles = []
    for name, module in model.module.named_modules():
        kind = "layer" if isinstance(module, nn.Linear | nn.Embedding) else ""
        if not kind and gain_of(module) is not None:
            kind = "norm"
        if kind:
            handles.append(module.register_forward_pre_hook(watch.enter(name, kind), prepend=True))
            handles.append(module.register_forward_hook(watch.leave(name, kind)))
    try:
        with torch.no_grad(), watch:
            output = model.run(model.example)
    finally:
        for handle in handles:
            handle.remove()
    watch.close(output, "the network gives it")
    return list(watch.found())


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tensors of one run, joined where their last dimension is the same channels."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sets = TensorSets("a parameter or an input of the network is in it")
        self._inside: str | None = None
        # (path, kind, input, output) of every run of a layer or norm.
        self._runs: list[tuple[str, str, Tensor, Tensor]] = []

    def close(self, tensor: Tensor, reason: str) -> None:
        """Its channels must stay as they are."""
        self._sets.close(tensor, reason)

    def enter(self, name: str, kind: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._inside = name

        return hook

    def leave(self, name: str, kind: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._inside = None
            self._sets.new(output)
            if not args:
                self.close(output, f"{name} is called by keyword")
                return
            self._sets.top(args[0])
            self._runs.append((name, kind, args[0], output))

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._inside is not None:  # the layer as a whole is known
            return result
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__.removesuffix("_")
        joined = _joined(name, args, given, made)
        for tensor in made:
            self._sets.new(tensor)
        for tensor in joined:
            self._sets.join(made[0], tensor)
        if not joined:
            for tensor in (*given, *made):
                self.close(tensor, f"an operation ({name}) reads or makes it")
        return result

    def found(self) -> Iterator[Residual]:
        names = [name for name, *_ in self._runs]
        for name, _, *ends in self._runs:
            if names.count(name) > 1:
                for tensor in ends:
                    self.close(tensor, f"{name} runs more than once")
        tops = [(n, k, self._sets.top(x), self._sets.top(y)) for n, k, x, y in self._runs]
        for top in dict.fromkeys(x for _, kind, x, _ in tops if kind == "norm"):
            reason = self._sets.reason(top)
            norms = []
            for name, kind, x, y in tops:
                if kind == "norm" and y == top:
                    reason = f"what {name} gives is added to it: {_POST}"
                if kind != "norm" or x != top or y == top:
                    continue
                others = [n for n, _, _, made in tops if made == y and n != name]
                others += [n for n, other, given, _ in tops if given == y and other == "norm"]
                if (
                    own := f"{others[0]} is added to it: {_POST}"
                    if others
                    else self._sets.reason(y)
                ):
                    reason = reason or f"what {name} gives stays: {own}"
                after = [n for n, other, given, _ in tops if given == y and other == "layer"]
                norms.append(Norm(name, tuple(after)))
            width = next(x.shape[-1] for _, _, x, _ in self._runs if self._sets.top(x) == top)
            layers = [(n, x, y) for n, kind, x, y in tops if kind == "layer"]
            writers = tuple(n for n, _, y in layers if y == top)
            readers = tuple(n for n, x, _ in layers if x == top)
            yield Residual(width, writers, readers, tuple(norms), reason)


def _joined(name: str, args: Any, given: list[Tensor], made: list[Tensor]) -> list[Tensor]:
    """The tensors of `given` whose channels the first of `made` has; empty where none pass."""
    if not given or not made or not made[0].is_floating_point() or made[0].ndim < 2:
        return []
    result, first = made[0], given[0]
    same = [x for x in given if x.ndim > 1 and x.shape[-1] == result.shape[-1]]
    if name == "add":
        return same if len(same) == len(given) == 2 else []
    if name in ("mul", "div"):  # with a number
        numbers = all(not x.ndim for x in given[1:])
        return [first] if numbers and len(same) > 0 and same[0] is first else []
    if name in _COPIES | _VIEWS and len(given) == 1 and same:
        dim = args[1] if name in ("slice", "unsqueeze", "squeeze") and len(args) > 1 else 0
        last = isinstance(dim, int) and dim in (-1, first.ndim - (name != "unsqueeze"))
        return [] if last else [first]
    return []
