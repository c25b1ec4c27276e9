"""Cut: whole blocks or halves of them go away, and what is left makes up for them.

Which blocks: see `_depth`. What stands in for them: see `_gaps`. Halves: see `_halves`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats, Stream, Unit
from penjing.calls import Call
from penjing.detour import Detours, Passed, Way
from penjing.errors import InputError, UsageError
from penjing.layerstats import unpadded
from penjing.model import Model
from penjing.recipe import Edit, Patch
from penjing.steps._depth import (
    Trials,
    angles,
    evolution,
    greedy,
    half_influence,
    influence,
    judges,
)
from penjing.steps._gaps import Fit, Writer, fit_map, low_rank, refit, sums, writers_of
from penjing.steps._halves import Half, halves_of
from penjing.steps._select import LEARNED

__all__ = ["CRITERIA", "PARTS", "PATCHES", "Cut", "Patches", "fit_patch", "influence"]

PARTS = ("block", "attention", "mlp")
CRITERIA = ("influence", "angular", "greedy", "evolution", "random")
PATCHES = ("linear", "low-rank", "fused", "none")
# Of a low-rank patch, of the width.
_RANK = 8


@dataclass(frozen=True)
class Cut:
    """Remove blocks.

    Attributes:
        layers: how many blocks go; or
        ratio: which fraction of them goes, rounded; or
        blocks: which ones, by path.
        criterion: `influence`, `angular`, `greedy` or `evolution` (see `penjing.steps._depth`),
            `random` as a null baseline, or `learned` in place of the number: what the step
            `constrain` before it chose.
        part: of a block that goes: `block` for all of it, `attention`, `mlp`.
        patch: `linear`, `low-rank` (an eighth of the width), `fused`, which costs nothing at run
            time, or `none`; of whole blocks.
        refit: the layers that write the hidden state behind a gap take up what it leaves; with
            `fused` they do in any case.
        strength: of the patch's ridge toward the identity.
        rounds: of `evolution`.
        seed: for `random` and `evolution`.
    """

    name: ClassVar[str] = "cut"
    scope: ClassVar[str] = "model"
    needs: ClassVar[frozenset[str]] = frozenset()

    layers: int | None = None
    ratio: float | None = None
    blocks: tuple[str, ...] = ()
    part: str = "block"
    criterion: str = "influence"
    patch: str = "linear"
    refit: bool = False
    strength: float = 0.01
    rounds: int = 8
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
        if self.rounds < 1:
            raise UsageError("rounds", got=self.rounds, allowed="1 or more")
        if self.part not in PARTS:
            raise UsageError("unknown part", got=self.part, allowed=", ".join(PARTS))
        if self.part != "block" and self.criterion in ("angular", LEARNED):
            raise UsageError(
                f"criterion {self.criterion} of halves of blocks",
                allowed=", ".join(c for c in CRITERIA if c != "angular"),
            )
        known = (*CRITERIA, LEARNED)
        if self.criterion not in known:
            raise UsageError("unknown criterion", got=self.criterion, allowed=", ".join(known))
        if self.patch not in PATCHES:
            raise UsageError("unknown patch", got=self.patch, allowed=", ".join(PATCHES))

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """Patches and weights first, in the old numbering, then drops, the last first."""
        if not unit.batches:
            raise UsageError("cut needs data", next="give --data")
        blocks = unit.model.blocks
        if len(blocks) < 2:
            raise InputError("no repeated blocks to cut", got=len(blocks), allowed="2 or more")
        halves = self._halves(unit) if self.part != "block" else None
        why = self._choose(unit, blocks, halves)
        if self.patch != "none" or self.refit:
            yield from self._repair(Stream(unit.model, unit.batches), set(why), halves)
        for index in sorted(why, reverse=True):
            if halves is None:
                yield Edit("drop", blocks[index], None, why[index])
                continue
            for path, left in halves[index].parts:
                yield Edit("drop", f"{blocks[index]}.{path}", left, why[index])

    def _halves(self, unit: Unit) -> dict[int, Half]:
        """Of every block that has such a half."""
        found = {}
        stream = Stream(unit.model, [{n: x[:1] for n, x in unit.batches[0].items()}])
        for index, block, calls, _ in stream.walk():
            if (half := halves_of(block, calls[0]).get(self.part)) is not None:  # type: ignore[call-overload]
                found[index] = half
        if not found:
            raise InputError(
                f"no {self.part} found in the blocks",
                allowed="a part that ends in one linear layer whose output is added to its input",
                next="cut whole blocks",
            )
        return found

    def _choose(
        self, unit: Unit, blocks: tuple[str, ...], halves: dict[int, Half] | None
    ) -> dict[int, str]:
        """Blocks that go, or lose a half, and why."""
        if self.blocks:
            if unknown := sorted(set(self.blocks) - set(blocks)):
                raise InputError("no such block", got=unknown[0], allowed=", ".join(blocks))
            gone = {blocks.index(b) for b in self.blocks}
            if halves is not None and (bare := sorted(gone - set(halves))):
                raise InputError(f"no {self.part} to cut", got=blocks[bare[0]])
            if halves is None and len(gone) == len(blocks):
                raise InputError("all blocks are to be cut", allowed="leave at least one")
            return dict.fromkeys(gone, "asked for by name")
        if self.criterion == LEARNED:
            gone = {i for i, b in enumerate(blocks) if not unit.model.kept.get(b, True)}
            if not gone:
                raise UsageError("no block was learned to go", next="put constrain before cut")
            return dict.fromkeys(gone, "learned in training")
        count = self.layers or max(1, round((self.ratio or 0) * len(blocks)))
        silent = None
        if halves is not None:
            silent = {i: f"{blocks[i]}.{half.writer.path}" for i, half in halves.items()}
        if self.criterion in ("greedy", "evolution"):
            judging = judges(unit.model, unit.batches)
            trials = Trials(unit.model, judging, self._patcher(unit), silent=silent)
            _enough(count, len(trials.able), len(blocks))
            if self.criterion == "greedy":
                return greedy(trials, count)
            return evolution(trials, count, self.rounds, self.seed)
        stream = Stream(unit.model, unit.batches)
        scores = influence(stream) if silent is None else half_influence(stream, silent)
        _enough(count, len(scores), len(blocks))
        if self.criterion == "angular":
            found = angles(Stream(unit.model, unit.batches), count)
            if not found:
                raise InputError(
                    "no run of blocks keeps its shape", got=f"{count} blocks",
                    next="use the criterion influence, or cut fewer",
                )  # fmt: skip
            first = min(found, key=lambda i: (found[i], i))
            why = f"of a run of {count} at an angle of {found[first]:.3f} pi"
            return dict.fromkeys(range(first, first + count), why)
        if self.criterion == "random":
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(len(scores), generator=generator).tolist()
            gone = {list(scores)[i] for i in order[:count]}
        else:
            gone = set(sorted(scores, key=lambda i: (scores[i], i))[:count])
        return {i: f"block influence {scores[i]:.3f}, by {self.criterion}" for i in gone}

    def _patcher(self, unit: Unit) -> Patches:
        count = len(unit.batches)
        patched = self.patch != "none" and self.part == "block"
        train = unit.batches[: count - max(1, count // 4)] if count > 1 else unit.batches
        return Patches(unit.model, train if patched else (), self.strength)

    def _repair(
        self, stream: Stream, gone: set[int], halves: dict[int, Half] | None
    ) -> Iterator[Edit]:
        refits = self.refit or (self.patch == "fused" and halves is None)
        hidden: list[Tensor] = []  # of the cut network, one a batch
        near: tuple[int, nn.Module, list[Call], list[Tensor]] | None = None  # before a gap
        for index, block, calls, outputs in stream.walk():
            hidden = hidden or [call.hidden for call in calls]
            if index not in gone or halves is not None:
                without = ""
                if refits or index in gone:
                    block = copy.deepcopy(block)
                if halves is not None and index in gone:
                    without = halves[index].writer.path
                    block.get_submodule(without).register_forward_hook(_nothing)
                if refits and index >= min(gone):
                    yield from self._refit(stream, index, block, calls, hidden, without)
                near = (index, block, calls, hidden)
                hidden = [c.run(block, h) for c, h in zip(calls, hidden, strict=True)]
                continue
            if index + 1 in gone:
                continue
            if self.patch == "fused" and near is not None:
                yield from self._fused(stream, near, outputs)
                _, block, calls, hidden = near
                hidden = [c.run(block, h) for c, h in zip(calls, hidden, strict=True)]
            elif self.patch in ("linear", "low-rank") and outputs[0].ndim == 3:
                fit = fit_patch(stream, hidden, outputs, self.strength)
                if fit is not None:
                    last = index + 1 == len(stream.model.blocks)
                    patch = self._shaped(fit, stream, hidden, last)
                    hidden = [patch(h) for h in hidden]
                    at = max(i for i in range(index) if i not in gone) if last else index + 1
                    why = "stands in for the cut" + _told(fit)
                    note = {"before": fit.before, "after": fit.after}
                    yield Edit("patch", stream.model.blocks[at], patch, why, note)
            if index == max(gone) and not refits:
                return

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

    def _shaped(self, fit: Fit, stream: Stream, hidden: Sequence[Tensor], last: bool) -> Patch:
        inner, weight = None, fit.weight
        if self.patch == "low-rank":
            rows = [stream.rows(n, h) for n, h in enumerate(hidden)]
            weight, inner = low_rank(weight, rows, max(1, len(weight) // _RANK))
        return Patch(weight, fit.bias, "after" if last else "before", inner)

    def _refit(
        self, stream: Stream, index: int, block: nn.Module, calls: list[Call],
        hidden: list[Tensor], without: str,
    ) -> Iterator[Edit]:  # fmt: skip
        """The writers of a block, one after the other; but for one that is gone."""
        path = stream.model.blocks[index]
        whole = stream.model.module.get_submodule(path)
        for writer in writers_of(whole, calls[0]):
            if writer.path != without:
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


class Patches:
    """Patches of runs of blocks, fitted to what the whole network has around them."""

    def __init__(
        self, model: Model, batches: Sequence[dict[str, Tensor]], strength: float = 0.01
    ) -> None:
        self._strength, self._known = strength, dict[tuple[int, int], Way]()
        self._batches, self._states = batches, [Passed() for _ in batches]
        if batches:
            detours = Detours(model, {n: x[:1] for n, x in batches[0].items()})
            for batch, passed in zip(batches, self._states, strict=True):
                detours.run(batch, {}, passed)

    def __call__(self, first: int, last: int) -> Way:
        if (first, last) not in self._known:
            self._known[first, last] = self._fit(first, last)
        return self._known[first, last]

    def _fit(self, first: int, last: int) -> Way:
        pairs = [(p.entered[first], p.left[last]) for p in self._states]
        if not pairs or pairs[0][1].ndim != 3:
            return None
        masks = [batch.get("attention_mask") for batch in self._batches]
        rows = [tuple(unpadded(h, m) for h in pair) for pair, m in zip(pairs, masks, strict=True)]
        fit = _mapped(rows, self._strength)
        return None if fit is None else Patch(fit.weight, fit.bias, "before")


def fit_patch(
    stream: Stream, inputs: list[Tensor], outputs: list[Tensor], strength: float
) -> Fit | None:
    """The patch from inputs to outputs, one a batch; None where it does not help."""
    return _mapped(
        [(stream.rows(n, x), stream.rows(n, y))
         for n, (x, y) in enumerate(zip(inputs, outputs, strict=True))], strength,
    )  # fmt: skip


def _mapped(rows: Sequence[tuple[Tensor, ...]], strength: float) -> Fit | None:
    return fit_map([(x, y, x) for x, y in rows], torch.eye(rows[0][0].shape[1]), strength)


def _nothing(_: nn.Module, args: object, output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _enough(count: int, able: int, blocks: int) -> None:
    if count > (most := min(able, blocks - 1)):  # one stays whole
        raise InputError("too many blocks to cut", got=count, allowed=f"at most {most}")
