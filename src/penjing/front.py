"""The front of an edited network: the blocks before the first edit, which are its original's.

What enters the first edited block is known from the original, which runs anyway where it is the
aim of training. So the front need not run again, and there is no way back through it. Its
parameters are held: they were never wrong, and a step on the rest costs less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from penjing.hiddens import twins
from penjing.model import Batch, Model

__all__ = ["Front", "front_of"]


@dataclass(frozen=True)
class Front:
    """What is held.

    Attributes:
        count: blocks; 0 where the first one is edited, or none.
        names: of all parameters that do not work behind them alone.
    """

    count: int = 0
    names: frozenset[str] = frozenset()


def front_of(original: Model, student: Model, sample: Batch) -> Front:
    """The front of a student.

    Args:
        sample: a small batch, to see what runs behind the front.
    """
    pairs = twins(original, student)
    count = _same(original, student, pairs)
    if not count or count == len(student.blocks):
        return Front()
    behind = _behind(student, count, sample)
    own = {
        name for name, parameter in student.parameters()
        if id(parameter) not in behind
    }  # fmt: skip
    theirs = dict(original.parameters())
    for name, parameter in student.parameters():
        inside = any(name.startswith(f"{path}.") for path in student.blocks)
        if name in own and not inside and not _equal(parameter, theirs.get(name)):
            return Front()
    return Front(count, frozenset(own))


def _same(original: Model, student: Model, pairs: tuple[tuple[str, str], ...]) -> int:
    """How many blocks from the first on compute what the original's do."""
    if student.activations or student.outputs or student.cache:
        return 0
    for count, (own, pair) in enumerate(zip(student.blocks, original.blocks, strict=False)):
        if (own, pair) not in pairs:
            return count
        a, b = (_tensors(m.module.get_submodule(p)) for m, p in ((student, own), (original, pair)))
        if a.keys() != b.keys() or not all(_equal(a[name], b[name]) for name in a):
            return count
    return len(student.blocks)


def _tensors(block: nn.Module) -> dict[str, torch.Tensor]:
    return dict(block.named_parameters()) | dict(block.named_buffers())


def _equal(a: torch.Tensor, b: torch.Tensor | None) -> bool:
    return b is not None and a.shape == b.shape and torch.equal(a, b)


def _behind(student: Model, count: int, sample: Batch) -> set[int]:
    """Parameters that work behind the front and not in it, by id."""
    blocks = [student.module.get_submodule(path) for path in student.blocks]
    inside = {id(part) for block in blocks for part in block.modules()}
    before = {id(p) for block in blocks[:count] for p in block.parameters()}
    after = {id(p) for block in blocks[count:] for p in block.parameters()}
    entered = False

    def see(module: nn.Module, _: Any) -> None:
        nonlocal entered
        entered = entered or module is blocks[count]
        if id(module) not in inside:
            own = {id(p) for p in module.parameters(recurse=False)}
            (after if entered else before).update(own)

    handles = [m.register_forward_pre_hook(see) for m in student.module.modules()]
    try:
        with torch.no_grad():
            student.run(sample)
    finally:
        for handle in handles:
            handle.remove()
    return after - before
