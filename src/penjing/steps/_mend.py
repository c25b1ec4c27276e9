"""Mending: patches at the gaps that blocks leave, and new weights for what writes behind them.

Everything is fitted on the network as it is cut so far, toward what the whole network has at the
same place. What is fitted and kept: see `_gaps`.

A merged patch is no fit: the block l in front of a gap takes on a share of what tells the blocks
that go from it, in every parameter (LaCo, Yang et al., arXiv 2402.11187, section 2, where it takes
all of it),

    theta_l + share * sum over blocks k of the gap of (theta_k - theta_l)

where that brings its output nearer to the whole network's on held-out data.
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

PATCHES = ("linear", "low-rank", "fused", "merged", "none")
# Of a low-rank patch, of the width.
_RANK = 8
# Of the difference between blocks that go and the one in front of them, what this one may take on.
_SHARES = (0.25, 0.5, 0.75, 1.0)
# Samples of a patch that is only tried: this many times the width, and no fewer than that.
_TIMES, _FEWEST = 32, 8192

# In front of a gap: index of the block, a copy of it, its calls and what enters it.
Near = tuple[int, nn.Module, list[Call], list[Tensor]]


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
        absorbed = self.patch in ("fused", "merged") and bool(blocks)  # by the block in front
        refits = self.refit or (self.patch == "fused" and absorbed)
        last = max((p.block for p in gone), default=-1) if refits else max(blocks, default=-1)
        if last < 0 or (self.patch == "none" and not refits):
            return
        first = min(piece.block for piece in gone)
        parts = stages(stream.model.blocks)
        ends = {end for _, end in runs(blocks, {min(part) for part in parts})}
        hidden: list[Tensor] = []  # of the cut network, one a batch
        gave: list[Tensor] = []  # of the whole network, by the block before
        near: Near | None = None
        for index, block, calls, outputs in stream.walk():
            entered = [call.hidden for call in calls]
            if not all(x is y or torch.equal(x, y) for x, y in zip(entered, gave, strict=False)):
                hidden, near = [], None  # something stands between, and cannot be run alone
            hidden, gave = hidden or entered, outputs
            if index not in blocks:
                without = [halves[piece].writer.path for piece in gone if piece.block == index]
                if refits or absorbed or without:
                    block = copy.deepcopy(block)
                for path in without:
                    block.get_submodule(path).register_forward_hook(zeros)
                if refits and index >= first:
                    yield from self._refit(stream, index, block, calls, hidden, without)
                if absorbed:
                    near = (index, block, calls, hidden)
                hidden = [c.run(block, h) for c, h in zip(calls, hidden, strict=True)]
            elif index not in ends:
                continue
            elif near is not None:
                if self.patch == "fused":
                    yield from self._fused(stream, near, outputs)
                else:
                    yield from _merged(stream, near, range(near[0] + 1, index + 1), outputs)
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

    def _fused(self, stream: Stream, near: Near, outputs: list[Tensor]) -> Iterator[Edit]:
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


def _merged(
    stream: Stream, near: Near, gap: Sequence[int], outputs: Sequence[Tensor]
) -> Iterator[Edit]:
    """New parameters of the block in front of a gap, which it gets at once."""
    index, block, calls, hidden = near
    paths = stream.model.blocks
    gone = [dict(stream.model.module.get_submodule(paths[k]).named_parameters()) for k in gap]
    own = {name: p.detach().clone() for name, p in block.named_parameters()}
    shapes = {name: p.shape for name, p in own.items()}
    if any({name: p.shape for name, p in other.items()} != shapes for other in gone):
        return
    held = range(len(calls))[-max(1, len(calls) // 4) :]

    def off(share: float) -> float:
        """Mean squared error of a token over its square, with this share."""
        for name, parameter in block.named_parameters():
            change = sum(other[name].detach() - own[name] for other in gone)
            parameter.data = own[name] + share * change
        errors = []
        for n in held:
            made, wanted = (
                stream.rows(n, x) if x.ndim == 3 else x.flatten(1)
                for x in (calls[n].run(block, hidden[n]), outputs[n])
            )  # fmt: skip
            errors.append((made - wanted).square().sum(1) / wanted.square().sum(1).clamp_min(1e-12))
        return float(torch.cat(errors).mean())

    tried = {share: off(share) for share in (0.0, *_SHARES)}
    best = min(tried, key=tried.__getitem__)
    off(best)
    if best:
        why = f"took {best:.0%} of what told the cut from it; held-out error "
        why += f"{tried[0.0]:.3f} to {tried[best]:.3f}"
        for name, parameter in block.named_parameters():
            yield Edit("weight", f"{paths[index]}.{name}", parameter.detach().clone(), why)


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
