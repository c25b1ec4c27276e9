"""What may go, for a sparsity constraint to choose from: single weights, or whole layers.

Neurons are in `_units`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats, Stream, Unit, units_of
from penjing.errors import InputError
from penjing.gating import Extent
from penjing.gradients import slopes
from penjing.graph import is_weighted
from penjing.model import Batch, Model
from penjing.recipe import Edit
from penjing.registry import lookup
from penjing.steps._gates import Gates
from penjing.steps._importance import needs_of
from penjing.steps._select import canonical, matches
from penjing.steps.cut import influence

__all__ = ["Candidates", "Layers", "Weights", "ranks", "refuse_quantized", "statistics"]


class Candidates(Protocol):
    """What may go, a gate for each.

    Attributes:
        count: gates.
        extent: of what they multiply.
        foldable: a gate can go into the weights.
    """

    foldable: ClassVar[bool]

    @property
    def count(self) -> int: ...
    @property
    def extent(self) -> Extent: ...

    def attach(self, gates: Gates) -> None:
        """Put the gates in their places."""

    def guess(self) -> Tensor:
        """Importances to begin with, 0 to 1, [count]."""

    def left(self, counts: Tensor) -> Tensor:
        """Share of the cost that is left, a scalar, of how far each is there [count]."""

    def real(self, kept: Tensor) -> float:
        """The same of what is there or not, bool [count], counted."""

    def choose(self, score: Tensor, budget: float) -> Tensor:
        """What stays, bool [count], with the largest scores as far as the budget lets them."""

    def edits(self, kept: Tensor, why: str) -> Iterator[Edit]:
        """The decision."""


def ranks(score: Tensor) -> Tensor:
    """Place of each in the order of the scores, 0 for the least to 1 for the largest."""
    order = torch.sort(score, stable=True).indices
    made = torch.empty(len(score))
    made[order] = torch.linspace(0, 1, len(score))
    return made


def _largest(score: Tensor, budget: float) -> Tensor:
    kept = torch.ones(len(score), dtype=torch.bool)
    kept[torch.sort(score, stable=True).indices[: round(budget * len(score))]] = False
    return kept


def refuse_quantized(model: Model, layers: Sequence[str]) -> None:
    """Codes of integers cannot be gated.

    Raises:
        InputError: the weight of one of the layers is quantized.
    """
    for path in layers:
        if canonical(model, f"{path}.weight") in model.planes:
            raise InputError(
                f"a constraint on {path}, which is quantized already",
                next="put quantize last in the recipe, or start from an unquantized model",
            )


def statistics(
    model: Model, batches: Sequence[Batch], layers: dict[str, nn.Module],
    needs: frozenset[str] = frozenset({"gram"}),
) -> Iterator[dict[str, LayerStats]]:  # fmt: skip
    """Of what layers read, by path, a block at a time."""
    stream = Stream(model, batches, slopes(model, batches, needs, layers))
    for unit in list(units_of(model, stream)):
        if own := {n: m for n, m in unit.layers.items() if n in layers}:
            if unit.index is not None:
                stream.enter(unit.index)
            yield stream.collect(replace(unit, layers=own), needs)


def _has_matrix(layer: nn.Module) -> bool:
    """Whether all its outputs see one vector of inputs, as `prune` needs."""
    return (
        is_weighted(layer)
        and not isinstance(layer, nn.Embedding)
        and getattr(layer, "groups", 1) == 1
    )


class Weights:
    """Single weights of linear layers and convolutions.

    Args:
        targets: globs of layers; without any those inside the blocks.
        criterion: of `penjing.criteria`, whose order within a layer the guess is.
    """

    foldable: ClassVar[bool] = True

    def __init__(self, unit: Unit, targets: tuple[str, ...], criterion: str) -> None:
        model = unit.model
        wanted = targets or tuple(f"{block}.*" for block in model.blocks)
        self._layers = {
            canonical(model, f"{path}.weight"): path for path, layer in model.module.named_modules()
            if _has_matrix(layer) and matches(path, wanted)
        }  # fmt: skip
        if not self._layers:
            raise InputError("no layers whose weights may go", next="see penjing inspect")
        refuse_quantized(model, list(self._layers.values()))
        self._model, self._batches, self._criterion = model, unit.batches, criterion
        self._places: dict[str, tuple[int, int, torch.Size]] = {}
        end = 0
        for name in self._layers:
            shape = model.module.get_parameter(name).shape
            self._places[name] = end, end + shape.numel(), shape
            end += shape.numel()
        self.count = end

    @property
    def extent(self) -> Extent:
        """Their sizes, over the mean of the layer."""
        sizes = [self._model.module.get_parameter(n).detach().abs().flatten() for n in self._places]
        whole = torch.cat([size / size.mean().clamp_min(1e-30) for size in sizes]).float()
        return Extent(whole, whole)

    def attach(self, gates: Gates) -> None:
        """One each."""
        for name, (first, last, shape) in self._places.items():

            def spread(
                values: Tensor, first: int = first, last: int = last, shape: torch.Size = shape
            ) -> Tensor:
                return values[first:last].view(shape)

            gates.on_parameter(name, spread)

    def guess(self) -> Tensor:
        """Ranks within a layer."""
        score = lookup("criteria", self._criterion, "score")
        layers = {path: self._model.module.get_submodule(path) for path in self._layers.values()}
        found: dict[str, Tensor] = {}
        needs = needs_of(self._criterion) | {"gram"}
        for stats in statistics(self._model, self._batches, layers, needs):
            for path, own in stats.items():
                matrix = layers[path].weight.detach().float().flatten(1)  # type: ignore[operator]
                found[path] = ranks(score(matrix, own).flatten())
        return torch.cat([found[path] for path in self._layers.values()])

    def left(self, counts: Tensor) -> Tensor:
        """Mean."""
        return counts.mean()

    def real(self, kept: Tensor) -> float:
        """Mean."""
        return float(kept.double().mean())

    def choose(self, score: Tensor, budget: float) -> Tensor:
        """Of all layers together: how much of each goes is learned too."""
        return _largest(score, budget)

    def edits(self, kept: Tensor, why: str) -> Iterator[Edit]:
        """Of each parameter what stays."""
        for name, (first, last, shape) in self._places.items():
            yield Edit("keep", name, kept[first:last].view(shape).clone(), why)


class Layers:
    """Whole blocks that keep the shape of what enters them."""

    foldable: ClassVar[bool] = False

    def __init__(self, unit: Unit, targets: tuple[str, ...]) -> None:
        model = unit.model
        if len(model.blocks) < 2:
            raise InputError("no repeated blocks", got=len(model.blocks), allowed="2 or more")
        scores = {piece.block: s for piece, s in influence(Stream(model, unit.batches)).items()}
        self._scores = {i: s for i, s in scores.items() if matches(model.blocks[i], targets)}
        self._model = model
        self.count = len(self._scores)

    @property
    def extent(self) -> Extent:
        """All alike."""
        return Extent(torch.ones(self.count), torch.ones(self.count))

    def attach(self, gates: Gates) -> None:
        """On the difference that each makes."""
        for number, index in enumerate(self._scores):
            gates.on_block(self._model.blocks[index], number)

    def guess(self) -> Tensor:
        """Ranks of block influence."""
        return ranks(torch.tensor(list(self._scores.values())))

    def left(self, counts: Tensor) -> Tensor:
        """Of all blocks, those that cannot go included."""
        whole = len(self._model.blocks)
        return (counts.sum() + whole - self.count) / whole

    def real(self, kept: Tensor) -> float:
        """Likewise."""
        return float(self.left(kept.double()))

    def choose(self, score: Tensor, budget: float) -> Tensor:
        """As many as the fraction of all blocks, rounded, and one at least."""
        gone = max(1, round(budget * len(self._model.blocks)))
        if gone > min(self.count, len(self._model.blocks) - 1):
            most = min(self.count, len(self._model.blocks) - 1)
            raise InputError("too many blocks to cut", got=gone, allowed=f"at most {most}")
        return _largest(score, gone / self.count)

    def edits(self, kept: Tensor, why: str) -> Iterator[Edit]:
        """One for each block that goes."""
        for place, index in enumerate(self._scores):
            if not kept[place]:
                yield Edit("keep", self._model.blocks[index], torch.tensor(False), why)
