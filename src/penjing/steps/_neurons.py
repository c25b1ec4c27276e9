"""Choosing units of a group by what reads them, and refitting that: for `shrink`.

The matrix of a convolution, of pictures or of sound, is its kernel as [out, in * places]; a channel
is as many columns of it as the kernel has places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats, Stream, Unit
from penjing.coupling import Units
from penjing.linalg import masked_least_squares, ridge
from penjing.model import Model
from penjing.neurons import Reader, greedy_obs, largest
from penjing.recipe import Setting, Slice
from penjing.shapes import owners, replace_tensor
from penjing.steps._importance import importance
from penjing.steps._problem import Fit, Problem
from penjing.steps._select import canonical

__all__ = [
    "Consumer",
    "Fit",
    "Group",
    "Remaining",
    "choose",
    "collect",
    "consumers_of",
    "described",
    "learned",
    "mask_of",
    "problems_of",
    "put",
    "readers_of",
    "refit",
    "silenced",
]

# Strength of the ridge toward the target.
_RIDGE = 0.01
# Of conjugate gradients, where a mask says which connections there are.
_STEPS = 32


@dataclass(frozen=True, eq=False)
class Consumer:
    """A layer that reads a group's units, and of its matrix the columns of each, [units, size]."""

    path: str
    columns: Tensor

    def matrix(self, layer: nn.Module) -> Tensor:
        """float32 [out, in]."""
        weight: Tensor = layer.weight.detach()  # type: ignore[operator]
        return weight.float().flatten(1)


def consumers_of(module: nn.Module, group: Units) -> list[Consumer]:
    """The linear layers and plain convolutions that read the units.

    One that reads them twice (both directions of a recurrent layer) has the columns of both.
    """
    found: dict[str, Tensor] = {}
    for member in group.members:
        path, _, name = member.name.rpartition(".")
        layer = module.get_submodule(path)
        plain = isinstance(layer, nn.Linear) or (
            isinstance(layer, nn.Conv1d | nn.Conv2d) and layer.groups == 1
        )
        if member.summed and plain and name == "weight" and member.dim == 1:
            each = layer.weight[0, 0].numel()  # type: ignore[index]
            columns = member.places.unsqueeze(-1) * each + torch.arange(each)
            own = columns.flatten(1)
            found[path] = torch.cat((found[path], own), 1) if path in found else own
    return [Consumer(path, columns) for path, columns in found.items()]


def learned(model: Model, group: Units) -> list[int]:
    """Units of a group that the step before chose to keep; all where it chose nothing of it."""
    stays = torch.ones(group.count, dtype=torch.bool)
    for member in group.members:
        kept = model.kept.get(member.name.rpartition(".")[0]) if member.summed else None
        if kept is not None:
            stays &= kept[member.places].all(1)
    return stays.nonzero().flatten().tolist()


def choose(
    model: Model, group: Units, consumers: list[Consumer], stats: Mapping[str, LayerStats],
    keep: int | list[int], criterion: str,
) -> tuple[list[int], dict[str, Fit], str]:  # fmt: skip
    """Units that stay, what becomes of each consumer, and the criterion that decided.

    Args:
        model: the network; connections that its masks have removed stay removed.
        group: with whole names.
        consumers: with a Gram matrix each.
        keep: how many, or which.
        criterion: `gram`, or a name of `penjing.unitcriteria` or `penjing.criteria`.
    """
    problems = problems_of(model.module, consumers, stats)
    masks = {path: mask_of(model, path) for path in problems}
    fits: dict[str, Fit] = {}
    used = criterion
    if criterion == "gram" and isinstance(keep, int):
        keep, weights = greedy_obs(readers_of(consumers, problems, stats), keep)
        fits = {p: x.fit(w) for (p, x), w in zip(problems.items(), weights, strict=True)
                if masks[p] is None}  # fmt: skip
    elif isinstance(keep, int):
        scores, used = importance(criterion, model.module, group, consumers, stats)
        keep = largest(scores, keep)
    for one in consumers:
        if one.path not in fits:
            columns = one.columns[keep].flatten().sort().values
            fits[one.path] = _solved(problems[one.path], columns, masks[one.path])
    return keep, fits, used


def mask_of(model: Model, path: str) -> Tensor | None:
    """Connections of a layer that are there, bool [out, in]; None where all are."""
    mask = model.masks.get(canonical(model, f"{path}.weight"))
    return None if mask is None else mask.flatten(1)


def problems_of(
    module: nn.Module, consumers: list[Consumer], stats: Mapping[str, LayerStats]
) -> dict[str, Problem]:
    """Of each consumer, by path; arguments as `choose` takes them."""
    layers = {one.path: (one, module.get_submodule(one.path)) for one in consumers}
    return {
        path: Problem.of(layer, one.matrix(layer), stats[path])
        for path, (one, layer) in layers.items()
    }


def readers_of(
    consumers: list[Consumer], problems: Mapping[str, Problem], stats: Mapping[str, LayerStats]
) -> list[Reader]:
    """What greedy optimal brain surgeon takes."""
    made = [(c, problems[c.path], stats[c.path].fisher) for c in consumers]
    return [Reader(own.weight, own.gram, c.columns, fisher) for c, own, fisher in made]


def refit(
    layer: nn.Module, weight: Tensor, stats: LayerStats, kept: Tensor, mask: Tensor | None = None
) -> Fit:
    """Least squares on the inputs that stay.

    Args:
        layer: whose bias goes along.
        weight: [out, in], the original.
        stats: `gram` of the edited network's inputs; with `cross` the target is half of the way
            toward what the original gave.
        kept: int64, the inputs that stay.
        mask: bool [out, in], the connections that are there.
    """
    return _solved(Problem.of(layer, weight, stats), kept, mask)


def _solved(problem: Problem, kept: Tensor, mask: Tensor | None) -> Fit:
    aim, gram = problem.weight.double(), problem.gram
    if mask is not None:
        stays = torch.zeros_like(mask)
        stays[:, kept] = mask[:, kept]
        return problem.fit(
            masked_least_squares(problem.weight, gram, stays, problem.weight, _STEPS, _RIDGE)
        )
    cross = gram[kept] @ aim.T  # [kept, out]
    solved = ridge(gram[kept][:, kept], cross, _RIDGE, aim[:, kept].T)
    made = torch.zeros_like(problem.weight)
    made[:, kept] = solved.T.float()
    return problem.fit(made)


def silenced(layer: nn.Module, consumer: Consumer, kept: list[int]) -> Fit:
    """The layer as it was, but for what it read of the units that go."""
    weight = consumer.matrix(layer).clone()
    gone = torch.ones(len(consumer.columns), dtype=torch.bool)
    gone[kept] = False
    weight[:, consumer.columns[gone].flatten()] = 0
    return Fit(weight, None)


@dataclass(frozen=True)
class Group:
    """Neurons that one linear layer reads and linear layers make.

    Attributes:
        consumer: path of the layer that reads them.
        units: its input channels by unit, e.g. the channels of one head.
        producers: by path, the output channels of each unit.
    """

    consumer: str
    units: tuple[tuple[int, ...], ...]
    producers: dict[str, tuple[tuple[int, ...], ...]]

    @classmethod
    def of(cls, group: Units) -> Group | None:
        """The same as `group`, None where it is more than that."""
        readers = [m for m in group.members if m.summed]
        if len(readers) != 1 or not readers[0].name.endswith(".weight"):
            return None
        makers = {
            m.name.removesuffix(".weight"): tuple(map(tuple, m.places.tolist()))
            for m in group.members if not m.summed and m.name.endswith(".weight") and m.dim == 0
        }  # fmt: skip
        units = tuple(map(tuple, readers[0].places.tolist()))
        return cls(readers[0].name.removesuffix(".weight"), units, makers)


def put(module: nn.Module, layer: nn.Module, fit: Fit) -> None:
    """Give a layer of a module what becomes of it."""
    for name, value in (("weight", fit.weight), ("bias", fit.bias)):
        if value is not None:
            own: Tensor = getattr(layer, name)
            replace_tensor(owners(module), own, value.reshape(own.shape).to(own))


def collect(
    stream: Stream, layers: dict[str, nn.Module], needs: frozenset[str],
    reference: Stream | None = None,
) -> dict[str, LayerStats]:  # fmt: skip
    """Statistics of layers anywhere in the network, by path, by running the whole of it."""
    return stream.collect(Unit("whole", stream.model, layers, stream, None), needs, reference)


class Remaining:
    """Slices of groups that leave one after the other, numbered as what is left then is."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._left: dict[tuple[str, int], Tensor] = {}

    def slices(self, group: Units, kept: list[int]) -> list[Slice]:
        """Of one more group; what reads it comes first."""
        stays = set(kept)
        gone = [unit for unit in range(group.count) if unit not in stays]
        made = []
        for member in sorted(group.members, key=lambda m: not m.summed):
            key = member.name, member.dim
            left = self._left.get(key)
            if left is None:
                holder, _, name = member.name.rpartition(".")
                own: Tensor = getattr(self._module.get_submodule(holder), name)
                left = torch.arange(own.shape[member.dim])
            index = (~torch.isin(left, member.places[gone])).nonzero().flatten()
            self._left[key] = left[index]
            made.append(Slice(member.name, member.dim, index))
        return made


def described(settings: list[Setting], prefix: str) -> list[Setting]:
    """The same, of modules below a path."""
    return [Setting(f"{prefix}.{s.path}".rstrip("."), s.name, s.value) for s in settings]
