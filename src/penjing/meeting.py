"""Where the axes of several tensors meet: which labels are joined, tied or ended by a product.

Axes of operands have letters, as in an Einstein sum; axes of one letter meet. See `penjing.axes`.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.axes import Call, Seen
from penjing.labels import narrowed

__all__ = ["FIXED", "Letters", "Operand", "combine", "letters_of"]

FIXED = "meets numbers that no channel makes"

# An axis of an operand, by a name that operands share.
Letters = Sequence[Hashable]
Operand = tuple[Tensor, Seen, Letters]


@dataclass
class _Field:
    """Labels with one axis a letter, and the operand that they are of."""

    labels: Tensor
    owner: int

    @property
    def axes(self) -> set[int]:
        """Along which they change."""
        return {d for d, n in enumerate(self.labels.shape) if n > 1}


def combine(
    call: Call, operands: list[Operand], out: Letters, summed: Letters = ()
) -> list[Tensor]:
    """The fields of what is made of some operands, axis by axis.

    Args:
        operands: tensors with letters for their axes; axes of one letter meet.
        out: letters of the result.
        summed: letters of products that are summed.
    """
    own = call.watch.own
    letters = list(dict.fromkeys([*out, *(x for _, _, names in operands for x in names)]))
    place = {letter: number for number, letter in enumerate(letters)}
    fields = [
        _Field(_aligned(one, [place[x] for x in names], len(letters)), number)
        for number, (_, seen, names) in enumerate(operands)
        for one in seen.fields
    ]
    ends = {place[x] for x in summed}
    for dim in ends:
        _sum(call, operands, fields, dim, letters[dim])
    for number, one in enumerate(fields):
        for other in fields[:number]:
            meets = (one.axes & other.axes) - ends
            if meets and not _inside(call, operands, one, other, ends):
                own.join(one.labels, other.labels, FIXED)
    _tie_to_plain(call, operands, fields, letters, ends)
    made: list[Tensor] = []
    for one in fields:
        kept = _left(call, one.labels, ends, len(out))
        if kept is None:
            continue
        same = next((i for i, m in enumerate(made) if _overlap(m, kept)), None)
        if same is None:
            made.append(kept)
        else:  # joined above
            made[same] = torch.maximum(*torch.broadcast_tensors(made[same], kept))  # type: ignore[no-untyped-call]
    return made


def letters_of(tensor: Tensor, shape: Sequence[int]) -> Letters:
    """Names of the axes as they broadcast to a shape; one of length 1 meets nothing."""
    skip = len(shape) - tensor.ndim
    return [d + skip if n > 1 else ("one", id(tensor), d) for d, n in enumerate(tensor.shape)]


def _aligned(labels: Tensor, places: list[int], count: int) -> Tensor:
    shape = [1] * count
    for axis, where in enumerate(places):
        shape[where] = labels.shape[axis]
    order = sorted(range(len(places)), key=lambda axis: places[axis])
    return labels.permute(order).reshape(shape)


def _sum(
    call: Call, operands: list[Operand], fields: list[_Field], dim: int, letter: Hashable
) -> None:
    """A product summed over one letter."""
    own = call.watch.own
    sides: tuple[list[Tensor], list[Tensor]] = [], []
    for one in fields:
        if dim in one.axes:
            sides[operands[one.owner][1].stored].append(one.labels)
    active, stored = sides
    kinds = {seen.stored for _, seen, names in operands if letter in names}
    if len(kinds) == 1:  # two activations, or two parameters
        for labels in (*active, *stored):
            own.tie(labels, dim)
        return
    plain = [tensor for tensor, seen, names in operands if letter in names and not seen.stored
             and _changes(tensor, list(names).index(letter))]  # fmt: skip
    for labels in stored:
        call.watch.sum_over(labels)
        if not active and plain:
            own.freeze(labels, "reads what no channel makes")
        for other in active:
            own.join(labels, other, FIXED)
    for labels in active if not stored else ():
        own.tie(labels, dim)


def _inside(
    call: Call, operands: list[Operand], one: _Field, other: _Field, ends: set[int]
) -> bool:
    """Numbers of each place in a head meet all heads: they stay, and so do the places.

    Joined, they would tie the heads to each other.
    """
    for small, large in ((one, other), (other, one)):
        few, many = small.axes - ends, large.axes - ends
        if operands[small.owner][1].stored and few < many:
            call.watch.own.freeze(small.labels, f"meets several axes of channels ({call.name})")
            for d in few:
                call.watch.own.tie(large.labels, d)
            return True
    return False


def _tie_to_plain(
    call: Call, operands: list[Operand], fields: list[_Field], letters: list[Hashable],
    ends: set[int],
) -> None:  # fmt: skip
    """Numbers without labels tie those that they meet, where they differ."""
    for dim, letter in enumerate(letters):
        wide = [one for one in fields if dim in one.axes]
        if dim in ends or not wide:
            continue
        for number, (tensor, _, names) in enumerate(operands):
            if letter not in names or any(one.owner == number for one in wide):
                continue
            if _changes(tensor, list(names).index(letter)):
                for one in wide:
                    call.watch.own.tie(one.labels, dim)


def _changes(tensor: Tensor, dim: int) -> bool:
    """Whether the numbers differ along an axis."""
    if tensor.shape[dim] == 1 or tensor.stride(dim) == 0:
        return False
    tensor = tensor.detach()
    return not bool((tensor == tensor.narrow(dim, 0, 1)).all())


def _left(call: Call, labels: Tensor, ends: set[int], count: int) -> Tensor | None:
    """What goes on into the result, with `count` axes; None where a product ended them."""
    own = call.watch.own
    kept = narrowed(own, labels)
    if kept is None:
        return None
    wide = [d for d in range(kept.ndim) if kept.shape[d] > 1]
    if ends.intersection(wide):
        if len(wide) > 1:
            for d in wide:
                own.tie(kept, d)
            own.freeze(kept, f"{call.name} over an axis that carries more than channels")
        return None
    for d in wide:
        if d >= count:
            own.tie(kept, d)
            kept = kept.narrow(d, 0, 1)
    return kept.reshape(kept.shape[:count])


def _overlap(one: Tensor, other: Tensor) -> bool:
    return any(a > 1 and b > 1 for a, b in zip(one.shape, other.shape, strict=True))
