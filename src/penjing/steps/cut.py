"""Cut: whole blocks go away, and a linear patch stands in for them.

Importance is block influence, 1 - mean cosine between a block's input and output (ShortGPT,
arXiv 2403.03853, section 3.1). The patch is a full ridge regression toward the identity, from
the hidden state that reaches the gap to the one the uncut network had behind it (LinearPatch,
arXiv 2505.24680). A patch that does not help on held-out batches is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats, Stream, Unit
from penjing.errors import InputError, UsageError
from penjing.linalg import affine_ridge
from penjing.recipe import Edit, Patch
from penjing.steps._select import LEARNED

__all__ = ["Cut", "fit_patch", "influence"]

# A token whose norm is this many times the median is an attention sink, not a sample.
_MASSIVE = 10.0


@dataclass(frozen=True)
class Cut:
    """Remove blocks.

    Attributes:
        layers: how many blocks go; or
        ratio: which fraction of them goes, rounded; or
        blocks: which ones, by path.
        criterion: `influence`, `random` as a null baseline, or `learned` in place of the number:
            what the step `constrain` before it chose.
        patch: `linear` or `none`.
        strength: of the patch's ridge toward the identity.
        seed: for `random`.
    """

    name: ClassVar[str] = "cut"
    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset()

    layers: int | None = None
    ratio: float | None = None
    blocks: tuple[str, ...] = ()
    criterion: str = "influence"
    patch: str = "linear"
    strength: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        ways = (self.layers is not None) + (self.ratio is not None) + bool(self.blocks)
        if ways + (self.criterion == LEARNED) != 1:
            raise UsageError(
                "cut", allowed="exactly one of layers, ratio, blocks and criterion learned"
            )
        if self.layers is not None and self.layers < 1:
            raise UsageError("layers", got=self.layers, allowed="1 or more")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UsageError("ratio", got=self.ratio, allowed="0 < ratio < 1")
        known = ("influence", "random", LEARNED)
        if self.criterion not in known:
            raise UsageError("unknown criterion", got=self.criterion, allowed=", ".join(known))
        if self.patch not in ("linear", "none"):
            raise UsageError("unknown patch", got=self.patch, allowed="linear, none")

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """Patches first, in the old numbering, then drops from the last to the first."""
        if not unit.batches:
            raise UsageError("cut needs data", next="give --data")
        blocks = unit.model.blocks
        if len(blocks) < 2:
            raise InputError("no repeated blocks to cut", got=len(blocks), allowed="2 or more")
        gone, why = self._choose(unit, blocks)
        if self.patch == "linear":
            yield from self._patches(Stream(unit.model, unit.batches), gone)
        for index in sorted(gone, reverse=True):
            yield Edit("drop", blocks[index], None, why[index])

    def _choose(self, unit: Unit, blocks: tuple[str, ...]) -> tuple[set[int], dict[int, str]]:
        if self.blocks:
            if unknown := sorted(set(self.blocks) - set(blocks)):
                raise InputError("no such block", got=unknown[0], allowed=", ".join(blocks))
            gone = {blocks.index(b) for b in self.blocks}
            if len(gone) == len(blocks):
                raise InputError("all blocks are to be cut", allowed="leave at least one")
            return gone, dict.fromkeys(gone, "asked for by name")
        if self.criterion == LEARNED:
            gone = {i for i, b in enumerate(blocks) if not unit.model.kept.get(b, True)}
            if not gone:
                raise UsageError("no block was learned to go", next="put constrain before cut")
            return gone, dict.fromkeys(gone, "learned in training")
        count = self.layers or max(1, round((self.ratio or 0) * len(blocks)))
        scores = influence(Stream(unit.model, unit.batches))
        if count > min(len(scores), len(blocks) - 1):
            raise InputError(
                "too many blocks to cut",
                got=count,
                allowed=f"at most {min(len(scores), len(blocks) - 1)}",
            )
        if self.criterion == "random":
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(len(scores), generator=generator).tolist()
            gone = {list(scores)[i] for i in order[:count]}
        else:
            gone = set(sorted(scores, key=lambda i: (scores[i], i))[:count])
        return gone, {i: f"block influence {scores[i]:.3f}, by {self.criterion}" for i in gone}

    def _patches(self, stream: Stream, gone: set[int]) -> Iterator[Edit]:
        paths = stream.model.blocks
        hidden: list[Tensor] = []  # of the cut network, one a batch
        gap = False
        for index, block, calls, outputs in stream.walk():
            hidden = hidden or [call.hidden for call in calls]
            gap = gap or index in gone
            if index not in gone:
                hidden = [c.run(block, h) for c, h in zip(calls, hidden, strict=True)]
                continue
            if index + 1 in gone:
                continue
            if outputs[0].ndim == 3 and (fit := fit_patch(stream, hidden, outputs, self.strength)):
                weight, bias, before, after = fit
                hidden = [h @ weight.T + bias for h in hidden]
                last = index + 1 == len(paths)
                near = max(i for i in range(index) if i not in gone) if last else index + 1
                yield Edit(
                    "patch",
                    paths[near],
                    Patch(weight, bias, "after" if last else "before"),
                    f"stands in for the cut; held-out error {before:.3f} to {after:.3f}",
                    {"before": before, "after": after},
                )
            if index == max(gone):
                return


@dataclass
class _Sums:
    """Sufficient statistics of a regression y on x."""

    width: int
    count: int = 0
    tensors: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor, y: Tensor) -> None:
        x, y = x.double(), y.double()
        new = [x.sum(0), y.sum(0), x.T @ x, x.T @ y]
        self.tensors = (
            [a + b for a, b in zip(self.tensors, new, strict=True)] if self.count else new
        )
        self.count += len(x)


def fit_patch(
    stream: Stream, inputs: list[Tensor], outputs: list[Tensor], strength: float
) -> tuple[Tensor, Tensor, float, float] | None:
    """Patch and its relative held-out error without and with it; None where it does not help.

    Held out is the last quarter of the batches, of a single batch the last quarter of its rows.
    """
    pairs = []
    for number, (source, goal) in enumerate(zip(inputs, outputs, strict=True)):
        x, y = stream.rows(number, source), stream.rows(number, goal)
        norms = y.norm(dim=1)
        calm = norms <= _MASSIVE * norms.median()
        pairs.append((x[calm], y[calm]))
    if len(pairs) == 1:
        x, y = pairs[0]
        border = len(x) - len(x) // 4
        pairs = [(x[:border], y[:border]), (x[border:], y[border:])]
    held = max(1, len(pairs) // 4)
    tests = pairs[-held:]
    sums = _Sums(inputs[0].shape[-1])
    for x, y in pairs[:-held]:
        sums.add(x, y)
    if not sums.count:
        return None
    eye = torch.eye(sums.width, dtype=torch.float64, device=inputs[0].device)
    sum_x, sum_y, gram, cross = sums.tensors
    weight, bias = affine_ridge(sums.count, sum_x, sum_y, gram, cross, strength, eye)
    # Contiguous, as it comes back from a journal: a layout can change the last bit of a product.
    weight, bias = weight.float().contiguous(), bias.float().contiguous()
    total = sum(float(y.square().sum()) for _, y in tests)
    before = sum(float((x - y).square().sum()) for x, y in tests)
    after = sum(float((x @ weight.T + bias - y).square().sum()) for x, y in tests)
    if not after < before:
        return None
    return weight, bias, before / max(total, 1e-12), after / max(total, 1e-12)


def influence(stream: Stream) -> dict[int, float]:
    """1 - mean cosine of input and output, of every block that keeps its shape."""
    scores: dict[int, float] = {}
    for index, _, calls, outputs in stream.walk():
        if any(c.hidden.shape != o.shape for c, o in zip(calls, outputs, strict=True)):
            continue
        total, count = 0.0, 0
        for number, (call, output) in enumerate(zip(calls, outputs, strict=True)):
            if output.ndim == 3:
                x, y = stream.rows(number, call.hidden), stream.rows(number, output)
            else:
                x, y = call.hidden.flatten(1), output.flatten(1)
            total += float(nn.functional.cosine_similarity(x, y, dim=1).sum())
            count += len(x)
        scores[index] = 1 - total / count
    return scores
