"""Prune: single connections go away, through a mask.

A criterion scores each weight; the lowest go. A pruner chooses the mask and fits what stays to
what the layer gave. Both by one fraction, of single weights or of whole blocks, or by a pattern
n:m: all but the n best of every m inputs. One fraction may be of all layers together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from penjing.calibrate import LayerStats, Unit
from penjing.errors import UsageError
from penjing.linalg import masked_least_squares
from penjing.masks import Pattern
from penjing.model import Batch, Model
from penjing.recipe import Edit
from penjing.registry import choices, constant, lookup
from penjing.steps._allocation import check_comparable, fractions
from penjing.steps._problem import Problem
from penjing.steps._select import LEARNED, canonical, matrix_layers, selected

__all__ = ["RANKINGS", "Prune"]

RANKINGS = ("layer", "global")


@dataclass(frozen=True)
class Prune:
    """Remove connections.

    Attributes:
        sparsity: fraction of the weights that go, 0 to 1.
        criterion: a name of `penjing.pruners` or `penjing.criteria`, or `file.py:function`, a
            criterion of one's own; `learned` in place of `sparsity`: the mask that the step
            `constrain` before it chose, and what stays fitted to it.
        pattern: `n:m` keeps n of every m inputs and overrides `sparsity`; `RxC` removes whole
            blocks of R outputs by C inputs.
        alpha: how far a pruner's target goes toward what the layer gave in the network before, 0
            to 1 (see `penjing.linalg.asymmetric_target`).
        bias: a pruner's layers hold the mean of what is lost in their biases.
        targets: globs of layer paths; without any, every layer inside the blocks.
        ranking: `layer` for the same fraction of every layer, or `global`: of all together, layers
            ranked against each other (`penjing.steps._allocation`); of single weights, by a
            pruner, taylor or fisher.
        fractions: what goes of each layer, by path, in place of `sparsity`; others stay whole.
    """

    name: ClassVar[str] = "prune"
    scope: ClassVar[str] = "block"

    sparsity: float = 0.5
    criterion: str = "wanda"
    pattern: str | None = None
    alpha: float = 0.5
    bias: bool = True
    targets: tuple[str, ...] = ()
    ranking: str = "layer"
    fractions: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise UsageError("sparsity", got=self.sparsity, allowed="0 <= sparsity < 1")
        if not 0 <= self.alpha <= 1:
            raise UsageError("alpha", got=self.alpha, allowed="0 to 1")
        _ = self._pattern  # refuses what is none
        known = (*choices("criteria"), *choices("pruners"), LEARNED)
        if ":" not in self.criterion and self.criterion not in known:
            raise UsageError(
                "unknown name in criteria", got=repr(self.criterion), allowed=", ".join(known)
            )
        if self.ranking not in RANKINGS:
            raise UsageError("ranking", got=repr(self.ranking), allowed=", ".join(RANKINGS))
        if self.ranking == "global":
            if self.pattern is not None:
                raise UsageError(
                    "a pattern with ranking global", got=self.pattern, allowed="none",
                    next="leave the ranking out: a pattern is the same in every layer",
                )  # fmt: skip
            check_comparable(self.criterion)
        given = {} if self.fractions is None else self.fractions
        if not isinstance(given, Mapping) or any(not 0 <= part < 1 for part in given.values()):
            raise UsageError("fractions", got=given, allowed="0 to 1 of each layer, by its path")

    @property
    def portion(self) -> float:
        """Of the calibration data what is looked at."""
        own = self.criterion in choices("pruners")
        return float(constant("pruners", self.criterion, "portion", 1.0)) if own else 1.0

    def settled(self, model: Model, batches: Sequence[Batch]) -> Prune:
        """The same with the fraction of each layer, where that is for the network to say.

        Raises:
            UsageError: it is, and there is no data.
        """
        if self.fractions is not None or self.ranking == "layer":
            return self
        return replace(self, fractions=fractions(model, self, batches), ranking="layer")

    @property
    def _pattern(self) -> Pattern:
        says = self.pattern is not None and ":" in self.pattern
        return Pattern.parse(self.pattern, None if says else self.sparsity)

    @property
    def _fits(self) -> bool:
        return self.criterion == LEARNED or self.criterion in choices("pruners")

    @property
    def staged(self) -> bool:
        """Whether later layers of a block see what is left of its earlier ones."""
        return self._fits

    @property
    def needs(self) -> frozenset[str]:
        """Nothing for a criterion that looks at no data."""
        if self._fits:
            return frozenset({"gram", "cross"} if self.alpha else {"gram"})
        wanted: frozenset[str] = constant("criteria", self.criterion, "needs", frozenset({"gram"}))
        return wanted

    def layers(self, unit: Unit) -> dict[str, nn.Module]:
        """The layers of a unit that are pruned, by path."""
        if self.criterion == LEARNED:
            return {n: m for n, m in selected(unit, self.targets).items()
                    if canonical(unit.model, f"{n}.weight") in unit.model.kept}  # fmt: skip
        found = matrix_layers(unit, self.targets)
        return found if self.fractions is None else {
            path: layer for path, layer in found.items() if path in self.fractions
        }  # fmt: skip

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """One mask a layer, and with a pruner a weight."""
        chosen = replace(unit, layers=self.layers(unit))
        if not chosen.layers:
            return
        for part, found in chosen.staged(self.needs, stats):
            yield from self._plan(part, found)

    def _plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        for path, layer in unit.layers.items():
            pattern = self._pattern
            if self.fractions is not None:
                pattern = replace(pattern, sparsity=self.fractions[path])
            weight = layer.weight.detach()  # type: ignore[operator]
            matrix = weight.reshape(len(weight), -1).float()  # [out, in]
            own = stats.get(path)
            if "gram" in self.needs and (own is None or own.norm is None):
                why = f"its outputs have no one vector of inputs: {_without_inputs()} can prune it"
                yield Edit("left", path, None, why)
                continue
            if "gradient" in self.needs and (own is None or own.gradient is None):
                continue  # the loss does not depend on it
            name = canonical(unit.model, f"{path}.weight")
            fitted = None
            if self._fits:
                assert own is not None
                problem = Problem.of(layer, matrix, own, self.alpha, means=self.bias)
                fit = self._pruner(unit.model.kept.get(name))
                made, mask = fit(problem.weight, pattern, replace(own, gram=problem.gram))
                fitted = problem.fit(made)
            else:
                scores = lookup("criteria", self.criterion, "score")(matrix, own)
                # Wanda compares the weights of one output only (Sun et al., section 3).
                mask = pattern.mask(scores, per_row=self.criterion == "wanda")
            gone = 1 - float(mask.float().mean())
            why = f"{pattern} of the connections, least important by {self.criterion}"
            if self.criterion == LEARNED:
                why = f"{gone:.0%} of the connections, learned in training"
            yield Edit("mask", name, mask.reshape(weight.shape), why, {"sparsity": gone})
            if fitted is not None:
                why = "fitted to the output"
                yield Edit("weight", name, fitted.weight.reshape(weight.shape), why)
                if fitted.bias is not None:
                    yield Edit("weight", f"{path}.bias", fitted.bias, why)

    def _pruner(self, kept: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]]:
        """What fits a weight to a mask of its own making, or to one that is given."""
        if self.criterion != LEARNED:
            return lookup("pruners", self.criterion, "fit")  # type: ignore[no-any-return]

        def fit(weight: Tensor, _: Pattern, stats: LayerStats) -> tuple[Tensor, Tensor]:
            assert kept is not None
            assert stats.gram is not None
            mask = kept.reshape(weight.shape)
            return masked_least_squares(weight, stats.gram, mask, weight), mask

        return fit


def _without_inputs() -> str:
    """Criteria that look at no inputs of a layer, said."""
    names = (n for n in choices("criteria") if "gram" not in constant("criteria", n, "needs", ()))
    *most, last = sorted(names)
    return f"{', '.join(most)} and {last}"
