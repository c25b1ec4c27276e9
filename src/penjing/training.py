"""Gradient descent on a network: what it is drawn to, and the way down.

Without labels the aim is the output of the original network (distillation, Hinton et al., arXiv
1503.02531); with `labels` it is the class of each sample, of a language model the next token, by
cross-entropy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penjing import processor
from penjing.errors import InputError, UsageError
from penjing.gradients import LABELS
from penjing.model import Batch, Model
from penjing.registry import attribute_of, lookup

__all__ = [
    "Objective", "Taken", "check_loss", "check_optimizer", "descend", "held_out",
    "schedule",
]  # fmt: skip

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=0.0),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
}
# Parameters and their peak learning rate.
Group = tuple[Sequence[Tensor], float]


def check_loss(name: str | None) -> None:
    """Refuse what is no loss.

    Raises:
        UsageError: the choices are listed.
    """
    if name not in (None, LABELS):
        lookup("losses", name, "loss")


def check_optimizer(name: str) -> None:
    """Refuse what is no optimizer.

    Raises:
        UsageError: the choices are listed.
    """
    if name not in _OPTIMIZERS and ":" not in name:
        known = ", ".join(_OPTIMIZERS)
        raise UsageError("unknown optimizer", got=name, allowed=f"{known}, file.py:function")


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


class Objective:
    """How far a network is from what is wanted of it.

    Args:
        original: whose outputs are wanted; those of a batch are computed once.
        loss: a name of `penjing.losses`, `labels`, or None: `cosine` for embeddings, `kl` for
            logits.
    """

    def __init__(self, original: Model, loss: str | None = None) -> None:
        self._original, self._labels = original, loss == LABELS
        default = "cosine" if original.interface == "embedding" else "kl"
        self._loss: Any = None if self._labels else lookup("losses", loss or default, "loss")
        self._known: dict[int, Tensor] = {}

    def __call__(self, model: Model, batch: Batch) -> Tensor:
        """Scalar; products in bfloat16 where that is fast."""
        with processor.autocast(model.device.type):
            wanted = None if self._labels else self._wanted(batch)
            return self._compare(model.run(batch), wanted, batch)

    def exact(self, model: Model, batch: Batch) -> float:
        """The same in full precision: bfloat16 hides what a good repair left to win."""
        with torch.no_grad():
            wanted = None if self._labels else self._original.run(batch)
            return float(self._compare(model.run(batch), wanted, batch))

    def _wanted(self, batch: Batch) -> Tensor:
        if id(batch) in self._known:
            return self._known[id(batch)]
        with torch.no_grad():
            output = self._original.run(batch)
        if self._original.interface != "causal":  # too large to keep
            self._known[id(batch)] = output
        return output

    def _compare(self, output: Tensor, wanted: Tensor | None, batch: Batch) -> Tensor:
        if wanted is None:
            return nn.functional.cross_entropy(*self._labelled(output.float(), batch))
        if self._original.interface == "causal":
            kept = batch["attention_mask"].bool()
            output, wanted = output[kept], wanted[kept]
        return self._loss(output, wanted)  # type: ignore[no-any-return]

    def _labelled(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits [n, classes] and classes [n]."""
        if self._original.interface == "causal":
            there = batch["attention_mask"][:, 1:].bool()
            return output[:, :-1][there], batch["input_ids"][:, 1:][there]
        if LABELS not in batch or output.ndim != 2:
            raise UsageError(
                "the loss labels", got=f"{'' if LABELS in batch else 'no '}labels, "
                f"outputs [{', '.join(map(str, output.shape))}]",
                allowed="a class for every sample and logits [batch, classes], or a language model",
                next="leave the loss out: then the original's outputs are the aim",
            )  # fmt: skip
        return output, batch[LABELS]


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


def schedule(done: float) -> float:
    """Share of the peak learning rate: reached after 5 % and falling to 0 as a cosine."""
    return min(1.0, done / 0.05 + 0.05) * (0.5 + 0.5 * math.cos(done * math.pi))


def descend(
    batches: Sequence[Batch], groups: Sequence[Group], value: Callable[[Batch, float], Tensor], *,
    steps: int, seconds: float = 0.0, seed: int = 0, optimizer: str = "adamw",
) -> Iterator[Taken]:  # fmt: skip
    """Gradient descent, one step at a time; what comes after a step is the caller's.

    Args:
        batches: one a step, in random order.
        groups: what is trained; all gradients together are cut to a norm of 1.
        value: the loss of a batch, and the share of the way that is done, 0 to 1.
        steps, seconds: the end, whichever is first; 0 for none.
        seed: of the order of the batches.
        optimizer: `adamw`, `sgd`, or `file.py:function` that makes one of torch of such groups.

    Raises:
        InputError: the loss is not finite.
    """
    make = _OPTIMIZERS.get(optimizer) or attribute_of(optimizer)
    descent = make([{"params": list(own), "lr": rate} for own, rate in groups])
    generator = torch.Generator().manual_seed(seed)
    start, step = time.monotonic(), 0
    order: list[int] = []
    while True:
        done = step / steps if steps else 0.0
        if seconds:
            done = max(done, (time.monotonic() - start) / seconds)
        if done >= 1:
            return
        order = order or torch.randperm(len(batches), generator=generator).tolist()[::-1]
        for group, (_, rate) in zip(descent.param_groups, groups, strict=True):
            group["lr"] = rate * schedule(done)
        found = value(batches[order.pop()], done)
        if not torch.isfinite(found):
            raise InputError("the loss is not finite", got=float(found.detach()), next="lower lr")
        descent.zero_grad(set_to_none=True)
        found.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_([p for own, _ in groups for p in own], 1.0)
        descent.step()
        step += 1
        yield Taken(done, float(found.detach()), descent)
