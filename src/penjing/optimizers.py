"""Optimizers of gradient descent, and how their learning rate goes.

All are torch's own: AdamW (arXiv 1711.05101), SGD with momentum 0.9, Adafactor (arXiv 1804.04235,
which keeps a row and a column of second moments where AdamW keeps two numbers a weight).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from penjing.errors import UsageError
from penjing.registry import attribute_of

__all__ = [
    "OPTIMIZERS", "SCHEDULES", "Group", "check_optimizer", "check_schedule", "optimizer_of",
    "schedule",
]  # fmt: skip

# Parameters and their peak learning rate.
Group = tuple[Sequence[Tensor], float]

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda groups: torch.optim.AdamW(groups, weight_decay=0.0, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "adafactor": lambda groups: torch.optim.Adafactor(groups),
}
SCHEDULES = ("cosine", "linear", "constant", "one-cycle")
# Share of the way that one-cycle rises, and where it starts (Smith and Topin, arXiv 1708.07120).
_RISES, _START = 0.3, 0.04


def check_optimizer(name: str) -> None:
    """Refuse what is no optimizer.

    Raises:
        UsageError: the choices are listed.
    """
    if name not in OPTIMIZERS and ":" not in name:
        known = ", ".join(OPTIMIZERS)
        raise UsageError("unknown optimizer", got=name, allowed=f"{known}, file.py:function")


def check_schedule(name: str) -> None:
    """Refuse what is no schedule.

    Raises:
        UsageError: the choices are listed.
    """
    if name not in SCHEDULES:
        raise UsageError("unknown schedule", got=name, allowed=", ".join(SCHEDULES))


def optimizer_of(name: str, groups: Sequence[Group], decay: float = 0.0) -> torch.optim.Optimizer:
    """An optimizer with one group of parameters for each of `groups`, in order.

    Args:
        name: one of `OPTIMIZERS`, or `file.py:function` that makes one of torch of such groups.
        groups: of parameters. With decay each is followed by its biases, gains and other vectors.
        decay: of the matrices at every step, times the learning rate.
    """
    made = []
    for own, rate in groups:
        if not decay:
            made.append({"params": list(own), "lr": rate})
            continue
        for flat in (False, True):
            part = [p for p in own if (p.ndim < 2) == flat]
            if part:
                made.append({"params": part, "lr": rate, "weight_decay": 0.0 if flat else decay})
    for group in made:
        group["peak"] = group["lr"]
    make = OPTIMIZERS.get(name) or attribute_of(name)
    return make(made)


def schedule(done: float, shape: str = "cosine", warmup: float = 0.05) -> float:
    """Share of the peak learning rate.

    Args:
        done: share of the way, 0 to 1.
        shape: one of `SCHEDULES`. `cosine` and `linear` fall to 0; `one-cycle` rises for 30 % of
            the way and falls to 0, both as a cosine.
        warmup: share of the way in which it rises; `one-cycle` has its own.
    """
    if shape == "one-cycle":
        if done < _RISES:
            return _START + (1 - _START) * (0.5 - 0.5 * math.cos(done / _RISES * math.pi))
        return 0.5 + 0.5 * math.cos((done - _RISES) / (1 - _RISES) * math.pi)
    rising = min(1.0, done / warmup + 0.05) if warmup else 1.0
    if shape == "linear":
        return rising * (1 - done)
    return rising if shape == "constant" else rising * (0.5 + 0.5 * math.cos(done * math.pi))
