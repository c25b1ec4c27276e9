"""Mending: patches at the gaps that blocks leave, and new weights for what writes behind them.

Everything is fitted on the network as it is cut so far, toward what the whole network has at the
same place. What is fitted and kept: see `_gaps`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from penjing.calibrate import Stream
from penjing.calls import Call
from penjing.detour import Detours, Passed, Way, zeros
from penjing.layerstats import unpadded
from penjing.model import Batch, Model
from penjing.recipe import Edit, Patch
from penjing.steps._gaps import Fit, Writer, fit_map, low_rank, refit, sums, writers_of
from penjing.steps._halves import Half
from penjing.steps._trials import Piece, blocks_of, runs, stages

__all__ = ["PATCHES", "Mending", "Patches", "fit_patch"]

PATCHES = ("linear", "low-rank", "fused", "none")
# Of a low-rank patch, of the width.
_RANK = 8
# Samples of a patch that is only tried: this many times the width, and no fewer than that.
_TIMES, _FEWEST = 32, 8192


@dataclass(frozen=True)
class Mending:
    """How what is left makes up for what goes.

    Attributes:
        patch: one of `PATCHES`, of whole blocks.
        refit: whether the layers that write the hidden state behind a gap take up what it leaves.
        strength: of the patch's ridge toward the identity.
    """

    patch: str
    refit: bool
    strength: float

    def edits(
        self, stream: Stream, gone: Collection[Piece], halves: Mapping[Piece, Half]
    ) -> Iterator[Edit]:
        """Patches and weights, in the numbering of the whole network."""
        blocks = blocks_of(gone)
        fused = self.patch == "fused" and bool(blocks)
        refits = self.refit or fused
        last = max((p.index for p in gone), default=-1) if refits else max(blocks, default=-1)
        if last < 0 or (self.patch == "none" and not refits):
            return
        first = min(piece.index for piece in gone)
        parts = stages(stream.model.blocks)
        ends = {end for _, end in runs(blocks, {min(part) for part in parts})}
        hidden: list[Tensor] = []  # of the cut network, one a batch
        gave: list[Tensor] = []  # of the whole network, by the block before
        near: tuple[int, nn.Module, list[Call], list[Tensor]] | None = None  # in front of a gap
        for index, block, calls, outputs in stream.walk():
            entered = [call.hidden for call in calls]
            if not all(x is y or torch.equal(x, y) for x, y in zip(entered, gave, strict=False)):
                hidden, near = [], None  # something stands between, and cannot be run alone
            hidden, gave = hidden or entered, outputs
            if index not in blocks:
                without = [halves[piece].writer.path for piece in gone if piece.index == index]
                if refits or without:
                    block = copy.deepcopy(block)
                for path in without:
                    block.get_submodule(path).register_forward_hook(zeros)
                if refits and index >= first:
                    yield from self._refit(stream, index, block, calls, hidden, without)
                if fused:
                    near = (index, block, calls, hidden)
                hidden = [c.run(block, h) for c, h in zip(calls, hidden, strict=True)]
            elif index not in ends:
                continue
            elif self.patch == "fused" and near is not None:
                yield from self._fused(stream, near, outputs)
                _, block, calls, hidden = near
                hidden = [c.run(block, h) for c, h in zip(calls, hidden, strict=True)]
            elif self.patch in ("linear", "low-rank") and outputs[0].ndim == 3:
                fit = fit_patch(stream, hidden, outputs, self.strength)
                if fit is not None:
                    behind = any(index == max(part) for part in parts)
                    at = max(set(range(index)) - blocks) if behind else index + 1
                    edit = self._edit(stream, at, index, fit, hidden)
                    hidden = [edit.value(h) for h in hidden]  # type: ignore[operator, misc]
                    yield edit
            if index == last and not refits:
                return

    def _edit(
        self, stream: Stream, at: int, index: int, fit: Fit, hidden: Sequence[Tensor]
    ) -> Edit:
        """The patch, at block `at`, of a gap that ends with block `index`."""
        inner, weight = None, fit.weight
        if self.patch == "low-rank":
            rows = [stream.rows(n, h) for n, h in enumerate(hidden)]
            weight, inner = low_rank(weight, rows, max(1, len(weight) // _RANK))
        patch = Patch(weight, fit.bias, "before" if at > index else "after", inner)
        why = "stands in for the cut" + _told(fit)
        note = {"before": fit.before, "after": fit.after}
        return Edit("patch", stream.model.blocks[at], patch, why, note)

    def _fused(
        self, stream: Stream, near: tuple[int, nn.Module, list[Call], list[Tensor]],
        outputs: list[Tensor],
    ) -> Iterator[Edit]:  # fmt: skip
        """The last writer in front of a gap gives what the whole network has behind it."""
        index, block, calls, hidden = near
        for writer in writers_of(block, replace(calls[0], hidden=hidden[0]))[-1:]:
            if writer.site == "":
                fit = refit(block, writer, calls, hidden, outputs, stream.rows)
                yield from _weights(stream.model.blocks[index], block, writer, fit)

    def _refit(
        self, stream: Stream, index: int, block: nn.Module, calls: list[Call],
        hidden: list[Tensor], without: Sequence[str],
    ) -> Iterator[Edit]:  # fmt: skip
        """The writers of a block, one after the other; but for those that are gone."""
        path = stream.model.blocks[index]
        whole = stream.model.module.get_submodule(path)
        for writer in writers_of(whole, calls[0]):
            if writer.path not in without:
                wanted = sums(whole, writer, calls)
                fit = refit(block, writer, calls, hidden, wanted, stream.rows)
                yield from _weights(path, block, writer, fit)


def _weights(path: str, block: nn.Module, writer: Writer, fit: Fit | None) -> Iterator[Edit]:
    """A writer's new weights, which `block` gets at once."""
    if fit is None:
        return
    layer = block.get_submodule(writer.path)
    for name, value in (("weight", fit.weight), ("bias", fit.bias)):
        if isinstance(old := getattr(layer, name, None), nn.Parameter):
            old.data = value.to(old)
            why = "takes up what the cut leaves" + _told(fit)
            yield Edit("weight", f"{path}.{writer.path}.{name}", value, why)


def _told(fit: Fit) -> str:
    return f"; held-out error {fit.before:.3f} to {fit.after:.3f}"


def fit_patch(
    stream: Stream, inputs: Sequence[Tensor], outputs: Sequence[Tensor], strength: float
) -> Fit | None:
    """The patch from inputs to outputs, one a batch; None where it does not help."""
    pairs = enumerate(zip(inputs, outputs, strict=True))
    return _mapped([(stream.rows(n, x), stream.rows(n, y)) for n, (x, y) in pairs], strength)


def _mapped(rows: Sequence[tuple[Tensor, Tensor]], strength: float) -> Fit | None:
    return fit_map([(x, y, x) for x, y in rows], torch.eye(rows[0][0].shape[1]), strength)


class Patches:
    """Linear patches of runs of blocks, fitted to what the whole network has around them.

    Args:
        batches: to fit to; without any there are no patches.
    """

    def __init__(self, model: Model, batches: Sequence[Batch], strength: float) -> None:
        self._strength, self._known = strength, dict[tuple[int, int], Way]()
        # [batch][block] [tokens, width]: what enters a block, and what it gives.
        self._entered: list[dict[int, Tensor]] = []
        self._left: list[dict[int, Tensor]] = []
        if not batches:
            return
        detours = Detours(model, {n: x[:1] for n, x in batches[0].items()})
        stride = 0
        for batch in batches:
            passed, mask = Passed(), batch.get("attention_mask")
            detours.run(batch, {}, passed)
            if passed.left[0].ndim != 3:
                return
            if not stride:
                tokens = len(batches) * len(unpadded(passed.left[0], mask))
                stride = math.ceil(tokens / max(_FEWEST, _TIMES * passed.left[0].shape[2]))
            rows = {  # what one block gives is most often what the next one gets
                id(h): unpadded(h, mask)[::stride].clone()
                for h in (*passed.entered.values(), *passed.left.values())
            }
            self._entered.append({i: rows[id(h)] for i, h in passed.entered.items()})
            self._left.append({i: rows[id(h)] for i, h in passed.left.items()})

    def __call__(self, first: int, last: int) -> Way:
        """What stands in for the blocks from the first to the last."""
        if not self._left:
            return None
        if (first, last) not in self._known:
            pairs = zip(self._entered, self._left, strict=True)
            fit = _mapped([(x[first], y[last]) for x, y in pairs], self._strength)
            way = None if fit is None else Patch(fit.weight, fit.bias, "before")
            self._known[first, last] = way
        return self._known[first, last]
