"""One run of recovery: what is trained, how it goes down, what is kept.

Held-out batches are looked at on the way where training may end early; the best that was seen is
what is kept. The values that are trained, how far they are and all that was seen so far is one
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penjing import sharding
from penjing.checkpoint import Checkpoint
from penjing.model import Batch, Model, parent_of
from penjing.progress import curve
from penjing.steps._grid import Grid
from penjing.steps._lowrank import LowRank
from penjing.training import Descent, descend

__all__ = ["Penalty", "Trained", "curve_of", "train"]

# Learning rates of scales, of codes (both in units of the scale), of low-rank factors, over that
# of floats.
_SCALES, _CODES, _FACTORS = 2.0, 20.0, 10.0
# Looks at the held-out batches on the way.
_LOOKS = 20
# Of a curve in the report.
_POINTS = 100


@dataclass(frozen=True)
class Penalty:
    """What weights cost beside the loss: l1 sum |w| + l2 / 2 sum w^2 + group sum over rows |w_row|.

    A row's norm counts times the root of its length (group lasso, Yuan and Lin 2006, section 2).
    """

    l1: float = 0.0
    l2: float = 0.0
    group: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.l1 or self.l2 or self.group)

    def __call__(self, weights: Sequence[Tensor]) -> Tensor:
        """Scalar, of matrices [out, ...]."""
        total = torch.zeros(())
        for weight in weights:
            rows = weight.flatten(1)  # [out, in]
            if self.l1:
                total = total + self.l1 * rows.abs().sum()
            if self.l2:
                total = total + self.l2 / 2 * rows.square().sum()
            if self.group:
                total = total + self.group * rows.shape[1] ** 0.5 * rows.norm(dim=1).sum()
        return total


@dataclass
class Trained:
    """What is trained of a student.

    Attributes:
        student: its parametrized weights stay so.
        floats, factors, grids: by name of the weight.
    """

    student: Model
    floats: dict[str, nn.Parameter]
    factors: dict[str, LowRank]
    grids: dict[str, Grid]

    def groups(self, lr: float) -> list[tuple[list[nn.Parameter], float]]:
        """Parameters and their peak learning rates; all others are held."""
        for parameter in self.student.module.parameters():
            parameter.requires_grad_(False)
        grids = self.grids.values()
        kinds: list[tuple[list[nn.Parameter], float]] = [
            (list(self.floats.values()), lr),
            ([p for low in self.factors.values() for p in (low.a, low.b)], lr * _FACTORS),
            ([p for grid in grids for p in grid.scales()], lr * _SCALES),
            ([grid.v for grid in grids if grid.v is not None], lr * _CODES),
        ]
        kinds = [(own, rate) for own, rate in kinds if own]
        for own, _ in kinds:
            for parameter in own:
                parameter.requires_grad_(True)
        return kinds

    def only(self, wanted: Callable[[str], bool]) -> Trained:
        """The part of it with the names that are wanted."""
        return Trained(
            self.student,
            {n: p for n, p in self.floats.items() if wanted(n)},
            {n: p for n, p in self.factors.items() if wanted(n)},
            {n: p for n, p in self.grids.items() if wanted(n)},
        )

    def inside(self, block: str) -> Trained:
        """What of it stands in one block."""
        return self.only(lambda name: name.startswith(f"{block}."))

    def weight(self, name: str) -> Tensor:
        """As the network computes with it, whole."""
        holder, own = parent_of(self.student.module, name)
        return sharding.whole(getattr(holder, own))

    def matrices(self) -> list[Tensor]:
        """Float weights with rows."""
        return [w for n in (*self.floats, *self.factors) if (w := self.weight(n)).ndim > 1]

    @torch.no_grad()
    def keep_masks(self) -> None:
        """Removed connections are zero again."""
        for name, mask in self.student.masks.items():
            if name in self.floats:
                held = self.floats[name]
                held.masked_fill_(sharding.like(~mask, held), 0)


def curve_of(losses: Sequence[float]) -> Tensor:
    """Losses of all steps as at most 100 means, each of a part of the way."""
    parts = torch.tensor(losses).tensor_split(min(_POINTS, len(losses)))
    return torch.stack([part.mean() for part in parts])


def train(
    what: Trained, batches: Sequence[Batch], value: Callable[[Batch, float], Tensor],
    judged: Callable[[], float], *, lr: float, steps: int, seconds: float, seed: int,
    optimizer: str, descent: Descent, penalty: Penalty, patience: int, start: float,
    checkpoint: Checkpoint,
) -> tuple[list[float], float]:  # fmt: skip
    """Go down, and leave what is best in place.

    Args:
        value: the loss of a batch, and the share of the way that is done.
        judged: of held-out batches.
        patience: looks without a gain that end it; 0 for no looks, then the last is kept.
        start: `judged` before.
        checkpoint: see `penjing.training.descend`.

    Returns:
        The loss of every step, and `judged` at the end.
    """
    groups = what.groups(lr)
    leaves = [p for own, _ in groups for p in own]
    checkpoint.notes = {"losses": [], "look": 0, "best": start, "stale": 0}
    checkpoint.tensors = {}

    def whole(batch: Batch, done: float) -> Tensor:
        found = value(batch, done)
        return found + penalty(what.matrices()) if penalty else found

    with curve("recover") as show:
        for taken in descend(
            batches, groups, whole, steps=steps, seconds=seconds, seed=seed, optimizer=optimizer,
            descent=descent, checkpoint=checkpoint,
        ):  # fmt: skip
            what.keep_masks()
            notes = checkpoint.notes
            notes["losses"].append(taken.loss)
            show(taken.done, taken.loss)
            if not patience or int(taken.done * _LOOKS) == notes["look"]:
                continue
            notes["look"] = int(taken.done * _LOOKS)
            found = judged()
            if found < notes["best"]:
                notes["best"], notes["stale"] = found, 0
                checkpoint.tensors = {f"{i}": p.detach().clone() for i, p in enumerate(leaves)}
            else:
                notes["stale"] += 1
            if notes["stale"] >= patience:
                break
    after = judged()
    if checkpoint.tensors and after > checkpoint.notes["best"]:
        after = float(checkpoint.notes["best"])
        with torch.no_grad():
            for number, parameter in enumerate(leaves):
                parameter.copy_(checkpoint.tensors[f"{number}"])
    return [float(loss) for loss in checkpoint.notes["losses"]], after
