"""Which channels every axis of every tensor carries, followed through one run of a network.

Each axis of each parameter gets labels, one an index. What an operation makes carries the labels
of what it was made from, and operations say which labels live or die together:

    moving (reshape, permute, concatenate, shuffle, ...): done to the labels as it is to the numbers
    element by element: labels that meet are joined
    reducing (sum, softmax, layer norm, ...): labels along the reduced axes are joined
    product with a parameter: its labels along the summed axis join those of the input there, which
        ends them; its other labels go on
    product of two activations: labels along the summed axis are joined
    anything else: what goes in is frozen, with the operation as the reason

A number that has no label and is not the same along an axis (a position, an image's channels) ties
all labels that it meets there: none of them can go alone. So does an axis that is split in two:
one part of it shrinks, the other stays. Nothing is known of the network but the operations that it
runs, and those it really runs: no export is needed.

A tensor has several fields of labels where more than one of its axes carries channels. A field has
the tensor's number of axes, with length 1 where it does not change.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from penjing.labels import Labels, narrowed

__all__ = ["Axes", "Axis", "Call", "Rule", "Seen", "Watch"]

Fields = tuple[Tensor, ...]


@dataclass(frozen=True)
class Axis:
    """An axis of a parameter or buffer: its labels are first to first + length - 1."""

    name: str
    dim: int
    first: int
    length: int


@dataclass(frozen=True)
class Seen:
    """What is known of a tensor.

    Attributes:
        fields: of labels.
        stored: whether it was made of parameters and buffers alone.
    """

    fields: Fields = ()
    stored: bool = False


@dataclass
class Axes:
    """What was found.

    Attributes:
        labels: and their sets.
        axes: of all parameters and buffers that were used.
        summed: numbers (in `axes`) of those along which products are summed.
        splits: labels of tensors whose axis became several, [..., parts, ...].
    """

    labels: Labels = field(default_factory=Labels)
    axes: list[Axis] = field(default_factory=list)
    summed: set[int] = field(default_factory=set)
    splits: list[Tensor] = field(default_factory=list)

    def settle(self) -> None:
        """Of axes that were split, one part shrinks: the last one along which something can."""
        again = True
        while again:
            again = False
            for parts in self.splits:
                roots = self.labels.roots(parts)
                vary = [d for d in range(parts.ndim)
                        if bool((roots != roots.narrow(d, 0, 1)).any())]  # fmt: skip
                for dim in vary[:-1]:
                    self.labels.tie(parts, dim)
                    again = True


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Labels of the tensors of one run.

    Args:
        module: whose parameters and buffers have channels.
        rule_of: gives what to do for an operation.
    """

    def __init__(self, module: nn.Module, rule_of: Callable[[Any], Rule]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rule_of = rule_of
        self.found = Axes()
        self.own = self.found.labels
        # A buffer that is not saved is made again from the configuration, at its full size.
        saved = module.state_dict(keep_vars=True)
        self._firsts: list[int] = []
        self._stored: dict[int, str] = {}
        for name, tensor in saved.items():  # of a tied one the first name
            self._stored.setdefault(id(tensor), name)
        self._seen: Any = WeakTensorKeyDictionary()
        self._own = {id(x) for x in (*module.parameters(), *module.buffers())}
        self._fixed: Any = WeakTensorKeyDictionary()

    def seen(self, tensor: Tensor) -> Seen:
        """What is known of a tensor."""
        known: Seen | None = self._seen.get(tensor)
        if known is None:
            known = Seen()
            name = self._stored.get(id(tensor))
            if name is not None and tensor.is_floating_point():
                known = self._new(name, tensor)
            self._seen[tensor] = known
        return known

    def fixed(self, tensor: Tensor) -> bool:
        """Whether a tensor is the same with all inputs."""
        return id(tensor) in self._own or tensor in self._fixed

    def _new(self, name: str, tensor: Tensor) -> Seen:
        fields = []
        for dim, length in enumerate(tensor.shape):
            if length > 1:
                labels = self.own.new(length)
                self.found.axes.append(Axis(name, dim, int(labels[0]), length))
                self._firsts.append(int(labels[0]))
                fields.append(labels.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)]))
        return Seen(tuple(fields), True)

    def keep(self, tensor: Tensor, fields: Fields, stored: bool, name: str) -> None:
        """Note the fields of a result of an operation, each as narrow as it can be."""
        kept = []
        for one in fields:
            one = narrowed(self.own, one)  # type: ignore[assignment]
            if one is None:
                continue
            if one.numel() > 1:
                kept.append(one)
            else:
                self.own.freeze(one, f"{name} takes all of them or one alone")
        self._seen[tensor] = Seen(tuple(kept), stored)

    def sum_over(self, labels: Tensor) -> None:
        """The parameter axes that these labels are of are summed over."""
        some = labels[labels >= 0].numpy()
        found = np.searchsorted(self._firsts, some, side="right") - 1
        self.found.summed.update(np.unique(found).tolist())

    def freeze(self, tensors: Any, reason: str) -> None:
        """All labels of some tensors stay."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                for one in self.seen(tensor).fields:
                    self.own.freeze(one, reason)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        before = [self.seen(x) for x in given]
        result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        # A number written in the code comes in by `lift_fresh`.
        if func.overloadpacket.__name__ == "lift_fresh" or all(map(self.fixed, given)):
            self._fixed.update((x, True) for x in made)
        else:  # one that was fixed may have been written into
            for x in made:
                self._fixed.pop(x, None)
        if any(one.fields for one in before):
            self._rule_of(func)(Call(self, func, args, kwargs, given, before, made))
        else:
            for tensor in made:
                if id(tensor) not in self._stored:
                    self._seen[tensor] = Seen()
        return result


@dataclass(frozen=True)
class Call:
    """One operation: what went in, what was known of it, and what came out."""

    watch: Watch
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: list[Tensor]
    before: list[Seen]
    made: list[Tensor]

    @property
    def name(self) -> str:
        """Of the operation, for people."""
        return str(self.func.overloadpacket.__name__)

    @property
    def stored(self) -> bool:
        """Whether all of it comes from parameters."""
        return all(one.stored for one in self.before)

    def argument(self, name: str, default: Any = None) -> Any:
        """By its name in the operation's schema."""
        if name in self.kwargs:
            return self.kwargs[name]
        for place, one in enumerate(self.func._schema.arguments):
            if one.name == name:
                return self.args[place] if place < len(self.args) else one.default_value
        return default

    def keep(self, *fields: Tensor, tensor: Tensor | None = None) -> None:
        """The fields of the (first) result."""
        where = self.made[0] if tensor is None else tensor
        self.watch.keep(where, fields, self.stored, self.name)

    def unknown(self, reason: str = "") -> None:
        """Freeze what went in."""
        self.watch.freeze(self.given, reason or f"{self.name} is not understood")
        for tensor in self.made:
            self.keep(tensor=tensor)


Rule = Callable[[Call], None]
