"""Groups of channels that can leave a network one unit at a time, silenced or removed.

A unit is a set of labels (see `penjing.axes`): all places in all parameters that live or die
together, one channel here, a head there. Units that stand in the same places are a group.
`penjing.proof` shows that a network without them gives what it gives with them silenced.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from penjing.axes import Axes
from penjing.model import parent_of
from penjing.recipe import Setting, Slice
from penjing.shapes import fresh, owners, repair, replace_tensor, resize

__all__ = [
    "Frozen",
    "Member",
    "Plan",
    "Units",
    "coupled",
    "drawn",
    "remove",
    "silence",
    "slices",
    "unread",
    "zeroed",
]

# Places at which a parameter's numbers can start in a long row of random ones.
_STARTS = 8192


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
    lengths = [axis.length for axis in axes.axes]
    number = np.repeat(np.arange(len(lengths)), lengths)
    first_of = np.repeat(np.array([axis.first for axis in axes.axes], np.int64), lengths)
    place = np.arange(len(number)) - np.repeat(np.cumsum([0, *lengths])[:-1], lengths)
    root = axes.labels.roots(torch.from_numpy(first_of + place)).numpy()
    order = np.lexsort((place, number, root))
    root, number, place = root[order], number[order], place[order]
    # Of each unit the axes that have it, and how often.
    pairs = root * max(1, len(lengths)) + number
    _, starts, counts = np.unique(pairs, return_index=True, return_counts=True)
    units, firsts = np.unique(root[starts], return_index=True)
    alike: dict[tuple[bytes, bytes], list[int]] = {}  # those that stand in the same places
    for unit, first, end in zip(units, firsts, [*firsts[1:], len(starts)], strict=True):
        if not axes.labels.reason(int(unit)):
            sign = number[starts[first:end]].tobytes(), counts[first:end].tobytes()
            alike.setdefault(sign, []).append(first)
    groups = []
    alone: dict[int, str] = {}
    for sign, found in alike.items():
        own = np.frombuffer(sign[0], number.dtype).tolist()
        if len(found) < 2:
            alone |= dict.fromkeys(own, "all of them would have to go together")
            continue
        members = []
        for step, one in enumerate(own):
            first = starts[np.array(found) + step]  # [units]
            where = first[:, None] + np.arange(counts[found[0] + step])  # [units, size]
            axis = axes.axes[one]
            members.append(
                Member(axis.name, axis.dim, one in axes.summed, torch.from_numpy(place[where]))
            )
        if any(not m.summed for m in members):
            groups.append(Units(tuple(members)))
    frozen = [
        Frozen(axis.name, axis.dim, reason)
        for n, axis in enumerate(axes.axes)
        if (reason := axes.labels.reason(axis.first) or alone.get(n, ""))
    ]
    placed: dict[str, int] = {}
    for n, axis in enumerate(axes.axes):
        placed.setdefault(axis.name, n)
    return sorted(groups, key=lambda g: placed[g.members[0].name]), frozen


def silence(module: nn.Module, plans: Iterable[Plan]) -> None:
    """Weights that read the units which are not kept become copies with zeros there."""
    where = owners(module)
    for path, zeros in unread(plans).items():
        holder, name = parent_of(module, path)
        old = getattr(holder, name)
        replace_tensor(where, old, zeroed(old.data, zeros))


def unread(plans: Iterable[Plan]) -> dict[str, list[tuple[int, Tensor]]]:
    """By parameter, the axes and places where it would read the units which are not kept."""
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for group, kept in plans:
        gone = _gone(group, kept)
        for member in group.members:
            if member.summed:
                own = member.dim, member.places[gone].reshape(-1)
                found.setdefault(member.name, []).append(own)
    return found


def zeroed(weight: Tensor, places: list[tuple[int, Tensor]]) -> Tensor:
    """A copy with zeros there."""
    made = weight.clone()
    for dim, index in places:
        made.index_fill_(dim, index.to(weight.device), 0)
    return made


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
    where = owners(module)
    for one in slices(module, plans):
        resize(module, one.path, one.dim, one.kept, where)
    repair(module, known)


def drawn(module: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A copy with random numbers of a size that every channel is heard with.

    Which channels go together does not depend on the numbers; a trained network may have some
    that are next to nothing, and a proof on them would prove nothing. Matrices are pieces of a few
    long rows of numbers, each from a place of its own: a copy of a large network takes little
    memory.
    """
    generator = torch.Generator().manual_seed(seed)
    saved: dict[int, tuple[str, Tensor]] = {}
    for name, own in module.state_dict(keep_vars=True).items():
        if own.is_floating_point():
            saved.setdefault(id(own), (name, own))
    sizes: dict[int, int] = {}
    for _, own in saved.values():
        if own.ndim > 1:
            sizes[_scale(own)] = max(sizes.get(_scale(own), 0), own.numel())
    rows = {
        scale: torch.randn(size + _STARTS, generator=generator, dtype=dtype).mul_(2.0**scale)
        for scale, size in sizes.items()
    }
    made: dict[int, Any] = {}
    for key, (name, own) in saved.items():
        if own.ndim > 1:
            start = int(torch.randint(_STARTS, (), generator=generator))
            value = rows[_scale(own)][start : start + own.numel()].view(own.shape)
        else:
            noise = torch.randn(own.shape, generator=generator, dtype=dtype)
            if name.endswith("running_var"):
                value = 1 + 0.5 * torch.tanh(noise)
            else:
                value = (1.0 if name.endswith("weight") else 0.0) + 0.2 * noise
        value = value.to(own.device)
        if isinstance(own, nn.Parameter):
            made[key] = nn.Parameter(value, own.requires_grad)
        else:  # may be written into
            made[key] = value.clone()
    return fresh(copy.deepcopy(module, made)).to(dtype)


def _scale(weight: Tensor) -> int:
    """The power of two by which products with a row are about as large as what goes in."""
    return -round(math.log2(max(1, weight[0].numel())) / 2)


def _gone(group: Units, kept: Iterable[int]) -> list[int]:
    stays = set(kept)
    return [unit for unit in range(group.count) if unit not in stays]
