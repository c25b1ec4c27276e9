"""Recover: gradient descent after an edit, toward the original network's outputs.

Distillation without labels (Hinton et al., arXiv 1503.02531): the edited network is trained on
the calibration data to give what the original gives, where asked block by block too. Masked
connections stay zero. Of quantized weights the scales are trained, and where asked the codes: see
`_grid`. Tables keep theirs. A matrix may move by a product of low rank alone: see `_lowrank`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from penjing import sharding, together
from penjing.batching import by_length
from penjing.calibrate import LayerStats, Unit
from penjing.checkpoint import Checkpoint
from penjing.errors import UsageError
from penjing.front import Front, front_of
from penjing.model import Batch, Model
from penjing.objective import PRECISIONS, Objective, check_loss
from penjing.recipe import Edit
from penjing.steps._blockwise import blockwise
from penjing.steps._grid import attach
from penjing.steps._lowrank import adapt
from penjing.steps._recovery import Penalty, Trained, curve_of, train
from penjing.steps._select import matches
from penjing.training import UNJUDGED, Descent, check_optimizer, held_out

__all__ = ["Recover"]

# Longer than one look at the held-out batches takes is kept free for the last.
_SPARE = 1.5
# Most of the time that goes to blocks on their own.
_BLOCKS = 0.5
# Share of the way on which a front that is trained is held: steps behind it cost half as much,
# and gain as much at first.
_HELD = 0.25


@dataclass(frozen=True)
class Recover:
    """Train what is left.

    Attributes:
        seconds: wall-clock limit of all that the step does; 0 means none.
        steps: gradient steps at the most; 0 means none. A run limited by steps alone is
            reproducible, also where it was killed and went on.
        lr: peak learning rate of floats.
        loss: as `penjing.objective.Objective` takes it; by default the original's outputs.
        seed: order of the batches.
        targets: globs of parameter paths; without any, every one.
        codes: learn the codes of quantized weights too (quantization-aware training); of one
            plane of integers, without removed connections.
        hidden: weight of the distance of hidden states beside the loss.
        optimizer: `adamw`, `sgd`, `adafactor`, or `file.py:function`.
        schedule, warmup, clip, accumulate, weight_decay: see `penjing.training.Descent`.
        precision: of products, `auto`, `float32` or `bfloat16`.
        l1, l2, group: see `penjing.steps._recovery.Penalty`.
        patience: looks at held-out batches, of 20 on the way, that may pass without a gain; the
            best that was seen is kept. 0 for no looks before the end.
        block_steps: steps on the output of each block, one after the other, before those on the
            whole; see `penjing.steps._blockwise`.
        rank: of what float matrices move by; 0 for matrices that move freely.
        front: train the blocks in front of the first edit too, from a quarter of the way on.
            Until then, and without it all the way, they stay what they are, and so does what
            feeds them: see `penjing.front`.
        shard: divide the trained network between the processes of `torchrun`, see
            `penjing.sharding`.
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
    hidden: float = 0.0
    optimizer: str = "adamw"
    schedule: str = "cosine"
    warmup: float = 0.05
    clip: float = 1.0
    accumulate: int = 1
    weight_decay: float = 0.0
    precision: str = "auto"
    l1: float = 0.0
    l2: float = 0.0
    group: float = 0.0
    patience: int = 0
    block_steps: int = 0
    rank: int = 0
    front: bool = False
    shard: bool = False

    def __post_init__(self) -> None:
        if self.seconds < 0 or self.steps < 0 or not (self.seconds or self.steps):
            raise UsageError("recover", allowed="seconds or steps above 0")
        if not 0 < self.lr < 1:
            raise UsageError("lr", got=self.lr, allowed="0 < lr < 1")
        check_loss(self.loss)
        check_optimizer(self.optimizer)
        self._descent()
        if self.precision not in PRECISIONS:
            raise UsageError("precision", got=self.precision, allowed=", ".join(PRECISIONS))
        for name in ("hidden", "l1", "l2", "group", "patience", "block_steps", "rank"):
            if getattr(self, name) < 0:
                raise UsageError(name, got=getattr(self, name), allowed="0 or more")
        if not self.shard:
            return
        if self.optimizer not in ("adamw", "sgd"):
            raise UsageError("optimizer with shard", got=self.optimizer, allowed="adamw, sgd")
        for name in ("codes", "rank", "block_steps", "l1", "l2", "group"):
            if value := getattr(self, name):
                raise UsageError(f"{name} with shard", got=value, next="leave one of them out")

    def _descent(self) -> Descent:
        return Descent(self.schedule, self.warmup, self.clip, self.accumulate, self.weight_decay)

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """New values of every trained parameter, if held-out batches say that they are better."""
        begun = time.monotonic()
        if not unit.batches or unit.original is None:
            raise UsageError("recover needs data", next="give --data")
        student, teacher = unit.model.copy(), unit.original
        batches, test = held_out(by_length(student, unit.batches, self.seed))
        front = self._front(teacher, student, batches)
        held, far = (
            Objective(teacher, self.loss, hidden=self.hidden, precision=self.precision, front=count)
            for count in (front.count, 0)
        )

        def judged() -> float:
            found = sum(far.exact(student, batch) for batch in test) / max(1, len(test))
            return together.agreed(found)

        before = judged()
        look = time.monotonic() - begun
        what = self._trained(student, teacher, Front() if self.front else front)
        behind = what.only(lambda name: name not in front.names)
        left = self._left(begun, look, unit.deadline)
        if self.block_steps:
            blockwise(
                behind, teacher, batches, lr=self.lr, steps=self.block_steps,
                seconds=_BLOCKS * left / max(1, len(student.blocks)), seed=self.seed,
                optimizer=self.optimizer, descent=self._descent(), path=unit.checkpoint,
                precision=self.precision,
            )  # fmt: skip
            left = self._left(begun, look, unit.deadline)

        def value(batch: Batch, done: float) -> Tensor:
            if not self.front or not front.count:
                return held(student, batch)
            free = done >= _HELD
            (what if free else behind).groups(self.lr)
            return (far if free else held)(student, batch)

        losses, after = train(
            what, batches, value, judged, lr=self.lr,
            steps=self.steps, seconds=left, seed=self.seed,
            optimizer=self.optimizer, descent=self._descent(),
            penalty=Penalty(self.l1, self.l2, self.group), patience=self.patience if test else 0,
            start=before, checkpoint=Checkpoint(unit.checkpoint, divided=self.shard),
        )  # fmt: skip
        if test and not after < before:
            return
        why = f"{len(losses)} steps of distillation"
        why += f"; held-out loss {before:.4g} to {after:.4g}" if test else f"; {UNJUDGED}"
        yield from self._edits(what, unit.model, why, losses[-1] if losses else before)
        if losses:
            yield Edit("curve", self.name, curve_of(losses), why)

    def _wanted(self, name: str) -> bool:
        return matches(name, self.targets)

    def _front(self, teacher: Model, student: Model, batches: list[Batch]) -> Front:
        if self.shard:
            return Front()
        return front_of(teacher, student, {n: x[:1] for n, x in batches[0].items()})

    def _trained(self, student: Model, teacher: Model, front: Front) -> Trained:
        if self.shard:
            if student.planes:
                raise UsageError("shard of a quantized network", next="leave shard out")
            sharding.divide(student.module, student.blocks)
        floats = {
            n: p for n, p in student.parameters()
            if n not in student.planes and n not in front.names and self._wanted(n)
        }  # fmt: skip
        chosen = [n for n in student.planes if self._wanted(n)]
        if self.codes and not chosen:
            raise UsageError(
                "codes to learn",
                got=", ".join(self.targets) or "a network without quantized weights",
                next="quantize first, or leave codes out",
            )
        behind = dict(teacher.parameters()) if self.codes else {}
        grids = attach(student, chosen, {n: p.detach() for n, p in behind.items()})
        factors = {}
        if self.rank:
            matrices = [n for n, p in floats.items() if p.ndim > 1]
            factors = adapt(student, matrices, self.rank)
            # What is smaller than its factors would be, and vectors, move freely; tables stay.
            floats = {n: p for n, p in floats.items() if n not in factors and p.ndim < 2}
        if not floats and not grids and not factors:
            got = ", ".join(self.targets) or "only tables"
            held = "targets behind the first edit, or front" if front.names else None
            raise UsageError("nothing to train", got=got, allowed=held)
        return Trained(student, floats, factors, grids)

    def _left(self, begun: float, look: float, deadline: float | None) -> float:
        """Seconds of training; 0 for no limit."""
        now = time.monotonic()
        ends = [begun + self.seconds] if self.seconds else []
        ends += [deadline] if deadline is not None else []
        return max(min(ends) - now - _SPARE * look, 1e-3) if ends else 0.0

    def _edits(self, what: Trained, model: Model, why: str, loss: float) -> Iterator[Edit]:
        old = dict(model.parameters())
        for name in (*what.floats, *what.factors):
            value: Tensor = what.weight(name).detach().clone()
            if not torch.equal(value, old[name].data):
                yield Edit("weight", name, value, why, {"loss": loss})
        for name, grid in what.grids.items():
            yield Edit("quantize", name, grid.result(), f"scales by {why}", {"loss": loss})
