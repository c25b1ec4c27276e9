"""What a network costs without some of its units, of how far each of them is there.

A parameter's size is the product of its axes, and an axis is as long as the units that stand on it:

    parameters(c) = sum over parameters of  prod over axes of (length - sum over units size (1 - c))

which is exact where every c is 0 or 1 and has a gradient in between. The multiplications of a layer
go with the size of its matrices; those of an attention, which has none, with its heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from penjing.channelmap import Free
from penjing.coupling import remove
from penjing.errors import UsageError
from penjing.meter import metered, sized_batch
from penjing.model import Model, parent_of
from penjing.steps._ladder import COSTS
from penjing.steps._select import canonical

__all__ = ["MEASURES", "Cost"]

MEASURES = "units", "parameters", "macs"


@dataclass
class _Sized:
    """Numbers that count `weight` each, and the units that stand on their axes."""

    weight: float
    shape: tuple[int, ...]
    axes: set[tuple[int, int, int, int]] = field(default_factory=set)  # dim, first, last, size

    def left(self, counts: Tensor) -> Tensor:
        product = counts.new_tensor(self.weight)
        for dim, length in enumerate(self.shape):
            gone = [size * (1 - counts[a:b]).sum() for d, a, b, size in self.axes if d == dim]
            product = product * (length - sum(gone))
        return product


class Cost:
    """Share of a measure that is left.

    Args:
        groups: whose units may go; their counts stand one group after the other.
        of: `parameters` or `macs` of the whole network, or `units`: the inputs of what reads them.

    Attributes:
        slices: where each group's units are among all.

    Raises:
        UsageError: another measure.
    """

    def __init__(self, model: Model, groups: Sequence[Free], of: str) -> None:
        if of not in MEASURES:
            raise UsageError("unknown measure", got=of, allowed=", ".join(MEASURES))
        self._model, self._groups, self._of = model, groups, of
        ends = torch.tensor([0, *(free.group.count for free in groups)]).cumsum(0).tolist()
        self.slices = [slice(a, b) for a, b in pairwise(ends)]
        self._macs = COSTS["macs"](model) if of == "macs" else 0.0
        self._sized = self._units() if of == "units" else self._tensors()
        self._whole = float(self._total(torch.ones(ends[-1], dtype=torch.float64)))

    def left(self, counts: Tensor) -> Tensor:
        """A scalar, 1 where all are there."""
        return self._total(counts) / self._whole

    def real(self, kept: Tensor) -> float:
        """The same of units that are there or not, bool: multiplications are counted by a run."""
        if self._of != "macs":
            return float(self.left(kept.double()))
        plans, settings = [], []
        for free, own in zip(self._groups, self.slices, strict=True):
            stays = kept[own].nonzero().flatten().tolist()
            if len(stays) < free.group.count:
                plans.append((free.group, stays))
                settings += free.settings(len(stays))
        twin = self._model.copy(shared=True)
        remove(twin.module, plans, settings)
        return COSTS["macs"](twin) / self._macs

    def _total(self, counts: Tensor) -> Tensor:
        return torch.stack([sized.left(counts) for sized in self._sized]).sum()

    def _units(self) -> list[_Sized]:
        made = []
        for free, own in zip(self._groups, self.slices, strict=True):
            places = next(m for m in free.group.members if m.summed).places
            made.append(_Sized(1.0, (places.numel(),), {(0, own.start, own.stop, places.shape[1])}))
        return made

    def _tensors(self) -> list[_Sized]:
        """Parameters, or where multiplications are counted matrices; and then attentions."""
        sizes = {n: _Sized(1.0, tuple(p.shape)) for n, p in self._model.parameters()}
        bare: dict[str, float] = {}
        if self._of == "macs":
            sizes, bare = self._multiplied()
        for free, own in zip(self._groups, self.slices, strict=True):
            for member in free.group.members:
                holder, name = parent_of(self._model.module, member.name)
                key = canonical(self._model, member.name) if name in holder._parameters else ""
                if key in sizes:
                    place = (member.dim, own.start, own.stop, member.places.shape[1])
                    sizes[key].axes.add(place)
            for path in [p for p in bare if any(m.name.startswith(p) for m in free.group.members)]:
                axes = {(0, own.start, own.stop, 1)}
                sizes[path] = _Sized(bare.pop(path) / free.group.count, (free.group.count,), axes)
        return [*sizes.values(), *(_Sized(macs, ()) for macs in bare.values())]

    def _multiplied(self) -> tuple[dict[str, _Sized], dict[str, float]]:
        """Matrices with the multiplications of their layer, and those of modules without any."""
        found: dict[str, _Sized] = {}
        bare: dict[str, float] = {}
        for path, macs in metered(self._model, sized_batch(self._model, batch=1)).macs.items():
            own = self._model.module.get_submodule(path).named_parameters(recurse=False)
            matrices = {f"{path}.{n}".lstrip("."): p for n, p in own if p.ndim > 1}
            numbers = sum(p.numel() for p in matrices.values())
            for name, parameter in matrices.items():
                key = canonical(self._model, name)
                before = found[key].weight if key in found else 0.0
                found[key] = _Sized(before + macs / numbers, tuple(parameter.shape))
            if not matrices:
                bare[f"{path}."] = float(macs)
        return found, bare
