"""Recover: gradient descent after an edit, toward the original network's outputs.

Distillation without labels (Hinton et al., arXiv 1503.02531): the edited network is trained on
the calibration data to give what the original gives. Masked connections stay zero. Of quantized
weights the scales are trained, and where asked the codes: see `_grid`. Tables keep theirs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from penjing import processor
from penjing.calibrate import LayerStats, Unit
from penjing.errors import InputError, UsageError
from penjing.model import Batch, Model
from penjing.recipe import Edit
from penjing.registry import lookup
from penjing.steps._grid import Grid, attach
from penjing.steps._select import matches

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
        loss: a name of `penjing.losses`; by default `cosine` for embeddings, `kl` for logits.
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
        if self.loss is not None:
            lookup("losses", self.loss, "loss")

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """New values of every trained parameter, if held-out batches say that they are better."""
        if not unit.batches or unit.original is None:
            raise UsageError("recover needs data", next="give --data")
        student, teacher = unit.model.copy(), unit.original
        default = "cosine" if teacher.interface == "embedding" else "kl"
        loss = lookup("losses", self.loss or default, "loss")
        batches = _at_least_two(list(unit.batches))
        held = max(1, len(batches) // 8) if len(batches) > 1 else 0
        train, test = batches[held:], batches[:held]
        cache: dict[int, Tensor] = {}

        def goal(batch: Batch) -> Tensor:
            if teacher.interface == "causal":  # too large to keep
                return _output(teacher, batch)
            if id(batch) not in cache:
                cache[id(batch)] = _output(teacher, batch)
            return cache[id(batch)]

        def compare(batch: Batch, wanted: Tensor | None = None) -> Tensor:
            output, wanted = student.run(batch), goal(batch) if wanted is None else wanted
            if teacher.interface == "causal":
                kept = batch["attention_mask"].bool()
                output, wanted = output[kept], wanted[kept]
            return loss(output, wanted)  # type: ignore[no-any-return]

        def held_out() -> float:
            # In full precision: bfloat16 hides what a good patch left to win.
            with torch.no_grad():
                return sum(float(compare(b, teacher.run(b))) for b in test) / max(1, len(test))

        before = held_out()
        trained = {
            n: p for n, p in student.parameters() if n not in student.planes and self._wanted(n)
        }
        chosen = [n for n in student.planes if self._wanted(n)]
        behind = dict(teacher.parameters()) if self.codes else {}
        grids = attach(student, chosen, {n: p.detach() for n, p in behind.items()})
        if not trained and not grids:
            raise UsageError("nothing to train", got=", ".join(self.targets) or "only tables")
        taken, last = self._train(train, trained, grids, student, compare)
        after = held_out()
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
        self,
        batches: list[Batch],
        trained: dict[str, nn.Parameter],
        grids: dict[str, Grid],
        student: Model,
        compare: object,
    ) -> tuple[int, float]:
        for parameter in student.module.parameters():
            parameter.requires_grad_(False)
        kinds: list[tuple[list[nn.Parameter], float]] = [
            (list(trained.values()), self.lr),
            ([p for g in grids.values() for p in g.scales()], self.lr * _SCALES),
            ([g.v for g in grids.values() if g.v is not None], self.lr * _CODES),
        ]
        kinds = [(own, rate) for own, rate in kinds if own]
        parameters = [p for own, _ in kinds for p in own]
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(
            [{"params": own, "lr": rate} for own, rate in kinds], weight_decay=0.0
        )
        generator = torch.Generator().manual_seed(self.seed)
        start, step, last = time.monotonic(), 0, float("nan")
        done = 0.0
        while True:
            for index in torch.randperm(len(batches), generator=generator).tolist():
                if self.steps:
                    done = step / self.steps
                if self.seconds:
                    done = max(done, (time.monotonic() - start) / self.seconds)
                if done >= 1:
                    return step, last
                share = min(1.0, done / 0.05 + 0.05) * (
                    0.5 + 0.5 * torch.cos(torch.tensor(done * torch.pi))
                )
                for group, (_, rate) in zip(optimizer.param_groups, kinds, strict=True):
                    group["lr"] = rate * float(share)
                with processor.autocast(student.device.type):
                    value: Tensor = compare(batches[index])  # type: ignore[operator]
                if not torch.isfinite(value):
                    last = float(value.detach())
                    raise InputError("the loss is not finite", got=last, next="lower lr")
                optimizer.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                with torch.no_grad():
                    for name, mask in student.masks.items():
                        if name in trained:
                            trained[name].masked_fill_(~mask, 0)
                step, last = step + 1, float(value.detach())


def _at_least_two(batches: list[Batch]) -> list[Batch]:
    """A single batch in two parts, an eighth and the rest, so that something can be held out."""
    if len(batches) > 1:
        return batches
    count = len(next(iter(batches[0].values())))
    held = max(1, count // 8)
    parts = [slice(0, held), slice(held, count)] if count > 1 else [slice(0, count)]
    return [{name: value[part] for name, value in batches[0].items()} for part in parts]


def _output(model: Model, batch: Batch) -> Tensor:
    with torch.no_grad(), processor.autocast(model.device.type):
        return model.run(batch)
