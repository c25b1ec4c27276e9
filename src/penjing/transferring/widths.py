"""Which channels of the teacher each axis of a student's parameter has.

    group     channels that go together in both networks (`penjing.channelmap`): unit by unit
    narrower  elsewhere the most important indices, the same for all axes of that length
    wider     elsewhere copies one after the other

Importance of an index is the sum of its squares over the mean, over all parameters with such an
axis. Indices that depend on the lengths alone keep a residual stream together, which normalization
lets no channel leave by itself (weight selection, Xu et al., arXiv 2311.18823, selects evenly for
the same reason).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penjing.channelmap import channel_map
from penjing.coupling import Member, Units
from penjing.model import Model, parent_of

__all__ = ["Widths", "kept_units", "tensors_of"]

Axis = tuple[str, int]


def _pairs(
    student: Model, teacher: Model, layers: Mapping[str, str]
) -> Iterator[tuple[Units, Units, list[tuple[Member, Member]]]]:
    """Groups of the student with the teacher's, and the axes at which they meet."""
    there = {(m.name, m.dim): (f.group, m)
             for f in channel_map(teacher).free for m in f.group.members}  # fmt: skip
    for free in channel_map(student).free:
        met, groups = [], {}
        for member in free.group.members:
            path, _, name = member.name.rpartition(".")
            place = f"{layers[path]}.{name}".lstrip(".") if path in layers else ""
            if (place, member.dim) in there:
                group, other = there[place, member.dim]
                groups[id(group)] = group
                met.append((member, other))
        if len(groups) == 1:
            yield free.group, next(iter(groups.values())), met


def kept_units(student: Model, teacher: Model, layers: Mapping[str, str]) -> dict[str, int]:
    """Units that stay of the teacher's groups, by name, where the student has fewer of one size."""
    kept = {}
    for mine, theirs, met in _pairs(student, teacher, layers):
        same = all(a.places.shape[1] == b.places.shape[1] for a, b in met)
        if same and mine.count < theirs.count:
            kept[theirs.name] = mine.count
    return kept


@dataclass
class Widths:
    """Indices of the teacher's axes.

    Attributes:
        known: by axis of a parameter of the student.
        selected: whether channels of a residual stream were left out.
        copied: whether there are copies.
    """

    known: dict[Axis, Tensor]
    selected: bool = False
    copied: bool = False

    @classmethod
    def of(cls, student: Model, teacher: Model, layers: Mapping[str, str]) -> Widths:
        """Of all matched layers."""
        made = cls({})
        for group, other, met in _pairs(student, teacher, layers):
            for a, b in met:
                index = made.known.get((a.name, a.dim))  # two groups can share an axis
                made.known[a.name, a.dim] = _unit_by_unit(student, a, b, index)
            made.copied |= group.count > other.count
        axes = [(axis, pair) for axis, pair in _axes(student, teacher, layers)
                if axis not in made.known]  # fmt: skip
        scores: dict[tuple[int, int], Tensor] = {}
        for (_, dim), (layer, mine, theirs) in axes:
            was, now = theirs.shape[dim], mine.shape[dim]
            if now < was and not _is_rows(layer, dim):
                rest = [d for d in range(theirs.ndim) if d != dim]
                square = theirs.detach().double().square()
                own = square.mean(rest) if rest else square
                own = own / own.mean().clamp_min(1e-30)
                scores[was, now] = scores.get((was, now), 0) + own
        for axis, (layer, mine, theirs) in axes:
            was, now = theirs.shape[axis[1]], mine.shape[axis[1]]
            index = torch.arange(now) % was
            if (was, now) in scores and not _is_rows(layer, axis[1]):
                index = scores[was, now].topk(now).indices.sort().values
                made.selected = True
            made.copied |= now > was
            made.known[axis] = index
        return made


def _is_rows(layer: nn.Module, dim: int) -> bool:
    return isinstance(layer, nn.Embedding) and dim == 0


def _axes(
    student: Model, teacher: Model, layers: Mapping[str, str]
) -> Iterator[tuple[Axis, tuple[nn.Module, Tensor, Tensor]]]:
    for mine, theirs in layers.items():
        layer = student.module.get_submodule(mine)
        other = tensors_of(teacher.module.get_submodule(theirs))
        for name, own in tensors_of(layer).items():
            was = other.get(name)
            if was is not None and was.ndim == own.ndim:
                for dim in range(own.ndim):
                    yield (f"{mine}.{name}".lstrip("."), dim), (layer, own, was)


def tensors_of(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a layer itself that are saved with it."""
    hidden = layer._non_persistent_buffers_set
    own = {n: p for n, p in layer._parameters.items() if p is not None}
    return own | {n: b for n, b in layer._buffers.items() if b is not None and n not in hidden}


def _unit_by_unit(student: Model, mine: Member, theirs: Member, index: Tensor | None) -> Tensor:
    """Where along the teacher's axis each place of the student's is."""
    size, before = mine.places.shape[1], theirs.places.shape[1]
    inner = torch.arange(size) * before // size if size <= before else torch.arange(size) % before
    units, count = torch.arange(len(mine.places)), len(theirs.places)
    units = units * count // len(units) if len(units) <= count else units % count
    if index is None:
        holder, name = parent_of(student.module, mine.name)
        index = torch.arange(getattr(holder, name).shape[mine.dim])
    index[mine.places] = theirs.places[units][:, inner]
    return index
