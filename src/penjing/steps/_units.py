"""Neurons that may go, for a sparsity constraint to choose from: channels, hidden units, heads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from penjing.calibrate import LayerStats, Unit
from penjing.channelmap import channel_map
from penjing.coupling import Units
from penjing.errors import InputError
from penjing.gating import Extent
from penjing.model import parent_of
from penjing.neurons import removal_order
from penjing.recipe import Edit
from penjing.steps._candidates import ranks, refuse_quantized, statistics
from penjing.steps._cost import Cost
from penjing.steps._gates import Gates
from penjing.steps._importance import importance, needs_of
from penjing.steps._neurons import Consumer, consumers_of, problems_of, readers_of
from penjing.steps._select import matches

__all__ = ["Neurons"]

# How near to the budget a choice is wanted, how often it is looked for, and how far it may end.
_NEAR, _TRIES, _ROUGH = 0.002, 4, 0.01


class Neurons:
    """Units of the groups that `penjing.channelmap` found, where linear layers or plain
    convolutions read them.

    Args:
        targets: globs of the layers that read them; all readers of a group must match.
        criterion: `gram` or of `penjing.criteria`, whose order the guess is.
        measure, budget: how much of what goes, see `Cost`.
        multiple: kept units of a group are a multiple of this, of heads any number, where the
            budget can then be met.

    Raises:
        InputError: there are none, or not enough of them, or they are quantized.
    """

    foldable: ClassVar[bool] = True

    def __init__(
        self, unit: Unit, targets: tuple[str, ...], criterion: str, measure: str, budget: float,
        multiple: int,
    ) -> None:  # fmt: skip
        model = unit.model
        self._groups, self._readers = [], []
        for free in channel_map(model).free:
            readers = consumers_of(model.module, free.group)
            plain = len(readers) == len({m.name for m in free.group.members if m.summed})
            if readers and plain and all(matches(reader.path, targets) for reader in readers):
                self._groups.append(free)
                self._readers.append(readers)
        if not self._groups:
            raise InputError("no neurons that may go", next="see penjing inspect --groups")
        refuse_quantized(model, [r.path for readers in self._readers for r in readers])
        self._model, self._batches = model, unit.batches
        self._criterion, self._multiple = criterion, multiple
        self._cost = Cost(model, self._groups, measure)
        self._slices = self._cost.slices
        self.count: int = self._slices[-1].stop
        order = torch.arange(self.count)
        least = self.real(self._without(order, order, 1))
        if least > 1 - budget + _ROUGH:
            raise InputError(
                f"neurons cannot take {budget:.0%} of the {measure}",
                got=f"at most {1 - least:.0%}", next="cut or quantize too",
            )  # fmt: skip

    @property
    def extent(self) -> Extent:
        """Of all that reads a unit, over the mean of the group."""
        parts: list[list[Tensor]] = [[], []]
        for readers in self._readers:
            sums: Tensor | float = 0.0
            squares: Tensor | float = 0.0
            for reader in readers:
                own = reader.matrix(self._model.module.get_submodule(reader.path))
                sums = sums + own.abs().sum(0)[reader.columns].sum(1)
                squares = squares + own.square().sum(0)[reader.columns].sum(1)
            for part, found in zip(parts, (sums, torch.as_tensor(squares).sqrt()), strict=True):
                whole = torch.as_tensor(found)
                part.append(whole / whole.mean().clamp_min(1e-30))
        return Extent(torch.cat(parts[0]), torch.cat(parts[1]))

    def attach(self, gates: Gates) -> None:
        """On what reads the units: a gate of 0 is a unit that is silenced."""
        for free, own in zip(self._groups, self._slices, strict=True):
            for member in free.group.members:
                if not member.summed:
                    continue
                holder, name = parent_of(self._model.module, member.name)
                shape = getattr(holder, name).shape
                table = torch.full((shape[member.dim],), -1)  # gates by place, -1 for none
                table[member.places] = torch.arange(own.start, own.stop).unsqueeze(1)
                wide = [-1 if dim == member.dim else 1 for dim in range(len(shape))]

                def spread(values: Tensor, table: Tensor = table, wide: list[int] = wide) -> Tensor:
                    return torch.cat((values, values.new_ones(1)))[table].view(wide)

                gates.on_parameter(member.name, spread)

    def guess(self) -> Tensor:
        """Ranks within a group."""
        parts: list[Tensor | None] = [None] * len(self._groups)
        layers = {r.path: self._model.module.get_submodule(r.path)
                  for readers in self._readers for r in readers}  # fmt: skip
        known: dict[str, LayerStats] = {}
        for found in statistics(
            self._model, self._batches, layers, needs_of(self._criterion) | {"gram"}
        ):
            known |= found
            for place, (free, readers) in enumerate(zip(self._groups, self._readers, strict=True)):
                if parts[place] is None and all(r.path in known for r in readers):
                    parts[place] = ranks(self._importance(free.group, readers, known))
        return torch.cat([part for part in parts if part is not None])

    def _importance(
        self, group: Units, readers: list[Consumer], known: dict[str, LayerStats]
    ) -> Tensor:
        seen = [r for r in readers if known[r.path].gram is not None]
        if not seen:  # nothing that reads them ever runs
            return torch.zeros(len(readers[0].columns))
        module = self._model.module
        if self._criterion != "gram":
            return importance(self._criterion, module, group, seen, known)[0]
        order = removal_order(readers_of(seen, problems_of(module, seen, known), known))
        made = torch.empty(len(order))
        made[order] = torch.arange(len(order), dtype=made.dtype)
        return made

    def left(self, counts: Tensor) -> Tensor:
        """Of the measure."""
        return self._cost.left(counts)

    def real(self, kept: Tensor) -> float:
        """Likewise, counted."""
        return self._cost.real(kept)

    def choose(self, score: Tensor, budget: float) -> Tensor:
        """The largest scores of all groups together, one unit of each at least."""
        best = float("inf"), torch.ones(self.count, dtype=torch.bool)
        for multiple in dict.fromkeys((self._multiple, 1)):
            order = torch.sort(score, stable=True).indices
            for _ in range(_TRIES):
                low, high = 0, self.count
                while high - low > 1:
                    middle = (low + high) // 2
                    left = self.real(self._without(order[:middle], score, multiple))
                    low, high = (low, middle) if left <= 1 - budget else (middle, high)
                for gone in (low, high):
                    kept = self._without(order[:gone], score, multiple)
                    best = min(best, (abs(self.real(kept) - (1 - budget)), kept), key=_off)
                if best[0] <= _NEAR:
                    return best[1]
                # Where a large unit would take too much, it stays and smaller ones go.
                order = torch.cat((order[:low], order[low + 1 :], order[low : low + 1]))
            if best[0] <= _ROUGH:
                break
        return best[1]

    def _without(self, gone: Tensor, score: Tensor, multiple: int) -> Tensor:
        kept = torch.ones(self.count, dtype=torch.bool)
        kept[gone] = False
        for free, own in zip(self._groups, self._slices, strict=True):
            count, stays = free.group.count, int(kept[own].sum())
            if not free.group.is_heads and count > multiple and stays < count:
                stays = min(count, round(stays / multiple) * multiple)
            stays = max(stays, 1 if free.group.is_heads or count <= multiple else multiple)
            part = torch.zeros(count, dtype=torch.bool)
            part[torch.sort(score[own], descending=True, stable=True).indices[:stays]] = True
            kept[own] = part
        return kept

    def edits(self, kept: Tensor, why: str) -> Iterator[Edit]:
        """Of each layer that reads them the inputs that stay, where some go."""
        made: dict[str, Tensor] = {}
        for free, own in zip(self._groups, self._slices, strict=True):
            for member in (m for m in free.group.members if m.summed and not kept[own].all()):
                path = member.name.removesuffix(".weight")
                width = self._model.module.get_parameter(member.name).shape[member.dim]
                stays = made.setdefault(path, torch.ones(width, dtype=torch.bool))
                stays[member.places[~kept[own]]] = False
        for path, stays in made.items():
            yield Edit("keep", path, stays, why)


def _off(choice: tuple[float, Tensor]) -> float:
    return choice[0]
