"""Which layer of a teacher a layer of a student is, whatever they are called.

Layers are what has numbers of its own, in the order in which they first run. Blocks go first: an
assignment in order with the least cost,

    sum over student blocks of (1 - layers in common) + distance of places in depth

so that a student of fewer blocks gets the first, the last and evenly spaced ones between; of more
blocks, neighbours share one. Layers of two blocks, and those before and behind all of them, are the
longest common subsequence of their kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from penjing.errors import InputError
from penjing.model import Model

__all__ = ["Match", "counterparts", "match"]

# What a block a whole depth away costs: less than one layer in twenty that has no counterpart.
_PLACE = 0.05


@dataclass(frozen=True)
class Match:
    """What `match` found.

    Attributes:
        blocks: of each block of the student the teacher's, by number.
        layers: paths of the teacher's layers by those of the student.
        alone: layers of the student without a counterpart.
    """

    blocks: tuple[int, ...]
    layers: dict[str, str]
    alone: tuple[str, ...]


def match(student: Model, teacher: Model, blocks: Sequence[int] | None = None) -> Match:
    """Counterparts in order of execution.

    Args:
        blocks: of each block of the student the teacher's, where that is known.

    Raises:
        InputError: they have no kind of layer in common.
    """
    own, other = _parts(student), _parts(teacher)
    if blocks is None:
        blocks = _assigned(own[1:-1], other[1:-1])
    inner = [(part, other[1 + number]) for part, number in zip(own[1:-1], blocks, strict=False)]
    pairs = [(own[0], other[0]), *inner, (own[-1], other[-1])]
    layers = {s[i][0]: t[j][0] for s, t in pairs for i, j in _common(s, t)}
    if not layers:
        raise InputError(
            "student and teacher have no kind of layer in common",
            got=", ".join(sorted({type(m).__name__ for m in student.module.modules()})[:6]),
            next="leave out --parameters",
        )
    alone = tuple(path for part in own for path, _ in part if path not in layers)
    return Match(tuple(blocks), layers, alone)


def counterparts(model: Model, block: int, other: int) -> dict[str, str]:
    """Layers of another block of the same network by those of one, by their numbers."""
    parts = _parts(model)
    one, two = parts[1 + block], parts[1 + other]
    return {one[i][0]: two[j][0] for i, j in _common(one, two)}


_Part = list[tuple[str, Any]]


def _parts(model: Model) -> list[_Part]:
    """Path and kind of every layer: before the blocks, of each block, and behind them."""
    order: dict[str, nn.Module] = {}

    def note(module: nn.Module, *_: Any, path: str) -> None:
        order.setdefault(path, module)

    holders = {
        path: module for path, module in model.module.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    }  # fmt: skip
    handles = [m.register_forward_pre_hook(partial(note, path=p)) for p, m in holders.items()]
    try:
        with torch.no_grad():
            model.run(model.example)
    finally:
        for handle in handles:
            handle.remove()
    parts: list[_Part] = [[] for _ in range(len(model.blocks) + 2)]
    inside = False
    for path, module in (order | holders).items():
        block = next((n for n, b in enumerate(model.blocks) if f"{path}.".startswith(f"{b}.")), -1)
        inside = inside or block >= 0
        parts[block + 1 if block >= 0 else -1 if inside else 0].append((path, _kind(module)))
    return parts


def _kind(module: nn.Module) -> tuple[Any, ...]:
    """What two layers have in common that do the same; widths, and biases, may differ."""
    if isinstance(module, nn.Linear):
        return ("linear",)
    if isinstance(module, nn.modules.conv._ConvNd):
        return ("conv", module.kernel_size, module.stride, module.groups > 1)
    ranks = tuple(sorted(p.ndim for p in module.parameters(recurse=False)))
    if type(module).__module__.startswith("torch.nn."):
        return (type(module).__name__,)
    return ("own", ranks)


def _common(one: _Part, two: _Part) -> list[tuple[int, int]]:
    """Places of the longest common subsequence of kinds."""
    best = [[0] * (len(two) + 1) for _ in range(len(one) + 1)]
    for i in range(len(one) - 1, -1, -1):
        for j in range(len(two) - 1, -1, -1):
            same = one[i][1] == two[j][1]
            best[i][j] = best[i + 1][j + 1] + 1 if same else max(best[i + 1][j], best[i][j + 1])
    found, i, j = [], 0, 0
    while i < len(one) and j < len(two):
        if one[i][1] == two[j][1]:
            found.append((i, j))
            i, j = i + 1, j + 1
        elif best[i + 1][j] >= best[i][j + 1]:
            i += 1
        else:
            j += 1
    return found


def _assigned(own: list[_Part], other: list[_Part]) -> tuple[int, ...]:
    """Of each block of the student one of the teacher, in order; each once if there are enough."""
    if not own or not other:
        return ()
    few = len(own) <= len(other)
    costs = [
        [_cost(s, t) + _PLACE * abs(_place(i, own) - _place(j, other)) for j, t in enumerate(other)]
        for i, s in enumerate(own)
    ]
    infinite = float("inf")
    total = [costs[0] if few else [costs[0][0], *[infinite] * (len(other) - 1)]]
    chosen: list[list[int]] = []
    for row in costs[1:]:
        last, came, now = total[-1], [], []
        for j in range(len(other)):
            before = range(j) if few else range(max(0, j - 1), j + 1)
            best = min(before, key=last.__getitem__, default=0)
            came.append(best)
            now.append(row[j] + last[best] if before else infinite)
        total.append(now)
        chosen.append(came)
    ends = total[-1] if few else [infinite] * (len(other) - 1) + total[-1][-1:]
    path = [min(range(len(other)), key=ends.__getitem__)]
    for came in reversed(chosen):
        path.append(came[path[-1]])
    path.reverse()
    assert all(a < b if few else b - a in (0, 1) for a, b in pairwise(path))
    return tuple(path)


def _cost(one: _Part, two: _Part) -> float:
    """Share of the layers without a counterpart."""
    return 1 - 2 * len(_common(one, two)) / max(1, len(one) + len(two))


def _place(number: int, parts: list[_Part]) -> float:
    return number / (len(parts) - 1) if len(parts) > 1 else 0.5
