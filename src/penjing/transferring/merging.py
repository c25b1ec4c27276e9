"""Neighbouring blocks made one: each parameter the mean of theirs, unit by unit.

Blocks say alike things with their units in another order. Before the mean the units of each group
inside a block (hidden units, heads) are put into the order of the last block's,

    argmax over permutations P of  sum over parameters of <W_last, P W>

a linear assignment (weight matching, Ainsworth et al., arXiv 2209.04836, section 3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from penjing.channelmap import channel_map
from penjing.coupling import Units
from penjing.model import Model
from penjing.transferring.matching import counterparts
from penjing.transferring.widths import tensors_of

__all__ = ["even_runs", "merged"]


def even_runs(blocks: int, count: int) -> list[range]:
    """So many runs of neighbours of all blocks, as even as they can be."""
    ends = [number * blocks // count for number in range(count + 1)]
    return [range(first, last) for first, last in pairwise(ends)]


@torch.no_grad()
def merged(model: Model, runs: Sequence[Sequence[int]]) -> Model:
    """A copy in which the last block of every run is the mean of its blocks; the others stay.

    Args:
        model: its blocks' layers are matched as those of a student are (`matching`).
        runs: numbers of blocks; one of another shape than the last of its run is left out.
    """
    made = model.copy()
    groups = [free.group for free in channel_map(model).free]
    for run in runs:
        last = run[-1]
        members = [own for n in run[:-1] if (own := _tensors(model, n, last)) is not None]
        for mine, theirs in members:
            for group in groups:
                _ordered(group, mine, theirs)
        for path, name in _places(model, last):
            tensor = tensors_of(made.module.get_submodule(path))[name]
            if tensor.is_floating_point():
                every = [theirs[f"{path}.{name}"] for _, theirs in members]
                tensor.copy_(torch.stack([tensor, *every]).mean(0))
    return made


def _places(model: Model, block: int) -> list[tuple[str, str]]:
    """Layers of a block with their tensors' names."""
    prefix = model.blocks[block]
    return [
        (path, name) for path, layer in model.module.named_modules()
        if path == prefix or path.startswith(f"{prefix}.") for name in tensors_of(layer)
    ]  # fmt: skip


def _tensors(
    model: Model, block: int, last: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]] | None:
    """Tensors of the last block by name, and those of another in their places; None if unlike."""
    layers = counterparts(model, last, block)
    own, theirs = {}, {}
    for path, name in _places(model, last):
        mine = tensors_of(model.module.get_submodule(path))[name]
        other = None
        if path in layers:
            other = tensors_of(model.module.get_submodule(layers[path])).get(name)
        if other is None or other.shape != mine.shape:
            return None
        own[f"{path}.{name}"], theirs[f"{path}.{name}"] = mine, other.clone()
    return own, theirs


def _ordered(group: Units, mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Units of the other block in the order of the last one's, where all of them are inside."""
    if not all(member.name in mine for member in group.members):
        return
    alike = torch.zeros(group.count, group.count, dtype=torch.float64)
    for member in group.members:
        rows = [
            own[member.name].double().movedim(member.dim, 0)[member.places].flatten(1)
            for own in (mine, theirs)
        ]  # [units, size * rest]
        alike += rows[0] @ rows[1].T
    _, order = linear_sum_assignment(-alike.numpy())
    for member in group.members:
        moved = theirs[member.name].movedim(member.dim, 0)
        given = moved.clone()
        moved[member.places] = given[member.places[torch.from_numpy(order)]]
