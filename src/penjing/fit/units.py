"""The options of one unit, measured: a block, or what stands before or after the blocks.

What comes of a unit depends on the network, the data and the unit alone, so that units can be
measured anywhere and in any order.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from penjing import processor
from penjing.apply import apply
from penjing.calibrate import Stream, Unit, units_of
from penjing.divergence import divergence
from penjing.fit.optionerrors import Survey
from penjing.fit.space import FORMATS, TABLES
from penjing.fit.variant import Suffixes, variant
from penjing.load import load
from penjing.model import Batch, Model
from penjing.recipe import Edit, Patch, Recipe
from penjing.steps.cut import fit_patch
from penjing.steps.fold import Fold, has_norms
from penjing.steps.quantize import Quantize
from penjing.steps.shrink import Shrink
from penjing.workers import Parcel, Work

__all__ = ["HEADS", "WIDTHS", "Shipped", "Units", "fast", "quantized"]

# Kept fractions of hidden units and of heads; half is measured, the others follow its curve.
WIDTHS = (1.0, 0.75, 0.5, 0.25)
HEADS = (1.0, 0.5)
_MEASURED = 0.5
# Networks with more blocks than this are measured at their lowest bits only, with all heads.
_DEEP = 12


@contextlib.contextmanager
def fast(model: Model) -> Iterator[None]:
    # Without its cache: it would keep the weights of every variant until the survey ends.
    with torch.no_grad(), processor.autocast(model.device.type, cache=False):
        yield


def quantized(formats: Sequence[str]) -> dict[str, Quantize]:
    """Of formats in fewer bits, the step that makes them."""
    steps = ((name, FORMATS[name].quantize("rtn", ())) for name in formats)
    return {name: step for name, step in steps if step is not None}


class Units:
    """Measures units.

    Args:
        model: the original.
        calibration: batches that edits are fitted to.
        search: batches that errors are measured on.
        formats: names of `FORMATS` to try.
        reference: the original's outputs on `search`, one a batch.
    """

    def __init__(
        self, model: Model, calibration: Sequence[Batch], search: Sequence[Batch],
        formats: Sequence[str], reference: Sequence[Tensor],
    ) -> None:  # fmt: skip
        self._calibration, self._search, self._reference = calibration, search, reference
        self._interface, self._formats = model.interface, formats
        with fast(model):
            # Numbers are tried on what will be quantized.
            self._base = apply(model, Recipe((Fold(),))).model if has_norms(model) else model
            self._begin()

    def _begin(self) -> None:
        self._suffixes = Suffixes(self._base, self._search)
        self._stream = Stream(self._base, self._calibration)
        self._units = list(units_of(self._base, self._stream))
        self._last = 0

    def measure(self, piece: tuple[int, float]) -> Survey | None:
        """Errors of a unit.

        Args:
            piece: its number, from 0, which is before the blocks; and the seconds that are left.

        Returns:
            None where the time is over: what stands outside the blocks is measured in any case.
        """
        number, seconds = piece
        until = time.monotonic() + seconds
        # A module that was run refers to itself: copies stay until a collection.
        gc.collect()
        with fast(self._base):
            if number < self._last:  # hidden states only go forward
                self._begin()
            self._last = number
            unit, found = self._units[number], Survey()
            if seconds >= 0:
                self._suffixes.enter(unit)
            if unit.index is None:
                self._outside(unit, found)
            elif time.monotonic() > until:
                return None
            else:
                self._block(unit, found)
        return found

    def _error(self, edits: Sequence[Edit], found: Survey) -> float:
        found.evaluations += 1
        outputs = self._suffixes.outputs(variant(self._base, edits), edits)
        return divergence(self._interface, self._search, self._reference, outputs)

    def _outside(self, unit: Unit, found: Survey) -> None:
        stats = self._stream.collect(unit, frozenset({"range"})) if unit.layers else {}
        for name, step in quantized(self._formats).items():
            edits = list(step.plan(unit, stats))
            edits = [e for e in edits if e.path in stats or e.kind != "activation"]
            if edits:
                found.rest[name] = self._error(edits, found)
        for name, table in TABLES.items():
            if table is not None and unit.name == "front":
                bits, group = table
                step = Quantize(0, embeddings=bits, embedding_group=group, method="rtn")
                if edits := list(step.plan(unit, {})):
                    found.tables[name] = self._error(edits, found)

    def _block(self, unit: Unit, found: Survey) -> None:
        steps, key, blocks = quantized(self._formats), str(unit.index), self._base.blocks
        lowest = min(steps, key=lambda name: FORMATS[name].bits)
        least = FORMATS[lowest].bits
        self._stream.enter(unit.index or 0)
        stats = self._stream.collect(unit, frozenset({"gram", "range"}))
        for name, step in steps.items():
            if len(blocks) > _DEEP and FORMATS[name].bits > least:
                continue
            found.formats[name] = {key: self._error(list(step.plan(unit, stats)), found)}
        for name in steps:
            # Squared rounding error falls by four with every bit.
            known = found.formats[lowest][key] * 4.0 ** (least - FORMATS[name].bits)
            found.formats.setdefault(name, {}).setdefault(key, known)
        if edits := list(Shrink(1 - _MEASURED, heads=0.0).plan(unit, stats)):
            found.widths[key] = self._error(edits, found)
        if len(blocks) <= _DEEP and (
            edits := list(Shrink(0.0, heads=1 - _MEASURED).plan(unit, stats))
        ):
            found.heads[key] = self._error(edits, found)
        if len(blocks) > 1 and (cut := _cut_one(self._stream, unit)) is not None:
            found.cuts[key] = self._error(cut, found)


@dataclass(frozen=True)
class Shipped:
    """How a worker gets ready to measure units.

    Attributes:
        parcel: an artifact, the original.
        calibration, search, formats: as `Units` takes them.
    """

    parcel: Parcel
    calibration: tuple[Batch, ...]
    search: tuple[Batch, ...]
    formats: tuple[str, ...]

    def __call__(self, folder: Path) -> Work:
        """What measures a unit."""
        model = load(self.parcel.open(folder))
        with fast(model):
            reference = [model.run(batch) for batch in self.search]
        return Units(model, self.calibration, self.search, self.formats, reference).measure


def _cut_one(stream: Stream, unit: Unit) -> list[Edit] | None:
    """Patch and drop of one block; None where it changes the shape of the hidden state."""
    index, blocks = unit.index or 0, unit.model.blocks
    block = unit.model.module.get_submodule(unit.name)
    inputs = [call.hidden for call in stream.calls()]
    outputs = list(stream.run(block))
    if inputs[0].shape != outputs[0].shape:
        return None
    edits = []
    fit = fit_patch(stream, inputs, outputs, 0.01) if inputs[0].ndim == 3 else None
    if fit is not None:
        last = index + 1 == len(blocks)
        near = blocks[index - 1] if last else blocks[index + 1]
        patch = Patch(fit.weight, fit.bias, "after" if last else "before")
        edits.append(Edit("patch", near, patch, "survey"))
    return [*edits, Edit("drop", unit.name, None, "survey")]
