"""Which blocks go, or which halves of blocks.

influence   1 - mean cosine of a block's input and output (ShortGPT, arXiv 2403.03853, section 3.1);
            of a half, of what its block gives with and without it
angular     one run of blocks, by the mean angle of its input and output over pi (Gromov et al.,
            arXiv 2403.17887, section 3.2)
greedy      one piece after the other, by how far the outputs of the network without it are from
            those of the whole one; as SLEB (arXiv 2402.09025), but with the patch in place
evolution   sets of pieces, by the same: the best are changed by a piece and compared again
            (EvoPress, arXiv 2410.14649, section 3)

Where pieces of several sizes compete, harm counts over what is saved.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penjing.calibrate import Stream
from penjing.detour import silent
from penjing.progress import track
from penjing.steps._trials import PARTS, Piece, Trials, blocks_of

__all__ = ["Budget", "angles", "evolution", "greedy", "influence", "ranked"]

# After the first, a round of `greedy` tries the better half and this many at least.
_FEW = 4
# Of `evolution`: sets that are kept, sets that each round makes of them.
_PARENTS, _CHILDREN = 4, 8


@dataclass(frozen=True)
class Budget:
    """How much is to go, and of what.

    Attributes:
        costs: of each piece that may go; of a half no more than of its block.
        amount: pieces go until those that are gone cost so much.
        stages: indices of blocks in one list, of which one stays.
    """

    costs: Mapping[Piece, float]
    amount: float
    stages: tuple[frozenset[int], ...]

    @property
    def most(self) -> float:
        """An amount that can go whatever goes first: of every stage all but its largest block."""
        most = 0.0
        for stage in self.stages:
            sizes = [max(self.costs.get(Piece(i, part), 0.0) for part in PARTS) for i in stage]
            most += sum(sizes) - (max(sizes) if all(sizes) else 0.0)
        return most

    def left(self, gone: Iterable[Piece]) -> float:
        """What is still to go, 0 or less when it is enough."""
        # Ten times a tenth is less than one.
        return self.amount * (1 - 1e-9) - sum(self.costs[piece] for piece in gone)

    def saves(self, piece: Piece, gone: frozenset[Piece]) -> float:
        """What goes with one more piece, as far as it is asked for."""
        left = self.left(gone)
        return min(left, left - self.left(joined(gone, piece)))

    def fits(self, gone: Collection[Piece]) -> bool:
        """Whether every stage keeps a block."""
        whole = blocks_of(gone)
        return not any(stage <= whole for stage in self.stages)

    def open(self, gone: frozenset[Piece]) -> list[Piece]:
        """Pieces that may be next; of a block that has lost a half, only all of it."""
        touched = {piece.block for piece in gone}
        return [
            piece for piece in self.costs
            if piece.block not in (touched if piece.part != "block" else blocks_of(gone))
            and self.fits(joined(gone, piece))
        ]  # fmt: skip


def joined(gone: frozenset[Piece], piece: Piece) -> frozenset[Piece]:
    """With one more; a block takes the place of its half."""
    return frozenset(other for other in gone if other.block != piece.block) | {piece}


def influence(stream: Stream, ends: Mapping[Piece, str] | None = None) -> dict[Piece, float]:
    """1 - mean cosine of input and output of blocks, and of what they give with and without a half.

    Args:
        stream: not yet entered.
        ends: of halves, the layer that ends each; None for whole blocks alone.

    Returns:
        Of every half, and of every block that keeps its shape.
    """
    scores: dict[Piece, float] = {}
    for index, block, calls, outputs in stream.walk():
        if all(c.hidden.shape == o.shape for c, o in zip(calls, outputs, strict=True)):
            scores[Piece(index)] = _turned(stream, [c.hidden for c in calls], outputs)
        for piece, path in (ends or {}).items():
            if piece.block == index:
                with silent(stream.model.module, [path]):
                    without = [call.run(block, call.hidden) for call in calls]
                scores[piece] = _turned(stream, without, outputs)
    return scores


def _turned(stream: Stream, before: list[Tensor], after: list[Tensor]) -> float:
    """1 - mean cosine over all real tokens of all batches."""
    pairs = enumerate(zip(before, after, strict=True))
    return 1 - float(torch.cat([_cosine(stream, n, x, y) for n, (x, y) in pairs]).double().mean())


def angles(stream: Stream, count: int) -> dict[int, float]:
    """Mean angle over pi between the input and the output of `count` blocks, by the first of them.

    Runs that change the shape of the hidden state have none.
    """
    entered: list[list[Tensor]] = []
    found: dict[int, float] = {}
    for index, _, calls, outputs in stream.walk():
        entered.append([call.hidden for call in calls])
        first = index - count + 1
        if first < 0:
            continue
        pairs = list(zip(entered[first], outputs, strict=True))
        entered[first] = []
        if any(x.shape != y.shape for x, y in pairs):
            continue
        parts = [_cosine(stream, n, x, y) for n, (x, y) in enumerate(pairs)]
        found[first] = float(torch.cat(parts).clamp(-1, 1).arccos().mean()) / math.pi
    return found


def _cosine(stream: Stream, number: int, x: Tensor, y: Tensor) -> Tensor:
    """Of each real token; of what are no sequences, of each sample."""
    if y.ndim == 3:
        x, y = stream.rows(number, x), stream.rows(number, y)
    else:
        x, y = x.flatten(1), y.flatten(1)
    return nn.functional.cosine_similarity(x, y, dim=1)


def ranked(scores: Mapping[Piece, float], budget: Budget) -> frozenset[Piece]:
    """Pieces of the lowest scores over what they save, until it is enough."""
    gone: frozenset[Piece] = frozenset()
    while budget.left(gone) > 0:
        best = min(budget.open(gone), key=lambda p: (scores[p] / budget.saves(p, gone), p))
        gone = joined(gone, best)
    return gone


def greedy(trials: Trials, budget: Budget) -> dict[Piece, str]:
    """Pieces in the order they go, and why."""
    gone: dict[Piece, str] = {}
    base, harm = frozenset[Piece](), 0.0
    left = set(budget.costs)
    while (most := budget.left(base)) > 0:
        able = [p for p in budget.open(base) if p in left] or budget.open(base)
        tried = {p: trials(joined(base, p)) for p in track(able, f"cut {len(gone) + 1}")}
        order = sorted(able, key=lambda p: ((tried[p] - harm) / budget.saves(p, base), p))
        best = order[0]
        base, harm = joined(base, best), tried[best]
        gone = {piece: why for piece, why in gone.items() if piece in base}
        gone[best] = f"taken as number {len(gone) + 1}; outputs then off by {harm:.4g}"
        trials.settle(base)
        few = math.ceil(most / min(budget.costs.values()))
        left = set(order[: max(few, _FEW, len(order) // 2)])
    return gone


def evolution(trials: Trials, budget: Budget, rounds: int, seed: int) -> dict[Piece, str]:
    """Pieces that go, all of one cost, and why; from the sets that single trials suggest on."""
    draw = random.Random(seed)
    pieces = budget.open(frozenset())
    alone = {p: trials(frozenset({p})) for p in track(pieces, "single pieces")}
    parents = [ranked(alone, budget)]
    count = len(parents[0])
    order = sorted(alone, key=lambda p: (alone[p], p))
    known = {parents[0]: trials(parents[0])}
    for _ in track(range(rounds), "evolution"):
        for _ in range(_CHILDREN):
            child = set(draw.choice(parents))
            for _ in range(min(draw.choice((1, 1, 2)), len(order) - count, count)):
                child.remove(draw.choice(sorted(child)))
                child.add(draw.choice([p for p in order if p not in child]))
            if (made := frozenset(child)) not in known and budget.fits(made):
                known[made] = trials(made)
        parents = sorted(known, key=lambda s: (known[s], sorted(s)))[:_PARENTS]
    why = f"best of {len(known)} sets by evolution; outputs off by {known[parents[0]]:.4g}"
    return dict.fromkeys(sorted(parents[0]), why)
