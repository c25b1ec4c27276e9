"""Which blocks go.

influence   1 - mean cosine of a block's input and output (ShortGPT, arXiv 2403.03853, section 3.1)
angular     one run of blocks, by the mean angle of its input and output over pi (Gromov et al.,
            arXiv 2403.17887, section 3.2)
greedy      one block after the other, by how far the outputs of the network without it are from
            those of the whole one; as SLEB (arXiv 2402.09025), but with the patch in place
evolution   sets of blocks, by the same: the best are changed by a block and compared again
            (EvoPress, arXiv 2410.14649, section 3)

What is cut so far need not be run again: a candidate begins with the hidden states that reach it.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from penjing.calibrate import Stream
from penjing.detour import Detours, Passed, Way
from penjing.divergence import divergence
from penjing.model import Batch, Model
from penjing.progress import track

__all__ = [
    "Trials", "angles", "evolution", "greedy", "half_influence", "influence", "judges", "runs",
]  # fmt: skip

# Elements of a batch to judge by, with its outputs, and tokens.
_MOST, _TOKENS = 64 * 2**20, 512
# After the first, a round of `greedy` tries the better half and this many at least.
_FEW = 4
# Of `evolution`: sets that are kept, sets that each round makes of them.
_PARENTS, _CHILDREN = 4, 8

# What stands in for the blocks from the first index to the second, both gone.
Patcher = Callable[[int, int], Way]


def influence(stream: Stream) -> dict[int, float]:
    """1 - mean cosine of input and output, of every block that keeps its shape."""
    scores: dict[int, float] = {}
    for index, _, calls, outputs in stream.walk():
        if any(c.hidden.shape != o.shape for c, o in zip(calls, outputs, strict=True)):
            continue
        total, count = 0.0, 0
        for number, (call, output) in enumerate(zip(calls, outputs, strict=True)):
            cosine = _cosine(stream, number, call.hidden, output)
            total, count = total + float(cosine.sum()), count + len(cosine)
        scores[index] = 1 - total / count
    return scores


def half_influence(stream: Stream, silent: Mapping[int, str]) -> dict[int, float]:
    """1 - mean cosine of what a block gives with and without the layer that ends its half."""
    scores: dict[int, float] = {}
    for index, block, calls, outputs in stream.walk():
        if index not in silent:
            continue
        layer = stream.model.module.get_submodule(silent[index])
        handle = layer.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
        total, count = 0.0, 0
        try:
            for number, (call, output) in enumerate(zip(calls, outputs, strict=True)):
                cosine = _cosine(stream, number, call.run(block, call.hidden), output)
                total, count = total + float(cosine.sum()), count + len(cosine)
        finally:
            handle.remove()
        scores[index] = 1 - total / count
    return scores


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
    found: list[Batch] = []
    size, tokens = 0, 0
    for batch in held:
        rows = len(next(iter(batch.values())))
        real = [int(batch[mask][r].sum()) if mask else 0 for r in range(rows)]
        kept = 0
        while kept < rows and (not (found or kept) or (size < _MOST and tokens < _TOKENS)):
            size, tokens, kept = size + each, tokens + real[kept], kept + 1
        if kept:
            found.append({name: x[:kept] for name, x in batch.items()})
    return found


class Trials:
    """Sets of blocks to cut, tried on a few batches with patches in place.

    Args:
        model: the whole network.
        batches: to judge by.
        patcher: of a run of blocks that are gone.
        score: how far outputs are from the whole network's; by default `penjing.divergence`.
        silent: of blocks of which a half may go, the layer that ends it; None to cut whole blocks.

    Attributes:
        able: blocks that may go, as they keep the shape of the hidden state.
        count: trials made.
    """

    def __init__(
        self, model: Model, batches: Sequence[Batch], patcher: Patcher,
        score: Callable[[Sequence[Tensor]], float] | None = None,
        silent: Mapping[int, str] | None = None,
    ) -> None:  # fmt: skip
        self._batches, self._patcher, self._silent = list(batches), patcher, silent
        self._detours = Detours(model, batches[0])
        self.count = 0
        self._base: frozenset[int] = frozenset()
        self._states = [Passed() for _ in batches]
        whole = [self._detours.run(b, {}, p) for b, p in zip(batches, self._states, strict=True)]
        self._score = score or (
            lambda found: divergence(model.interface, self._batches, whole, found)
        )
        first = self._states[0]
        self.able = list(silent) if silent is not None else [
            i for i in range(len(model.blocks))
            if first.entered[i].shape == first.left[i].shape
        ]  # fmt: skip

    def __call__(self, gone: frozenset[int]) -> float:
        """How far the outputs without these blocks are from the whole network's."""
        self.count += 1
        return self._score(self._run(gone, None))

    def settle(self, gone: frozenset[int]) -> None:
        """Later trials begin with the hidden states of this one, as far as they agree."""
        states = [Passed() for _ in self._batches]
        self._run(gone, states)
        for old, new in zip(self._states, states, strict=True):
            old.left |= new.left
        self._base = gone

    def _run(self, gone: frozenset[int], states: list[Passed] | None) -> list[Tensor]:
        start = min(gone ^ self._base, default=0)
        ways: dict[int, Way] = {}
        silent: list[str] = []
        if self._silent is not None:
            silent = [self._silent[i] for i in gone if i >= start]
        else:
            while start - 1 in gone:  # the patch is of the whole run of blocks
                start -= 1
        for first, last in runs(gone if self._silent is None else frozenset()):
            if first >= start:
                ways |= dict.fromkeys(range(first, last))
                ways[last] = self._patcher(first, last)
        outputs = []
        for number, batch in enumerate(self._batches):
            skipped: dict[int, Way] = dict.fromkeys(range(start))
            if start:  # a copy: what comes next may work in place
                known = self._states[number].left[start - 1]
                skipped[start - 1] = functools.partial(_instead, known)
            passed = None if states is None else states[number]
            outputs.append(self._detours.run(batch, skipped | ways, passed, silent))
            if passed is not None:
                passed.left = {i: h for i, h in passed.left.items() if i >= start}
        return outputs


def _instead(known: Tensor, _: Tensor) -> Tensor:
    return known.clone()


def runs(gone: frozenset[int]) -> list[tuple[int, int]]:
    """First and last of each run of neighbours."""
    return [
        (first, next(i for i in range(first, max(gone) + 2) if i not in gone) - 1)
        for first in sorted(gone)
        if first - 1 not in gone
    ]


def greedy(trials: Trials, count: int) -> dict[int, str]:
    """Blocks in the order they go, and why."""
    gone: dict[int, str] = {}
    left = list(trials.able)
    for number in range(count):
        base = frozenset(gone)
        tried = {i: trials(base | {i}) for i in track(left, f"cut {number + 1} of {count}")}
        order = sorted(tried, key=lambda i: (tried[i], i))
        best = order[0]
        gone[best] = f"taken as number {number + 1}; outputs then off by {tried[best]:.4g}"
        trials.settle(frozenset(gone))
        left = [i for i in order[: max(count - number, _FEW, len(order) // 2)] if i != best]
    return gone


def evolution(trials: Trials, count: int, rounds: int, seed: int) -> dict[int, str]:
    """Blocks that go, and why; from the sets that single trials suggest on."""
    draw = random.Random(seed)
    alone = {i: trials(frozenset({i})) for i in track(trials.able, "single blocks")}
    order = sorted(alone, key=lambda i: (alone[i], i))
    known: dict[frozenset[int], float] = {}
    parents = [frozenset(order[:count])]
    known[parents[0]] = trials(parents[0])
    for _ in track(range(rounds), "evolution"):
        for _ in range(_CHILDREN):
            child = set(draw.choice(parents))
            for _ in range(min(draw.choice((1, 1, 2)), len(order) - count, count)):
                child.remove(draw.choice(sorted(child)))
                child.add(draw.choice([i for i in order if i not in child]))
            if (made := frozenset(child)) not in known:
                known[made] = trials(made)
        parents = sorted(known, key=lambda s: (known[s], sorted(s)))[:_PARENTS]
    why = f"best of {len(known)} sets by evolution; outputs off by {known[parents[0]]:.4g}"
    return dict.fromkeys(sorted(parents[0]), why)
