"""Gradient descent on a network: the way down; what it is drawn to is `penjing.objective`'s."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penjing import sharding, together
from penjing.checkpoint import Checkpoint, optimizer_state, restore_optimizer
from penjing.errors import InputError, UsageError
from penjing.model import Batch
from penjing.optimizers import Group, check_optimizer, check_schedule, optimizer_of, schedule

__all__ = ["UNJUDGED", "Descent", "Taken", "check_optimizer", "descend", "held_out", "schedule"]

UNJUDGED = "kept unjudged: of a single sample none is held out, give more data"
"""What is to be said where `held_out` leaves nothing to judge by."""


@dataclass(frozen=True)
class Descent:
    """How gradient descent goes.

    Attributes:
        schedule, warmup: see `penjing.optimizers.schedule`.
        clip: most that the norm of all gradients together may be; 0 for no limit.
        accumulate: batches of a step, of each process where several train together; its gradient
            is their mean.
        decay: see `penjing.optimizers.optimizer_of`.
    """

    schedule: str = "cosine"
    warmup: float = 0.05
    clip: float = 1.0
    accumulate: int = 1
    decay: float = 0.0

    def __post_init__(self) -> None:
        check_schedule(self.schedule)
        if not 0 <= self.warmup < 1:
            raise UsageError("warmup", got=self.warmup, allowed="0 <= warmup < 1")
        if self.clip < 0:
            raise UsageError("clip", got=self.clip, allowed="0 for no limit, or more")
        if self.accumulate < 1:
            raise UsageError("accumulate", got=self.accumulate, allowed="1 or more")
        if self.decay < 0:
            raise UsageError("weight decay", got=self.decay, allowed="0 or more")


@dataclass(frozen=True)
class Taken:
    """A step that was made.

    Attributes:
        done: share of the way before it, 0 to 1.
        loss: of its batch.
    """

    done: float
    loss: float
    _optimizer: torch.optim.Optimizer

    def length(self, parameter: Tensor) -> Tensor | float:
        """How far a gradient of 1 moves each element, of the parameter's shape where they differ.

        Of Adam the learning rate over the root mean square of the gradients so far.
        """
        group = next(g for g in self._optimizer.param_groups
                     if any(own is parameter for own in g["params"]))  # fmt: skip
        state, rate = self._optimizer.state[parameter], float(group["lr"])
        if "exp_avg_sq" not in state:
            return rate
        mean = state["exp_avg_sq"] / (1 - group["betas"][1] ** float(state["step"]))
        return rate / (mean.sqrt() + group["eps"])  # type: ignore[no-any-return]


def held_out(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Batches to train on, and an eighth of them to judge by; of a single one its first rows.

    Nothing to judge by where there is a single sample.
    """
    found = list(batches)
    if len(found) == 1:
        count = len(next(iter(found[0].values())))
        first = max(1, count // 8)
        parts = [slice(0, first), slice(first, count)] if count > 1 else [slice(0, count)]
        found = [{name: value[part] for name, value in found[0].items()} for part in parts]
    held = max(1, len(found) // 8) if len(found) > 1 else 0
    return found[held:], found[:held]


def descend(
    batches: Sequence[Batch], groups: Sequence[Group], value: Callable[[Batch, float], Tensor], *,
    steps: int, seconds: float = 0.0, seed: int = 0, optimizer: str = "adamw",
    descent: Descent | None = None, checkpoint: Checkpoint | None = None,
) -> Iterator[Taken]:  # fmt: skip
    """Gradient descent, one step at a time; what comes after a step is the caller's.

    Args:
        batches: one a step, or as many as are accumulated, in random order.
        groups: what is trained.
        value: the loss of a batch, and the share of the way that is done, 0 to 1.
        steps, seconds: the end, whichever is first; 0 for none.
        seed: of the order of the batches.
        optimizer: `adamw`, `sgd`, `adafactor`, or `file.py:function` that makes one of torch of
            such groups.
        descent: all else.
        checkpoint: where it is kept how far descent has come; one that is there already is where
            it goes on from, to the same end.

    Raises:
        InputError: the loss is not finite.
    """
    how, start = descent or Descent(), time.monotonic()
    down = optimizer_of(optimizer, groups, how.decay)
    trained = [p for own, _ in groups for p in own]
    generator = torch.Generator().manual_seed(seed)
    step, before = 0, 0.0
    order: list[int] = []
    if checkpoint is not None and (found := checkpoint.load(trained)) is not None:
        _restore(trained, down, generator, *found)
        notes = found[1]
        step, before, order = int(notes["step"]), float(notes["seconds"]), list(notes["order"])
    longest, start = 0.0, start - before

    def keep() -> None:
        if checkpoint is not None:
            tensors, notes = optimizer_state(down)
            tensors["generator"] = generator.get_state()
            tensors |= {f"parameter.{i}": p for i, p in enumerate(trained)}
            passed = time.monotonic() - start
            where = {"step": step, "seconds": passed, "order": order, "optimizer": notes}
            checkpoint.save(tensors, where)

    while True:
        if checkpoint is not None and checkpoint.due():
            keep()
        done = step / steps if steps else 0.0
        begun = time.monotonic()
        if seconds:
            done = max(done, (begun - start) / seconds)
        late = bool(seconds and step and begun - start + longest > seconds)
        if seconds:  # clocks of several processes differ
            done, late = together.agreed(done), bool(together.agreed(late))
        # A step is not begun that would end after the time is over.
        if done >= 1 or late:
            if checkpoint is not None and checkpoint.last:
                keep()
            return
        share = schedule(done, how.schedule, how.warmup)
        for group in down.param_groups:
            group["lr"] = group["peak"] * share
        down.zero_grad(set_to_none=True)
        total = 0.0
        parts = how.accumulate * together.count()
        for number in range(parts):
            order = order or torch.randperm(len(batches), generator=generator).tolist()[::-1]
            batch = batches[order.pop()]
            if number % together.count() != together.rank():
                continue
            own = value(batch, done) / parts
            total += float(own.detach())
            own.backward()  # type: ignore[no-untyped-call]
        total = together.total(total)
        if not math.isfinite(total):
            raise InputError("the loss is not finite", got=total, next="lower lr")
        moving = [p for p in trained if p.requires_grad]
        together.sum_gradients([p for p in moving if not sharding.is_divided(p)])
        if how.clip:
            nn.utils.clip_grad_norm_(moving, how.clip)
        down.step()
        step += 1
        yield Taken(done, total, down)
        longest = max(longest, time.monotonic() - begun)  # with what the caller does after it


def _restore(
    trained: Sequence[Tensor], down: torch.optim.Optimizer, generator: torch.Generator,
    tensors: dict[str, Tensor], notes: dict[str, Any],
) -> None:  # fmt: skip
    with torch.no_grad():
        for number, parameter in enumerate(trained):
            parameter.copy_(tensors[f"parameter.{number}"])
    restore_optimizer(down, tensors, notes["optimizer"])
    generator.set_state(tensors["generator"])
