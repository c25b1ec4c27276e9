"""In which order units leave, the groups of a network against each other.

    layer      the same fraction of every group
    global     units with the least harm for what they cost, wherever they are
    measured   likewise, the harm of a group scaled to a measured one

Harm of a unit that goes: with the criterion `gram` what the loss of the whole network rises by when
it does and what reads it is refitted, in nats (`penjing.neurons`); else its score, over the mean of
its group's scores unless the criterion's are in units of the loss. Cost: the part of the target
(parameters or MACs) that a unit of its group takes, by halving the group. So many go at a time as
kernels want.

For `measured` each group alone loses half of its units, is repaired, and the network is run on
samples that the repair has not seen: the divergence of its outputs (`penjing.divergence`) over the
harm up to there is the group's scale. One end-to-end evaluation a group, whose error curve says how
it goes on.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from penjing.calibrate import LayerStats, Stream
from penjing.channelmap import Free, channel_map
from penjing.coupling import Units, silence
from penjing.divergence import divergence
from penjing.errors import UsageError
from penjing.gradients import slopes
from penjing.model import Batch, Model
from penjing.neurons import greedy_obs
from penjing.progress import track
from penjing.steps._importance import check, importance, is_absolute, needs_of
from penjing.steps._ladder import Forms, Ladder
from penjing.steps._neurons import (
    Consumer,
    choose,
    collect,
    consumers_of,
    problems_of,
    put,
    readers_of,
)
from penjing.steps._select import matches

if TYPE_CHECKING:
    from penjing.steps.shrink import Shrink

__all__ = ["OF", "RANKINGS", "Group", "Probe", "bundles", "groups_for", "harms", "ladder_of"]

OF = ("units", "parameters", "macs")
RANKINGS = ("layer", "global", "measured")

# Steps from no units to all, where every group loses the same fraction.
_FINE = 4096
# Bytes of the Gram matrices that are held at once.
_BYTES = 1 << 30
# Of the batches, those that the measurements of `measured` are made on.
_HELD = 0.25


@dataclass(frozen=True, eq=False)
class Group:
    """A group that may lose units: how many may stay, and what reads it."""

    free: Free
    stays: tuple[int, ...]
    readers: list[Consumer]

    @property
    def units(self) -> Units:
        return self.free.group

    @property
    def half(self) -> int:
        """Of the numbers that may stay the one next to half."""
        return min(self.stays[1:], key=lambda n: abs(2 * n - self.units.count))


def ladder_of(model: Model, step: Shrink, batches: Sequence[Batch]) -> Ladder:
    """Rungs by the ranking of a step.

    Raises:
        UsageError: a ranking that needs data without any, or a criterion that finds nothing.
    """
    check(step.criterion, model.module)
    groups = groups_for(model, step)
    forms = Forms(model, [one.free for one in groups])
    if step.ranking == "layer":

        def same(rung: int) -> dict[str, int]:
            plain = replace(step, ratio=0.999 * rung / _FINE, of="units", kept=None)
            return {free.group.name: plain.keep(free.group) for free in forms.groups}

        return Ladder(forms, same, _FINE)
    if not batches:
        raise UsageError("shrink needs data", next="give --data")
    fixed = {}
    if step.heads is not None:
        plain = replace(step, of="units", ranking="layer")
        fixed = {g.units.name: plain.keep(g.units) for g in groups if g.units.is_heads}
    ranked = [g for g in groups if g.units.name not in fixed and len(g.stays) > 1]
    order = _order(forms, step, batches, ranked)
    stays = {g.units.name: g.stays for g in ranked}

    def best(rung: int) -> dict[str, int]:
        gone = Counter(order[:rung])
        return fixed | {name: own[gone[name]] for name, own in stays.items()}

    return Ladder(forms, best, len(order))


def groups_for(model: Model, step: Shrink) -> list[Group]:
    """Those that a step takes units of, and that their names tell apart."""
    found = {
        free.group.name: Group(free, _stays(free.group, step.multiple), readers)
        for free in channel_map(model).free
        if (readers := consumers_of(model.module, free.group))
        and all(matches(one.path, step.targets) for one in readers)
    }
    return list(found.values())


def _stays(group: Units, multiple: int) -> tuple[int, ...]:
    """How many units may stay, all of them first."""
    one = 1 if group.is_heads or group.count <= multiple else multiple
    return (group.count, *range((group.count - 1) // one * one, 0, -one))


def _order(forms: Forms, step: Shrink, batches: Sequence[Batch], groups: list[Group]) -> list[str]:
    """Names of groups; where one stands, it goes on to the next of the numbers that may stay."""
    found: list[tuple[float, str]] = []
    for group, harm in harms(forms.model, step, batches, groups):
        name, count = group.units.name, group.units.count
        cost = (1 - forms.share({name: group.half}, step.of)) / (count - group.half)
        sums = torch.cat([torch.zeros(1), harm.double().cumsum(0)])
        rate = 0.0
        for before, now in itertools.pairwise(group.stays):
            lost = float(sums[count - now] - sums[count - before])
            # Never less than what has to go first.
            rate = max(rate, lost / max(cost, 1e-30) / (before - now))
            found.append((rate, name))
    return [name for _, name in sorted(found, key=lambda one: one[0])]


def harms(
    model: Model, step: Shrink, batches: Sequence[Batch], groups: list[Group]
) -> Iterator[tuple[Group, Tensor]]:
    """Of each group, of one unit after the other, in the order they go: [units]."""
    needs = needs_of(step.criterion)
    held: Sequence[Batch] = ()
    if step.ranking == "measured":
        needs |= {"gram"}
        if len(batches) > 1:
            number = max(1, round(_HELD * len(batches)))
            batches, held = batches[:-number], batches[-number:]
    about = {one.path for group in groups for one in group.readers}
    stream = Stream(model, batches, slopes(model, batches, needs, about))
    probe = Probe(model, step, held or batches) if step.ranking == "measured" else None
    for some in bundles(model, groups):
        paths = {one.path: model.module.get_submodule(one.path) for g in some for one in g.readers}
        stats = collect(stream, paths, needs)
        for group in track(some, "ranking"):
            # A layer that was never run has nothing to rank by.
            if "gram" in needs and any(stats[one.path].gram is None for one in group.readers):
                continue
            harm = _harm(model, step.criterion, group, stats)
            if probe is not None:
                up_to = float(harm[: group.units.count - group.half].sum())
                harm = harm * (probe.divergence(group, stats, group.half) / max(up_to, 1e-30))
            yield group, harm


def _harm(model: Model, criterion: str, group: Group, stats: dict[str, LayerStats]) -> Tensor:
    if criterion == "gram":
        costs: list[Tensor] = []
        problems = problems_of(model.module, group.readers, stats)
        greedy_obs(readers_of(group.readers, problems, stats), 1, costs=costs)
        return torch.cat(costs)
    scores, used = importance(criterion, model.module, group.units, group.readers, stats)
    scores = scores.double().sort().values
    return scores if is_absolute(used) else scores / scores.mean().clamp_min(1e-30)


class Probe:
    """Runs the network with fewer units of one group."""

    def __init__(self, model: Model, step: Shrink, batches: Sequence[Batch]) -> None:
        self.model, self.step, self.batches = model, step, batches
        with torch.no_grad():
            self.wanted = [model.run(batch) for batch in batches]

    def divergence(self, group: Group, stats: dict[str, LayerStats], keep: int) -> float:
        """Of its outputs, with so many units, from those of the whole."""
        twin = self.model.copy(shared=True)
        kept, fits, _ = choose(twin, group.units, group.readers, stats, keep, self.step.criterion)
        silence(twin.module, [(group.units, kept)])
        for path, fit in fits.items() if self.step.repair else ():
            put(twin.module, twin.module.get_submodule(path), fit)
        with torch.no_grad():
            outputs = (twin.run(batch) for batch in self.batches)
            return divergence(self.model.interface, self.batches, self.wanted, outputs)


def bundles(model: Model, groups: list[Group]) -> Iterator[list[Group]]:
    """Groups whose statistics are held at once."""
    some: list[Group] = []
    size = 0
    for group in groups:
        layers = [model.module.get_submodule(one.path) for one in group.readers]
        widths = [one.matrix(own).shape[1] for one, own in zip(group.readers, layers, strict=True)]
        bytes_ = sum(8 * width**2 for width in widths)
        if some and size + bytes_ > _BYTES:
            yield some
            some, size = [], 0
        some.append(group)
        size += bytes_
    if some:
        yield some
