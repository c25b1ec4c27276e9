"""Shrink: whole neurons go away, physically: hidden units of an MLP, heads or key-value groups.

Units are found by running the block (`penjing.graph`). The consumer's weights are refitted by
least squares on the calibration data, and every edit is proved: the block with the removed
columns masked to zero gives the same output as the small one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from penjing.calibrate import LayerStats, Unit
from penjing.edits import slice_module
from penjing.errors import UsageError
from penjing.graph import Group, coupled_groups
from penjing.linalg import ridge
from penjing.neurons import by_scores, greedy_obs
from penjing.recipe import Edit, Slice
from penjing.registry import lookup
from penjing.steps._select import matrix_layers

__all__ = ["Shrink"]

_PROOF = 1e-6


@dataclass(frozen=True)
class Shrink:
    """Remove neurons.

    Attributes:
        ratio: fraction of the units of every group that go, 0 to 1.
        heads: fraction of the heads or key-value groups that go; None means `ratio`.
        criterion: `gram` (greedy optimal brain surgeon) or a name of `penjing.criteria`.
        repair: refit the consumer by ridge least squares.
        multiple: kept hidden units are a multiple of this, which kernels want.
        targets: globs of consumer layer paths, e.g. `*.output.dense`.
    """

    name: ClassVar[str] = "shrink"
    scope: ClassVar[str] = "block"
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    ratio: float = 0.5
    heads: float | None = None
    criterion: str = "gram"
    repair: bool = True
    multiple: int = 8
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("ratio", self.ratio), ("heads", self.heads)):
            if value is not None and not 0 <= value < 1:
                raise UsageError(name, got=value, allowed=f"0 <= {name} < 1")
        if self.criterion != "gram":
            lookup("criteria", self.criterion, "score")
        if self.multiple < 1:
            raise UsageError("multiple", got=self.multiple, allowed="1 or more")

    def layers(self, unit: Unit) -> dict[str, nn.Module]:
        """The consumers that may lose inputs, by path."""
        return matrix_layers(unit, self.targets)

    def plan(self, unit: Unit, stats: dict[str, LayerStats]) -> Iterator[Edit]:
        """One slice and one refitted consumer for every group of the block."""
        if unit.stream is None:
            raise UsageError("shrink needs data", next="give --data")
        if unit.index is None:
            return
        block = unit.model.module.get_submodule(unit.name)
        for group in groups_of(unit):
            path = f"{unit.name}.{group.consumer}"
            if path not in self.layers(unit):
                continue
            keep = self._keep(group)
            # A layer that was never run has no Gram matrix to choose by.
            if keep == len(group.units) or stats[path].gram is None:
                continue
            kept, weight = self._choose(
                block.get_submodule(group.consumer), group, keep, stats[path]
            )
            slices = slices_of(block, group, kept)
            error = proof(block, unit, group, kept, slices)
            if error > _PROOF:
                continue
            what = "heads" if group.is_heads else "hidden units"
            yield Edit(
                "slice",
                path,
                tuple(Slice(f"{unit.name}.{s.path}", s.dim, s.kept) for s in slices),
                f"{len(group.units) - keep} of {len(group.units)} {what}, least important by "
                f"{self.criterion}; masked equals small within {error:.0e}",
                {"kept": float(keep), "of": float(len(group.units))},
            )
            if self.repair:
                yield Edit("weight", f"{path}.weight", weight, "refitted to the kept inputs")

    def _keep(self, group: Group) -> int:
        ratio = self.ratio if self.heads is None or not group.is_heads else self.heads
        if not ratio:  # rounding to `multiple` must not take any
            return len(group.units)
        keep = round(len(group.units) * (1 - ratio))
        if not group.is_heads and len(group.units) > self.multiple:
            keep = max(1, round(keep / self.multiple)) * self.multiple
        return min(max(1, keep), len(group.units))

    def _choose(
        self, consumer: nn.Module, group: Group, keep: int, stats: LayerStats
    ) -> tuple[list[int], Tensor]:
        weight: Tensor = consumer.weight.detach().float()  # type: ignore[operator]
        units = [list(u) for u in group.units]
        gram = stats.gram
        assert gram is not None
        if self.criterion == "gram":
            return greedy_obs(weight, gram, units, keep)
        scores = lookup("criteria", self.criterion, "score")(weight, stats)
        kept = by_scores(scores, units, keep)
        inputs = sorted(i for u in kept for i in units[u])
        # Least squares of the full output on the kept inputs: cross = H[kept, :] W^T.
        cross = gram[inputs] @ weight.double().T  # [kept, out]
        fitted = ridge(gram[inputs][:, inputs], cross, 0.01, weight[:, inputs].double().T)
        return kept, fitted.T.float()


def groups_of(unit: Unit) -> list[Group]:
    """Coupled groups of a block, found on one short sample of its input."""
    if unit.stream is None or unit.index is None:
        return []
    call = unit.stream.sample()
    if call.hidden.ndim != 3:  # convolutional blocks are left whole
        return []
    block = unit.model.module.get_submodule(unit.name)
    signature = tuple((n, tuple(p.shape)) for n, p in block.named_parameters())
    known: dict[object, list[Group]] = vars(unit.model).setdefault("_groups", {})
    if signature not in known:
        short = call.first(batch=1, length=4).double()
        known[signature] = coupled_groups(block, short.hidden, lambda b, h: short.run(b, h))
    return known[signature]


def slices_of(block: nn.Module, group: Group, kept: list[int]) -> list[Slice]:
    """Every parameter of the block that loses the neurons that are not kept."""
    columns = torch.tensor(sorted(i for u in kept for i in group.units[u]))
    slices = [Slice(f"{group.consumer}.weight", 1, columns)]
    for producer, units in group.producers.items():
        rows = torch.tensor(sorted(i for u in kept for i in units[u]))
        slices.append(Slice(f"{producer}.weight", 0, rows))
        if getattr(block.get_submodule(producer), "bias", None) is not None:
            slices.append(Slice(f"{producer}.bias", 0, rows))
    return slices


def proof(
    block: nn.Module, unit: Unit, group: Group, kept: list[int], slices: list[Slice]
) -> float:
    """Largest relative difference between the masked block and the small one, on real input."""
    masked, small = copy.deepcopy(block), copy.deepcopy(block)
    gone = [i for u in range(len(group.units)) if u not in set(kept) for i in group.units[u]]
    # Exact arithmetic, whatever precision the caller works in: this is a proof.
    with torch.no_grad(), torch.autocast(unit.model.device.type, enabled=False):
        masked.get_submodule(group.consumer).weight[:, gone] = 0  # type: ignore[operator]
        slice_module(small, [(s.path, s.dim, s.kept.tolist()) for s in slices])
        assert unit.stream is not None
        call = unit.stream.sample().double()
        masked, small = masked.double(), small.double()
        large = call.run(masked, call.hidden)
        try:
            difference = (call.run(small, call.hidden) - large).abs().max()
        except RuntimeError:  # shapes no longer fit: something else holds the width
            return float("inf")
    return float(difference / large.abs().max().clamp_min(1e-12))
