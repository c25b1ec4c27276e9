"""Recover: gradient descent after an edit, toward the original network's outputs.

Distillation without labels (Hinton et al., arXiv 1503.02531): the edited network is trained on
the calibration data to give what the original gives. Masked connections stay zero; quantized
weights stay on their grid because they are not trained.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats, Unit
from penjing.errors import InputError, UsageError
from penjing.model import Batch, Model
from penjing.recipe import Edit
from penjing.registry import lookup

__all__ = ["Recover"]


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
        targets: globs of parameter paths; without any, every one that is not quantized.
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

        def compare(batch: Batch) -> Tensor:
            output, wanted = student.run(batch), goal(batch)
            if teacher.interface == "causal":
                kept = batch["attention_mask"].bool()
                output, wanted = output[kept], wanted[kept]
            return loss(output, wanted)  # type: ignore[no-any-return]

        def held_out() -> float:
            with torch.no_grad():
                return sum(float(compare(b)) for b in test) / max(1, len(test))

        before = held_out()
        trained = {
            n: p
            for n, p in student.parameters()
            if n not in student.planes
            and (not self.targets or any(fnmatchcase(n, t) for t in self.targets))
        }
        if not trained:
            raise UsageError("nothing to train", got=", ".join(self.targets) or "all quantized")
        taken, last = self._train(train, trained, student, compare)
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

    def _train(
        self,
        batches: list[Batch],
        trained: dict[str, nn.Parameter],
        student: Model,
        compare: object,
    ) -> tuple[int, float]:
        for parameter in student.module.parameters():
            parameter.requires_grad_(False)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(trained.values(), lr=self.lr, weight_decay=0.0)
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
                rate = min(1.0, done / 0.05 + 0.05) * (
                    0.5 + 0.5 * torch.cos(torch.tensor(done * torch.pi))
                )
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * float(rate)
                with torch.autocast(student.device.type, torch.bfloat16):
                    value: Tensor = compare(batches[index])  # type: ignore[operator]
                if not torch.isfinite(value):
                    last = float(value.detach())
                    raise InputError("the loss is not finite", got=last, next="lower lr")
                optimizer.zero_grad(set_to_none=True)
                value.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                with torch.no_grad():
                    for name, mask in student.masks.items():
                        if name in trained:
                            trained[name].mul_(mask)
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
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
        return model.run(batch)
