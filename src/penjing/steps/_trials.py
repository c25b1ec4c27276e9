"""Trials: how far a network's outputs are without some of its blocks and halves of blocks.

What is cut so far need not be run again: a trial begins with the hidden states that reach the
first place where it differs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from penjing.detour import Detours, Passed, Way
from penjing.divergence import divergence
from penjing.model import Batch, Model

__all__ = ["PARTS", "Patcher", "Piece", "Trials", "blocks_of", "judges", "runs", "stages"]

PARTS = ("block", "attention", "mlp")

# Elements of a batch to judge by, with its outputs, and tokens.
_MOST, _TOKENS = 64 * 2**20, 512

# What stands in for the blocks from the first index to the second, both gone.
Patcher = Callable[[int, int], Way]


class Piece(NamedTuple):
    """What may go: a block, by its number, or a half of it (`attention`, `mlp`)."""

    block: int
    part: str = "block"


def blocks_of(pieces: Collection[Piece]) -> frozenset[int]:
    """Indices of the blocks among them that go whole."""
    return frozenset(piece.block for piece in pieces if piece.part == "block")


def stages(blocks: Sequence[str]) -> tuple[frozenset[int], ...]:
    """Indices of the blocks in each list of blocks; other layers may stand between two lists."""
    found: dict[str, list[int]] = {}
    for index, path in enumerate(blocks):
        found.setdefault(path.rpartition(".")[0], []).append(index)
    return tuple(frozenset(stage) for stage in found.values())


def judges(model: Model, batches: Sequence[Batch]) -> list[Batch]:
    """Samples from the last quarter of the data, a few: the largest part of a trial is its run."""
    mask = "attention_mask" if "attention_mask" in batches[0] else None
    held = batches[-max(1, len(batches) // 4) :]
    if len(batches) == 1:
        count = len(next(iter(batches[0].values())))
        held = [{n: x[count - max(1, count // 4) :] for n, x in batches[0].items()}]
    sample = {name: x[:1] for name, x in held[0].items()}
    with torch.no_grad():
        each = model.run(sample).numel()
    counts = [len(next(iter(batch.values()))) for batch in held]
    kept, size, tokens = [0] * len(held), 0, 0
    for row in range(max(counts)):  # of every batch: one may hold texts of one length
        for number, batch in enumerate(held):
            enough = size >= _MOST or tokens >= _TOKENS
            if row < counts[number] and not (size and enough):
                kept[number] = row + 1
                size, tokens = size + each, tokens + (int(batch[mask][row].sum()) if mask else 0)
    return [
        {name: x[:count] for name, x in batch.items()}
        for batch, count in zip(held, kept, strict=True) if count
    ]  # fmt: skip


class Trials:
    """Sets of pieces to cut, tried on a few batches with patches in place.

    Args:
        model: the whole network.
        batches: to judge by.
        patcher: of a run of blocks that are gone.
        score: how far outputs are from the whole network's; by default `penjing.divergence`.
        ends: of halves that may go, the layer that ends each.

    Attributes:
        able: blocks that may go, as they keep the shape of the hidden state.
        count: trials made.
    """

    def __init__(
        self, model: Model, batches: Sequence[Batch], patcher: Patcher,
        score: Callable[[Sequence[Tensor]], float] | None = None,
        ends: Mapping[Piece, str] | None = None,
    ) -> None:  # fmt: skip
        self._batches, self._patcher, self._ends = list(batches), patcher, ends or {}
        self._detours = Detours(model, batches[0])
        self.count = 0
        self._base: frozenset[Piece] = frozenset()
        states = [Passed() for _ in batches]
        whole = [self._detours.run(b, {}, p) for b, p in zip(batches, states, strict=True)]
        self._left = [passed.left for passed in states]
        self._starts = frozenset(min(stage) for stage in stages(model.blocks))
        self._score = score or (
            lambda found: divergence(model.interface, self._batches, whole, found)
        )
        first = states[0]
        self.able = [
            Piece(i) for i in range(len(model.blocks))
            if first.entered[i].shape == first.left[i].shape
        ]  # fmt: skip

    def __call__(self, gone: frozenset[Piece]) -> float:
        """How far the outputs without these pieces are from the whole network's."""
        self.count += 1
        return self._score(self._run(gone, None))

    def settle(self, gone: frozenset[Piece]) -> None:
        """Later trials begin with the hidden states of this one, as far as they agree."""
        states = [Passed() for _ in self._batches]
        self._run(gone, states)
        for old, new in zip(self._left, states, strict=True):
            old |= new.left
        self._base = gone

    def _run(self, gone: frozenset[Piece], states: list[Passed] | None) -> list[Tensor]:
        start = min((piece.block for piece in gone ^ self._base), default=0)
        blocks = blocks_of(gone)
        while start - 1 in blocks and start not in self._starts:  # a patch is of the whole run
            start -= 1
        silent = [self._ends[p] for p in sorted(gone) if p.part != "block" and p.block >= start]
        ways: dict[int, Way] = {}
        for first, last in runs(blocks, self._starts):
            if first >= start:
                ways |= dict.fromkeys(range(first, last))
                ways[last] = self._patcher(first, last)
        outputs = []
        for number, batch in enumerate(self._batches):
            skipped: dict[int, Way] = dict.fromkeys(range(start))
            if start:  # a copy: what comes next may work in place
                known = self._left[number][start - 1]
                skipped[start - 1] = functools.partial(_instead, known)
            passed = None if states is None else states[number]
            outputs.append(self._detours.run(batch, skipped | ways, passed, silent))
            if passed is not None:
                passed.left = {i: h for i, h in passed.left.items() if i >= start}
        return outputs


def _instead(known: Tensor, _: Tensor) -> Tensor:
    return known.clone()


def runs(gone: Collection[int], starts: Collection[int] = ()) -> list[tuple[int, int]]:
    """First and last of each run of neighbours; another run begins where a stage starts."""
    firsts = [i for i in sorted(gone) if i - 1 not in gone or i in starts]
    lasts = [i for i in sorted(gone) if i + 1 not in gone or i + 1 in starts]
    return list(zip(firsts, lasts, strict=True))
