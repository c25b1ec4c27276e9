"""Cut: whole blocks or halves of them go away, and what is left makes up for them.

Which of them: see `_depth`. What stands in for them: see `_mend`. Halves: see `_halves`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from penjing.calibrate import LayerStats, Stream, Unit
from penjing.errors import InputError, UsageError
from penjing.meter import metered, sized_batch
from penjing.model import Model
from penjing.recipe import Edit
from penjing.steps._depth import Budget, angles, evolution, greedy, influence, ranked
from penjing.steps._halves import Half, halves_of
from penjing.steps._mend import PATCHES, Mending, Patches, fit_patch
from penjing.steps._select import LEARNED
from penjing.steps._trials import PARTS, Piece, Trials, blocks_of, judges, stages

__all__ = ["CRITERIA", "OF", "PARTS", "PATCHES", "Cut", "fit_patch", "influence"]

CRITERIA = ("influence", "angular", "greedy", "evolution", "random")
OF = ("parameters", "macs")
# Blocks and halves compete.
_ANY = "any"
# Criteria of pieces of several sizes.
_MIXED = ("influence", "greedy", "random")


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
        part: of a block that goes: `block` for all of it, `attention`, `mlp`; or `any`, whatever
            harms least for what it saves, until as much is gone as so many blocks have.
        of: what is counted with `any`: `parameters`, or `macs` of a text of 128 tokens.
        patch: `linear`, `low-rank` (an eighth of the width), `fused` or `merged`, which cost
            nothing at run time, or `none`; of whole blocks.
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
    of: str = "parameters"
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
        for name, value, allowed in (
            ("part", self.part, (*PARTS, _ANY)), ("of", self.of, OF),
            ("criterion", self.criterion, (*CRITERIA, LEARNED)), ("patch", self.patch, PATCHES),
        ):  # fmt: skip
            if value not in allowed:
                raise UsageError(f"unknown {name}", got=value, allowed=", ".join(allowed))
        if self.part == _ANY and self.blocks:
            raise UsageError("blocks by name with part any", allowed=f"part {', '.join(PARTS)}")
        able = _MIXED if self.part == _ANY else tuple(c for c in CRITERIA if c != "angular")
        if self.part != "block" and self.criterion not in able:
            raise UsageError(
                f"criterion {self.criterion} of part {self.part}", allowed=", ".join(able)
            )
        if self.part in ("attention", "mlp") and self.patch not in (Cut.patch, "none"):
            raise UsageError(
                f"a patch of part {self.part}", got=self.patch, allowed="none",
                next="patches stand in for whole blocks: use refit",
            )  # fmt: skip

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """Patches and weights first, in the old numbering, then drops, the last first."""
        if not unit.batches:
            raise UsageError("cut needs data", next="give --data")
        blocks = unit.model.blocks
        if len(blocks) < 2:
            raise InputError("no repeated blocks to cut", got=len(blocks), allowed="2 or more")
        halves = self._halves(unit.model, unit) if self.part != "block" else {}
        why = self._named(unit.model, halves) or self._chosen(unit, halves)
        mending = Mending(self.patch, self.refit, self.strength)
        yield from mending.edits(Stream(unit.model, unit.batches), why, halves)
        for piece in sorted(why, reverse=True):
            if piece.part == "block":
                yield Edit("drop", blocks[piece.block], None, why[piece])
                continue
            for path, left in halves[piece].parts:
                yield Edit("drop", f"{blocks[piece.block]}.{path}", left, why[piece])

    def _halves(self, model: Model, unit: Unit) -> dict[Piece, Half]:
        """Halves that may go."""
        wanted = PARTS[1:] if self.part == _ANY else (self.part,)
        stream = Stream(model, [{n: x[:1] for n, x in unit.batches[0].items()}])
        found = {
            Piece(index, part): half
            for index, block, calls, _ in stream.walk()
            for part, half in halves_of(block, calls[0]).items() if part in wanted
        }  # fmt: skip
        if not found:
            raise InputError(
                f"no {' or '.join(wanted)} found in the blocks",
                allowed="a part that ends in one linear layer whose output is added to its input",
                next="cut whole blocks",
            )
        return found

    def _named(self, model: Model, halves: Mapping[Piece, Half]) -> dict[Piece, str]:
        """Pieces that are named or learned, and why."""
        blocks = model.blocks
        if self.blocks:
            if unknown := sorted(set(self.blocks) - set(blocks)):
                raise InputError("no such block", got=unknown[0], allowed=", ".join(blocks))
            gone = [Piece(i, self.part) for i, path in enumerate(blocks) if path in self.blocks]
            if self.part != "block" and (bare := [p for p in gone if p not in halves]):
                raise InputError(f"no {self.part} to cut", got=blocks[bare[0].block])
            if len(blocks_of(gone)) == len(blocks):
                raise InputError("all blocks are to be cut", allowed="leave at least one")
            return dict.fromkeys(gone, "asked for by name")
        if self.criterion != LEARNED:
            return {}
        gone = [Piece(i) for i, b in enumerate(blocks) if not model.kept.get(b, True)]
        if not gone:
            raise UsageError("no block was learned to go", next="put constrain before cut")
        return dict.fromkeys(gone, "learned in training")

    def _chosen(self, unit: Unit, halves: Mapping[Piece, Half]) -> dict[Piece, str]:
        """Pieces that go by the criterion, and why."""
        model = unit.model
        ends = {p: f"{model.blocks[p.block]}.{half.writer.path}" for p, half in halves.items()}
        if self.criterion in ("greedy", "evolution"):
            patched = self.patch not in ("merged", "none") and self.part in ("block", _ANY)
            held = max(1, len(unit.batches) // 4) if len(unit.batches) > 1 else 0
            fitted = unit.batches[: len(unit.batches) - held] if patched else ()
            patches = Patches(model, fitted, self.strength)
            trials = Trials(model, judges(model, unit.batches), patches, ends=ends)
            budget = self._budget(model, trials.able, halves)
            if self.criterion == "greedy":
                return greedy(trials, budget)
            return evolution(trials, budget, self.rounds, self.seed)
        if self.criterion == "angular":
            return self._run(unit)
        scores = influence(Stream(model, unit.batches), ends)
        budget = self._budget(model, [p for p in scores if p.part == "block"], halves)
        order: dict[Piece, float] = scores
        if self.criterion == "random":
            generator = torch.Generator().manual_seed(self.seed)
            drawn = torch.randperm(len(budget.costs), generator=generator).tolist()
            # Of several sizes each is as likely to be next.
            order = {p: n * budget.costs[p] for p, n in zip(budget.costs, drawn, strict=True)}
        gone = ranked(order, budget)
        return {p: f"block influence {scores[p]:.3f}, by {self.criterion}" for p in gone}

    def _run(self, unit: Unit) -> dict[Piece, str]:
        """Neighbours, by the angle over all of them."""
        every = stages(unit.model.blocks)
        budget = self._budget(unit.model, [Piece(i) for stage in every for i in stage], {})
        count = round(budget.amount)
        found = {
            score: [Piece(i) for i in range(first, first + count)]
            for first, score in angles(Stream(unit.model, unit.batches), count).items()
        }
        found = {score: pieces for score, pieces in found.items() if budget.fits(pieces)}
        if not found:
            raise InputError(
                "no run of blocks keeps its shape", got=f"{count} blocks",
                next="use the criterion influence, or cut fewer",
            )  # fmt: skip
        why = f"of a run of {count} at an angle of {min(found):.3f} pi"
        return dict.fromkeys(found[min(found)], why)

    def _budget(self, model: Model, able: list[Piece], halves: Mapping[Piece, Half]) -> Budget:
        """How much is to go: blocks, or with `any` as much as so many of them have.

        Args:
            able: blocks that keep the shape of the hidden state.
        """
        count = len(model.blocks)
        if self.part != _ANY:
            costs = dict.fromkeys(able if self.part == "block" else halves, 1.0)
            gone = self.layers or max(1, round((self.ratio or 0) * count))
            budget = Budget(costs, gone, stages(model.blocks))
            if gone > (most := round(budget.most)):
                raise InputError("too many blocks to cut", got=gone, allowed=f"at most {most}")
            return budget
        sizes = _sizes(model, self.of)
        whole = [sizes(path) for path in model.blocks]
        costs = {p: whole[p.block] for p in able}
        for piece, half in halves.items():
            path = model.blocks[piece.block]
            costs[piece] = sum(sizes(f"{path}.{part}") for part, _ in half.parts)
        amount = (self.ratio or (self.layers or 0) / count) * sum(whole)
        budget = Budget({p: c for p, c in costs.items() if c}, amount, stages(model.blocks))
        if amount > budget.most:
            raise InputError(
                "too many blocks to cut", got=f"{amount / sum(whole):.0%} of their {self.of}",
                allowed=f"at most {budget.most / sum(whole):.0%}",
            )  # fmt: skip
        return budget


def _sizes(model: Model, of: str) -> Callable[[str], float]:
    """Of what stands at a path, its parameters or its multiply-adds."""
    if of == "parameters":
        return lambda path: sum(p.numel() for p in model.module.get_submodule(path).parameters())
    macs = metered(model, sized_batch(model, batch=1)).macs
    return lambda path: float(
        sum(count for name, count in macs.items() if f"{name}.".startswith(f"{path}."))
    )
