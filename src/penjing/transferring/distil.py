"""The way from a student to its teacher: gradient descent on the sum of all that is matched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from penjing.errors import UsageError
from penjing.model import Batch, Model
from penjing.progress import track
from penjing.training import descend, held_out
from penjing.transferring.aim import Aim

__all__ = ["Distilled", "distil", "keep_masks"]


class Distilled:
    """What training came to.

    Attributes:
        steps: made.
        before, after: loss on the eighth of the batches that is held out; nan without any.
    """

    def __init__(self, before: float) -> None:
        self.steps, self.before, self.after = 0, before, before


def distil(
    student: Model, aim: Aim, batches: Sequence[Batch], *, steps: int = 0, seconds: float = 60.0,
    lr: float = 5e-4, optimizer: str = "adamw", seed: int = 0,
) -> Distilled:  # fmt: skip
    """Train the student in place.

    Batch norms follow the batches, everything else is as in evaluation (no dropout); pruned
    connections stay away.

    Args:
        steps, seconds: the end, whichever is first; 0 for none.
        lr: peak learning rate.
        optimizer: as `penjing.training.descend` takes it.

    Raises:
        UsageError: neither steps nor seconds, or a learning rate out of range.
        InputError: the loss is not finite.
    """
    if not (steps > 0 or seconds > 0):
        raise UsageError("transfer", allowed="--steps or --within above 0")
    if not 0 < lr < 1:
        raise UsageError("lr", got=lr, allowed="0 < lr < 1")
    train, test = held_out(batches)
    if not train:
        raise UsageError("samples to train on", got=len(batches), next="give more with --data")

    def judged() -> float:
        with torch.no_grad():
            losses = [float(aim(batch, fit=False)) for batch in test]
        return sum(losses) / len(losses) if losses else float("nan")

    own = [p for _, p in student.parameters()]
    begun = {name: x.clone() for name, x in student.module.state_dict().items()}
    for parameter in own:
        parameter.requires_grad_(True)
    with _norms_in_training(student.module):  # they start where they are trained
        maps = aim.trained(train[0])
    found = Distilled(judged())
    groups = [([*own, *maps], lr)]
    with _norms_in_training(student.module):
        way = descend(train, groups, lambda batch, _: aim(batch), steps=steps, seconds=seconds,
                      seed=seed, optimizer=optimizer)  # fmt: skip
        for _ in track(way, "distillation", steps or None):
            found.steps += 1
            keep_masks(student)
    for parameter in own:
        parameter.requires_grad_(False)
    found.after = judged()
    if found.after > found.before:  # the start was better
        student.module.load_state_dict(begun)
        found.after, found.steps = found.before, 0
    return found


@torch.no_grad()
def keep_masks(model: Model) -> None:
    """Connections that are gone stay at 0."""
    for name, mask in model.masks.items():
        model.module.get_parameter(name).mul_(mask)


@contextmanager
def _norms_in_training(module: nn.Module) -> Iterator[None]:
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.train()
    try:
        yield
    finally:
        module.eval()
