"""Constrain: learn in training which weights, neurons or layers go, under a budget.

    minimise over gates g (and weights w)   loss(w, g)   under   cost(g) <= (1 - budget) cost(1)

The network computes with a gate at everything that may go (see `penjing.constraints`); the budget
is drawn in while it is trained toward its original. What is learned is a choice: the step that
comes next with the criterion `learned` (`prune`, `shrink`, `cut`) takes the rest away, proves it
and repairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from penjing.calibrate import LayerStats, Unit
from penjing.errors import UsageError
from penjing.gating import Constraint
from penjing.lagrangian import AugmentedLagrangian
from penjing.model import Batch, parent_of
from penjing.objective import Objective, check_loss
from penjing.recipe import Edit
from penjing.registry import choices, lookup
from penjing.steps._candidates import Candidates, Layers, Weights
from penjing.steps._cost import MEASURES
from penjing.steps._gates import Gates
from penjing.steps._importance import needs_of
from penjing.steps._units import Neurons
from penjing.training import Taken, check_optimizer, descend

__all__ = ["OF", "Constrain"]

OF = "weights", "neurons", "layers"
# Share of the way on which the budget is drawn in.
_DRAWN = 0.5
# Where weights are trained too: share of the way after which what goes is gone.
_HARD = 0.7
# Most that a penalty takes off in a step, in learning rates.
_FARTHEST = 3.0
_PART = 0.01


@dataclass(frozen=True)
class Constrain:
    """Learn what goes.

    Attributes:
        budget: fraction that goes, 0 to 1.
        of: `weights`, `neurons` or `layers`.
        measure: what the budget is of: `units` themselves, or of neurons `parameters` or `macs` of
            the whole network.
        method: a name of `penjing.constraints`.
        criterion: whose order the gates start from: of neurons `gram` or a name of
            `penjing.criteria`, of weights one of the latter, of layers `influence`.
        steps: of gradient descent.
        lr: peak learning rate of the gates.
        weights_lr: of the network's own parameters; 0 leaves them as they are.
        optimizer: see `penjing.training.descend`.
        loss: see `penjing.objective.Objective`.
        multiple: kept neurons of a group are a multiple of this where the budget lets them.
        seed: of the order of the batches and of random gates.
        targets: globs of layers whose weights, or inputs, may go; of blocks.
    """

    name: ClassVar[str] = "constrain"
    scope: ClassVar[str] = "model"

    budget: float = 0.5
    of: str = "neurons"
    measure: str = "units"
    method: str = "gates"
    criterion: str | None = None
    steps: int = 200
    lr: float = 0.05
    weights_lr: float = 0.0
    optimizer: str = "adamw"
    loss: str | None = None
    multiple: int = 8
    seed: int = 0
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value, known in (("of", self.of, OF), ("measure", self.measure, MEASURES)):
            if value not in known:
                raise UsageError(f"unknown {name}", got=value, allowed=", ".join(known))
        if self.measure != "units" and self.of != "neurons":
            raise UsageError(f"measure of {self.of}", got=self.measure, allowed="units")
        if not 0 < self.budget < 1:
            raise UsageError("budget", got=self.budget, allowed="0 < budget < 1")
        if not 0 < self.lr < 1:
            raise UsageError("lr", got=self.lr, allowed="0 < lr < 1")
        if not 0 <= self.weights_lr < 1:
            raise UsageError("weights_lr", got=self.weights_lr, allowed="0 <= weights_lr < 1")
        for name, number in (("steps", self.steps), ("multiple", self.multiple)):
            if number < 1:
                raise UsageError(name, got=number, allowed="1 or more")
        lookup("constraints", self.method, "constraint")
        self._check_criterion()
        check_loss(self.loss)
        check_optimizer(self.optimizer)

    @property
    def needs(self) -> frozenset[str]:
        """Slopes, where the order that the gates start from is theirs."""
        given = self.criterion is not None and self.of != "layers"
        return needs_of(str(self.criterion)) & {"gradient"} if given else frozenset()

    def _check_criterion(self) -> None:
        known = {"neurons": ("gram", *choices("criteria")), "layers": ("influence",)}
        allowed = known.get(self.of, choices("criteria"))
        own = self.of != "layers" and ":" in (self.criterion or "")  # file.py:function
        if self.criterion is not None and self.criterion not in allowed and not own:
            raise UsageError(
                f"criterion that gates of {self.of} start from", got=self.criterion,
                allowed=", ".join(allowed),
            )  # fmt: skip

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """The network's parameters where they were trained, then what stays."""
        if not unit.batches or unit.original is None:
            raise UsageError("constrain needs data", next="give --data")
        candidates = self._candidates(unit)
        learned = _Learning(self, unit, candidates)
        kept = learned.run()
        moved = f"loss {learned.first:.3g} to {learned.last:.3g} of the loss without all of them"
        why = f"{self.steps} steps of {self.method}, {moved}"
        if self.weights_lr:
            yield from learned.weights(f"trained under the constraint: {why}")
        share = 1 - candidates.real(kept)
        yield from candidates.edits(kept, f"{why}; {share:.2%} of the {self.measure} go")

    def _candidates(self, unit: Unit) -> Candidates:
        criterion = self.criterion
        if self.of == "layers":
            return Layers(unit, self.targets)
        if self.of == "weights":
            return Weights(unit, self.targets, criterion or "wanda")
        return Neurons(
            unit, self.targets, criterion or "gram", self.measure, self.budget, self.multiple
        )

    def allowed(self, done: float) -> float:
        """Share of the cost that may be left, drawn in as a cube (Zhu and Gupta, arXiv 1710.01878).

        Args:
            done: share of the way, 0 to 1.
        """
        return 1 - self.budget * (1 - (1 - min(1.0, done / _DRAWN)) ** 3)


class _Learning:
    """One run of gradient descent.

    Attributes:
        kept: what stays, bool, once it is chosen.
        first, last: mean loss of the first and the last steps, over that without all that may go.
    """

    def __init__(self, step: Constrain, unit: Unit, candidates: Candidates) -> None:
        assert unit.original is not None
        self._step, self._candidates, self._batches = step, candidates, list(unit.batches)
        self._far = Objective(unit.original, step.loss)
        self._method: Constraint = lookup("constraints", step.method, "constraint")(
            candidates.extent, step.budget
        )
        self._guess = candidates.guess()
        self._variable = self._method.start(self._guess).requires_grad_(True)
        self._random = torch.Generator().manual_seed(step.seed)
        self._limit = AugmentedLagrangian()
        self._student = unit.model.copy()
        self._own = {n: p for n, p in self._student.parameters() if n not in unit.model.planes}
        for parameter in self._student.module.parameters():
            parameter.requires_grad_(False)
        for parameter in self._own.values() if step.weights_lr else ():
            parameter.requires_grad_(True)
        self._gates = Gates(self._student)
        candidates.attach(self._gates)
        self.kept: Tensor | None = None
        self.first = self.last = float("nan")

    def run(self) -> Tensor:
        """What stays; with the network's own parameters the last steps are made with it alone."""
        step, groups = self._step, [([self._variable], self._step.lr * self._method.rate)]
        if step.weights_lr:
            groups.append((list(self._own.values()), step.weights_lr))
        self._whole = self._unit()
        losses = []
        for taken in descend(
            self._batches, groups, self._value, steps=step.steps, seed=step.seed,
            optimizer=step.optimizer,
        ):  # fmt: skip
            losses.append(self._loss)
            with torch.no_grad():
                self._after(taken)
        few = max(1, len(losses) // 10)
        self.first, self.last = (sum(part) / few for part in (losses[:few], losses[-few:]))
        return self._harden() if self.kept is None else self.kept

    def _unit(self) -> float:
        """The loss that others are measured in: of the first guess, cut at the budget.

        A guess that costs nothing is no measure; then it is a part of what all together cost.
        """
        kept = self._candidates.choose(self._guess, self._step.budget)
        found = []
        for values in (kept.float(), torch.zeros(len(kept))):
            self._gates.values = values
            with torch.no_grad():
                found.append(float(self._far(self._student, self._batches[0])))
        return max(found[0], _PART * found[1], 1e-9)

    def _value(self, batch: Batch, done: float) -> Tensor:
        if self.kept is None and self._step.weights_lr and done >= _HARD:
            self.kept = self._harden()
        if self.kept is None:
            self._gates.values = self._method.gate(self._variable, self._random)
        loss = self._far(self._student, batch) / self._whole
        self._loss = float(loss.detach())
        if self.kept is not None:
            return loss
        counts = self._method.count(self._variable, done)
        excess = self._candidates.left(counts) - self._step.allowed(done)
        self._excess = float(excess.detach())
        return loss + self._limit.term(excess) if excess.requires_grad else loss

    def _after(self, taken: Taken) -> None:
        for name, mask in self._student.masks.items():
            if name in self._own:
                self._own[name].mul_(mask)
        if self.kept is not None:
            return
        self._limit.update(self._excess)
        # Before there are gradients to go by, a step has no length.
        most = _FARTHEST * self._step.lr * self._method.rate
        pull = self._limit.multiplier / self._candidates.count
        length = torch.as_tensor(taken.length(self._variable)).expand_as(self._variable)
        self._method.after(self._variable, (length * pull).clamp_max(most), taken.done)

    def _harden(self) -> Tensor:
        """Choose, and leave the gates of what stays as they are where weights can hold them."""
        with torch.no_grad():
            score = self._method.score(self._variable)
            kept = self._candidates.choose(score, self._step.budget)
            gate = self._method.gate(self._variable, None)
            self._gates.values = kept * (gate if self._candidates.foldable else 1.0)
        return kept

    def weights(self, why: str) -> Iterator[Edit]:
        """The network's parameters, with the gates in them."""
        for name in self._own:
            holder, own = parent_of(self._student.module, name)
            yield Edit("weight", name, getattr(holder, own).detach().clone(), why)
