"""Recover: gradient descent after an edit, toward the original network's outputs.

Distillation without labels (Hinton et al., arXiv 1503.02531): the edited network is trained on
the calibration data to give what the original gives. Masked connections stay zero. Of quantized
weights the scales are trained, and where asked the codes: see `_grid`. Tables keep theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from penjing.calibrate import LayerStats, Unit
from penjing.errors import UsageError
from penjing.model import Batch, Model
from penjing.recipe import Edit
from penjing.steps._grid import Grid, attach
from penjing.steps._select import matches
from penjing.training import Objective, check_loss, descend, held_out

__all__ = ["Recover"]

# Learning rates of scales and of codes, both in units of the scale, over that of floats.
_SCALES, _CODES = 2.0, 20.0


@dataclass(frozen=True)
class Recover:
    """Train what is left.

    Attributes:
        seconds: wall-clock limit; 0 means none.
        steps: gradient steps at the most; 0 means none. A run limited by steps alone is
            reproducible.
        lr: peak learning rate of AdamW, reached after 5 % and falling to 0 as a cosine.
        loss: as `penjing.training.Objective` takes it; by default the original's outputs.
        seed: order of the batches.
        targets: globs of parameter paths; without any, every one.
        codes: learn the codes of quantized weights too (quantization-aware training); of one
            plane of integers, without removed connections.
    """

    name: ClassVar[str] = "recover"
    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset()

    seconds: float = 60.0
    steps: int = 0
    lr: float = 1e-4
    loss: str | None = None
    seed: int = 0
    targets: tuple[str, ...] = ()
    codes: bool = False

    def __post_init__(self) -> None:
        if self.seconds < 0 or self.steps < 0 or not (self.seconds or self.steps):
            raise UsageError("recover", allowed="seconds or steps above 0")
        if not 0 < self.lr < 1:
            raise UsageError("lr", got=self.lr, allowed="0 < lr < 1")
        check_loss(self.loss)

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """New values of every trained parameter, if held-out batches say that they are better."""
        if not unit.batches or unit.original is None:
            raise UsageError("recover needs data", next="give --data")
        student, teacher = unit.model.copy(), unit.original
        far = Objective(teacher, self.loss)
        train, test = held_out(unit.batches)

        def judged() -> float:
            return sum(far.exact(student, batch) for batch in test) / max(1, len(test))

        before = judged()
        trained = {
            n: p for n, p in student.parameters() if n not in student.planes and self._wanted(n)
        }
        chosen = [n for n in student.planes if self._wanted(n)]
        behind = dict(teacher.parameters()) if self.codes else {}
        grids = attach(student, chosen, {n: p.detach() for n, p in behind.items()})
        if not trained and not grids:
            raise UsageError("nothing to train", got=", ".join(self.targets) or "only tables")
        taken, last = self._train(train, trained, grids, student, far)
        after = judged()
        if test and not after < before:
            return
        why = f"{taken} steps of distillation"
        if test:
            why += f"; held-out loss {before:.4g} to {after:.4g}"
        old = dict(unit.model.parameters())
        for name, parameter in trained.items():
            if not torch.equal(parameter.data, old[name].data):
                yield Edit("weight", name, parameter.detach().clone(), why, {"loss": last})
        for name, grid in grids.items():
            yield Edit("quantize", name, grid.result(), f"scales by {why}", {"loss": last})

    def _wanted(self, name: str) -> bool:
        return matches(name, self.targets)

    def _train(
        self, batches: list[Batch], trained: dict[str, nn.Parameter], grids: dict[str, Grid],
        student: Model, far: Objective,
    ) -> tuple[int, float]:  # fmt: skip
        """Steps made, and the loss of the last."""
        for parameter in student.module.parameters():
            parameter.requires_grad_(False)
        kinds: list[tuple[list[nn.Parameter], float]] = [
            (list(trained.values()), self.lr),
            ([p for g in grids.values() for p in g.scales()], self.lr * _SCALES),
            ([g.v for g in grids.values() if g.v is not None], self.lr * _CODES),
        ]
        kinds = [(own, rate) for own, rate in kinds if own]
        for own, _ in kinds:
            for parameter in own:
                parameter.requires_grad_(True)
        losses = [float("nan")]
        for taken in descend(
            batches, kinds, lambda batch, _: far(student, batch),
            steps=self.steps, seconds=self.seconds, seed=self.seed,
        ):  # fmt: skip
            losses.append(taken.loss)
            with torch.no_grad():
                for name, mask in student.masks.items():
                    if name in trained:
                        trained[name].masked_fill_(~mask, 0)
        return len(losses) - 1, losses[-1]
