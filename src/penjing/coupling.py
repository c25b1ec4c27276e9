"""Groups of channels that can leave a network one unit at a time, and the proof that they can.

A unit is a set of labels (see `penjing.axes`): all places in all parameters that live or die
together, one channel here, a head there. Units that stand in the same places are a group. What is
removed is proved: a copy whose weights are zero where they read the removed units must give what
the copy gives that does not have them at all.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from penjing.axes import Axes
from penjing.model import parent_of
from penjing.recipe import Setting, Slice
from penjing.shapes import fresh, repair, replace_tensor, resize, settings

__all__ = [
    "PROOF",
    "Frozen",
    "Member",
    "Plan",
    "Units",
    "coupled",
    "drawn",
    "prove",
    "remove",
    "silence",
    "slices",
]

Run = Callable[[nn.Module], Any]

# Largest difference of what is equal, in float64 with some operations in float32.
PROOF = 1e-5


@dataclass(frozen=True, eq=False)
class Member:
    """An axis of a parameter or buffer that has a group's units.

    Attributes:
        name: of the parameter.
        dim: of its axes.
        summed: whether products are summed along it: the parameter reads the units.
        places: int64 [units, size], where along the axis each unit is.
    """

    name: str
    dim: int
    summed: bool
    places: Tensor


@dataclass(frozen=True, eq=False)
class Units:
    """A group."""

    members: tuple[Member, ...]

    @property
    def count(self) -> int:
        """Units."""
        return len(self.members[0].places)

    @property
    def is_heads(self) -> bool:
        """Whether a unit is more than one neuron wide everywhere: heads, groups of a norm."""
        return min(member.places.shape[1] for member in self.members) > 1

    @property
    def name(self) -> str:
        """The first parameter that makes them."""
        return next((m.name for m in self.members if not m.summed), self.members[0].name)


# A group, and the units of it that stay.
Plan = tuple[Units, Iterable[int]]


@dataclass(frozen=True)
class Frozen:
    """An axis that stays, and why."""

    name: str
    dim: int
    reason: str


def coupled(axes: Axes) -> tuple[list[Units], list[Frozen]]:
    """All groups of at least two units, in the order of their first parameter; and the rest."""
    where: dict[int, dict[int, list[int]]] = {}  # unit: axis: places
    frozen = []
    for number, axis in enumerate(axes.axes):
        labels = torch.arange(axis.first, axis.first + axis.length)
        for place, root in enumerate(axes.labels.roots(labels).tolist()):
            where.setdefault(root, {}).setdefault(number, []).append(place)
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for root, own in where.items():
        if not axes.labels.reason(root):
            alike.setdefault(tuple((n, len(p)) for n, p in own.items()), []).append(root)
    groups = []
    alone: dict[int, str] = {}
    for sign, roots in alike.items():
        if len(roots) < 2:
            for number, _ in sign:
                alone[number] = "all of them would have to go together"
            continue
        groups.append(Units(tuple(
            Member(
                axes.axes[number].name, axes.axes[number].dim, number in axes.summed,
                torch.tensor([where[root][number] for root in roots]),
            )
            for number, _ in sign
        )))  # fmt: skip
    for number, axis in enumerate(axes.axes):
        if reason := axes.labels.reason(axis.first) or alone.get(number, ""):
            frozen.append(Frozen(axis.name, axis.dim, reason))
    groups = [g for g in groups if any(not m.summed for m in g.members)]
    return sorted(groups, key=lambda g: _place(axes, g)), frozen


def _place(axes: Axes, group: Units) -> int:
    return next(n for n, a in enumerate(axes.axes) if a.name == group.members[0].name)


def silence(module: nn.Module, plans: Iterable[Plan]) -> None:
    """Weights that read the units which are not kept become copies with zeros there."""
    for group, kept in plans:
        gone = _gone(group, kept)
        for member in group.members:
            if member.summed:
                holder, name = parent_of(module, member.name)
                old = getattr(holder, name)
                index = member.places[gone].reshape(-1).to(old.device)
                replace_tensor(module, old, old.data.index_fill(member.dim, index, 0))


def slices(module: nn.Module, plans: Iterable[Plan]) -> list[Slice]:
    """What stays of every parameter, in the order in which the groups have them.

    Places that belong to no group, or to one without a plan, stay.
    """
    gone: dict[tuple[str, int], list[Tensor]] = {}
    for group, kept in plans:
        for member in group.members:
            own = member.places[_gone(group, kept)].reshape(-1)
            gone.setdefault((member.name, member.dim), []).append(own)
    made = []
    for (path, dim), parts in gone.items():
        holder, name = parent_of(module, path)
        stays = torch.ones(getattr(holder, name).shape[dim], dtype=torch.bool)
        stays[torch.cat(parts)] = False
        made.append(Slice(path, dim, stays.nonzero().flatten()))
    return made


def remove(module: nn.Module, plans: Iterable[Plan], known: list[Setting]) -> None:
    """Take the units out that are not kept.

    Args:
        known: attributes to set besides, as `prove` found them.
    """
    for one in slices(module, plans):
        resize(module, one.path, one.dim, one.kept)
    repair(module, known)


def drawn(module: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A copy with random numbers of a size that every channel is heard with.

    Which channels go together does not depend on the numbers; a trained network may have some
    that are next to nothing, and a proof on them would prove nothing.
    """
    twin = fresh(copy.deepcopy(module)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    saved = twin.state_dict(keep_vars=True)
    for name, own in saved.items():
        if not own.is_floating_point():
            continue
        noise = torch.randn(own.shape, generator=generator, dtype=torch.float64)
        if own.ndim > 1:
            value = noise / math.sqrt(max(1, own[0].numel()))
        elif name.endswith("running_var"):
            value = 1 + 0.5 * torch.tanh(noise)
        else:
            value = (1.0 if name.endswith("weight") else 0.0) + 0.2 * noise
        own.data.copy_(value)
    return twin


def prove(
    module: nn.Module,
    run: Run,
    plans: Sequence[Plan],
    known: Sequence[Setting] | None = None,
    most: float = PROOF,
) -> tuple[float, list[Setting]]:
    """Difference of the silenced and the smaller network, and the attributes that had to change.

    Args:
        module: in evaluation mode; is as before afterwards. `drawn` makes one that shows most.
        run: gives outputs of the module, the same when nothing has changed.
        plans: what goes, together.
        known: attributes to set; None to look for them, for a single group.
        most: a difference at which the search for attributes ends.

    Returns:
        The largest difference relative to what silencing changes, infinite where the smaller one
        does not run.
    """
    plain = _tensors(run(fresh(module)))
    with _preserved(module):
        silence(module, plans)
        wanted = _tensors(run(fresh(module)))
    sizes = [float((a - b).abs().max()) if a.is_floating_point() and a.numel() else 0.0
             for a, b in zip(wanted, plain, strict=True)]  # fmt: skip
    least: tuple[float, list[Setting]] = (float("inf"), [])
    for own in _settings(module, plans) if known is None else [list(known)]:
        with _preserved(module):
            try:
                remove(module, plans, own)
                found = _tensors(run(fresh(module)))
            except (RuntimeError, ValueError, IndexError, AssertionError, KeyError):
                continue  # shapes do not fit: something else holds the width
        off = _difference(found, wanted, sizes)
        if off < least[0]:
            least = off, own
        if off <= most:
            break
    return least


def _settings(module: nn.Module, plans: Sequence[Plan]) -> Iterator[list[Setting]]:
    ((group, kept),) = plans
    yield from settings(module, [m.name for m in group.members], group.count, len(set(kept)))


@contextmanager
def _preserved(module: nn.Module) -> Iterator[None]:
    """Parameters, buffers and attributes are afterwards what they were."""
    kept = [
        ({k: list(v) if type(v) is list else v for k, v in vars(own).items()},
         dict(own._parameters), dict(own._buffers), own)
        for own in module.modules()
    ]  # fmt: skip
    try:
        yield
    finally:
        for state, parameters, buffers, own in kept:
            vars(own).clear()
            vars(own).update(state)
            own._parameters.clear()
            own._parameters.update(parameters)
            own._buffers.clear()
            own._buffers.update(buffers)


def _gone(group: Units, kept: Iterable[int]) -> list[int]:
    stays = set(kept)
    return [unit for unit in range(group.count) if unit not in stays]


def _tensors(output: Any) -> list[Tensor]:
    with torch.no_grad():
        return [x.detach() for x in tree_leaves(output) if isinstance(x, Tensor)]


def _difference(found: list[Tensor], wanted: list[Tensor], sizes: list[float]) -> float:
    """The largest difference over what silencing changed; of what it did not, over the output."""
    if [x.shape for x in found] != [x.shape for x in wanted]:
        return float("inf")
    worst = 0.0
    for one, other, size in zip(found, wanted, sizes, strict=True):
        if one.is_floating_point() and one.numel():
            off = float((one - other).abs().max()) / max(
                size, 1e-6 * float(other.abs().max()), 1e-30
            )
            worst = max(worst, off if off == off else float("inf"))
    return worst
