"""Parameters: a student of another shape begins with what its teacher knows.

The teacher is first made like the student by the steps that make any network smaller: `cut` takes
the blocks that have no counterpart, `shrink` the units of every group that the student has fewer
of, and refits what reads them. What then differs is copied axis by axis (`penjing.transferring.
widths`), and every layer refitted by least squares where a residual stream became narrower.

A wider student gets copies, and what reads them their share of the weight (Net2WiderNet, Chen et
al., arXiv 1511.05641, section 2.1; shares differ, so that copies part in training). A deeper one
gets blocks that do nothing: a copy of the block before with as few of its last layers at zero as
make it the identity (Net2DeeperNet, section 2.2), found by trying.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penjing.apply import apply
from penjing.model import Batch, Model
from penjing.recipe import Recipe
from penjing.steps.cut import Cut
from penjing.steps.shrink import Shrink
from penjing.transferring._idle import idle
from penjing.transferring._refit import refit
from penjing.transferring.matching import Match, match
from penjing.transferring.merging import even_runs, merged
from penjing.transferring.widths import Widths, kept_units, tensors_of

__all__ = ["Inherited", "inherit"]


@dataclass(frozen=True)
class Inherited:
    """A student with its teacher's knowledge, and how it came by it.

    Attributes:
        blocks: of each of its blocks the teacher's, by number.
        alone: layers that stayed as they were.
        why: a clause for the report.
    """

    model: Model
    blocks: tuple[int, ...]
    alone: tuple[str, ...]
    why: str


def inherit(
    student: Model, teacher: Model, batches: Sequence[Batch] = (), *, criterion: str = "gram",
    merge: bool = False, seed: int = 0,
) -> Inherited:  # fmt: skip
    """A copy of the student with parameters made of the teacher's.

    Args:
        batches: calibration data of the teacher; without any, units are chosen by their size and
            nothing is refitted.
        criterion: as `penjing.steps.shrink` takes it.
        merge: blocks that have no counterpart are merged with their neighbours.
        seed: of the shares of copies.

    Raises:
        InputError: as `match`.
    """
    made = student.copy()
    near, blocks = teacher, None
    if merge and 0 < len(made.blocks) < len(teacher.blocks):
        runs = even_runs(len(teacher.blocks), len(made.blocks))
        near, blocks = merged(teacher, runs), tuple(run[-1] for run in runs)
    found = match(made, near, blocks)
    blocks, said = found.blocks, []
    gone = [b for n, b in enumerate(teacher.blocks) if n not in blocks]
    if gone and batches and blocks and _droppable(teacher, gone):
        near = apply(near, Recipe((Cut(blocks=tuple(gone), patch="none"),)), batches).model
        places = [sorted(set(blocks)).index(b) for b in blocks]
        found = match(made, near, places)
    if gone:
        how = ", neighbours merged" if merge else ""
        said.append(f"{len(set(blocks))} of {len(teacher.blocks)} blocks{how}")
    if batches and (kept := kept_units(made, near, found.layers)):
        step = Shrink(criterion=criterion, kept=kept)
        near = apply(near, Recipe((step,), seed), batches).model
        said.append(f"units chosen by {criterion} in {len(kept)} groups, what reads them refitted")
    widths = Widths.of(made, near, found.layers)
    _copy(made, near, found, widths, seed)
    if widths.copied:
        said.append("units copied")
    if widths.selected:
        said.append("channels of the residual stream chosen by size")
        if batches:
            count = refit(made, near, found.layers, widths.known, batches)
            said.append(f"{count} layers refitted")
    again = [n for n, b in enumerate(blocks) if n and b == blocks[n - 1]]
    if again:
        still = sum(idle(made, made.blocks[n]) for n in again)
        said.append(f"{still} of {len(again)} blocks more start as identities")
    return Inherited(made, blocks, found.alone, ", ".join(said) or "copied")


def _droppable(model: Model, gone: list[str]) -> bool:
    """Whether every list of blocks keeps one."""
    for path in {block.rpartition(".")[0] for block in gone}:
        own = model.module.get_submodule(path)
        lost = sum(block.rpartition(".")[0] == path for block in gone)
        if not isinstance(own, nn.ModuleList | nn.Sequential) or len(own) <= lost:
            return False
    return True


@torch.no_grad()
def _copy(made: Model, near: Model, found: Match, widths: Widths, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    alike = _alike(made, near, found)
    for mine, theirs in found.layers.items():
        layer, source = made.module.get_submodule(mine), near.module.get_submodule(theirs)
        given = tensors_of(source)
        for name, own in tensors_of(layer).items():
            if id(own) in done:
                continue
            done.add(id(own))
            value = given.get(name)
            if value is None:
                if name == "bias":
                    own.zero_()
                continue
            if value.ndim != own.ndim:
                continue
            if alike:  # recurrent layers have axes that are followed by nobody
                own.copy_(value)
                continue
            path = f"{mine}.{name}".lstrip(".")
            for dim in range(own.ndim):
                index = widths.known[path, dim].to(value.device)
                value = value.index_select(dim, index)
                if dim == 1 and reads(layer):
                    value = value * _shares(index, generator).view(1, -1, *[1] * (own.ndim - 2))
            own.copy_(value)


def _alike(made: Model, near: Model, found: Match) -> bool:
    """Whether every tensor has the shape of its counterpart: then all are taken as they are."""
    for mine, theirs in found.layers.items():
        own = tensors_of(made.module.get_submodule(mine))
        given = tensors_of(near.module.get_submodule(theirs))
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in given.items()}:
            return False
    return True


def reads(layer: nn.Module) -> bool:
    """Whether the second axis of a layer's weight is summed over."""
    plain = isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == 1
    return plain or isinstance(layer, nn.Linear)


def _shares(index: Tensor, generator: torch.Generator) -> Tensor:
    """[n], those of the copies of one index sum to 1."""
    counts = torch.bincount(index)
    if int(counts.max()) < 2:
        return torch.ones(len(index))
    drawn = 0.5 + torch.rand(len(index), generator=generator)
    total = torch.zeros(len(counts)).index_add_(0, index, drawn)
    return drawn / total[index]
