"""Predict size, latency and error of a choice, and correct the prediction by what was measured.

    size     stored bytes of every part, in the format chosen for it, metadata counted
    latency  measured time of the whole network in each format, shared out over its parts by
             their multiplications, times the correction
    error    sum of the errors measured one by one; the ladder's own for the set of cut blocks

After a candidate was measured, its ratio of measured to predicted corrects the next ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from penjing.fit.space import FORMATS, TABLES, Choice, outside_blocks
from penjing.fit.survey import Depth, Survey
from penjing.graph import is_weighted
from penjing.model import Model
from penjing.steps.quantize import SMALL_TABLE

__all__ = ["Prediction", "Predictor", "stored"]


@dataclass(frozen=True)
class Prediction:
    """Of one choice: bytes, seconds, error of outputs and drop of the metric."""

    size: float
    latency: float
    error: float
    drop: float

    def gain(self, plain: Prediction) -> float:
        """Size and latency as fractions of the plain network's, added: less is better."""
        return self.size / plain.size + self.latency / plain.latency


def stored(weights: int, inputs: int, name: str) -> float:
    """Bytes of a layer's weights in a format: codes, float32 scales, integer zero points.

    Rows are filled up to whole groups.
    """
    form = FORMATS[name]
    if form.options is None:
        return 4.0 * weights
    options = dict(form.options)
    group = options.get("group") or inputs
    zero = 0.0 if options.get("symmetric") else form.bits / 8
    return _grouped(weights, inputs, form.bits, min(group, inputs), zero)


def _grouped(weights: int, inputs: int, bits: int, group: int, zero: float) -> float:
    groups = weights / inputs * math.ceil(inputs / group)
    return groups * (group * bits / 8 + 4 + zero)


@dataclass
class Predictor:
    """See the module.

    Args:
        model: the original.
        survey: errors.
        latencies: measured seconds of the whole network by format.
        slope: drop of the metric per unit of error.
        remains: share of the drop of a cut or a narrower block that distillation leaves.
        memory: peak bytes of a runtime's process with an empty file, and for each byte of it.
    """

    model: Model
    survey: Survey
    latencies: Mapping[str, float]
    slope: float
    remains: float = 1.0
    memory: tuple[float, float] = (0.0, 1.0)
    corrections: dict[str, float] = field(default_factory=lambda: {"size": 1.0, "latency": 1.0})

    def __post_init__(self) -> None:
        layers = {n: m for n, m in self.model.module.named_modules() if is_weighted(m)}
        weights = {n: cast(Tensor, m.weight) for n, m in layers.items()}
        shape = {n: (w.numel(), w[0].numel()) for n, w in weights.items()}
        shared = {id(p) for g in self.model.tied() for n, p in self.model.parameters() if n in g}
        is_table = {n: hasattr(m, "num_embeddings") for n, m in layers.items()}
        blocks = self.model.blocks
        self._blocks = [[shape[n] for n in layers if n.startswith(f"{b}.")] for b in blocks]
        inside = {n for n in layers if any(n.startswith(f"{b}.") for b in blocks)}
        tables = {id(weights[n]): shape[n] for n in layers if is_table[n] and n not in inside}
        self._tables = list(tables.values())
        outside = outside_blocks(self.model)
        # A head tied to the table computes but stores nothing of its own.
        self._rest = [shape[n] for n in outside if id(weights[n]) not in shared]
        self.tied = any(id(weights[n]) in shared for n in outside)
        weighted = sum(w for s in (*self._blocks, self._tables, self._rest) for w, _ in s)
        total = self.model.parameter_count
        self._plain = 4.0 * (total - weighted)
        computed = [sum(w for w, _ in b) for b in self._blocks]
        head = sum(shape[n][0] for n in outside)
        everything = max(1, sum(computed) + head)
        # A twentieth stands for what has no weights outside the blocks.
        self._share = [0.95 * c / everything for c in computed]
        self._share_rest = 0.95 * head / everything + 0.05

    @property
    def plain(self) -> Prediction:
        """The unedited network."""
        count = len(self.model.blocks)
        return self(Choice((), (1.0,) * count, ("fp32",) * count, "fp32", "fp32"))

    def block_size(self, index: int, width: float, name: str, heads: float = 1.0) -> float:
        """Bytes of one block."""
        return sum(stored(w, i, name) for w, i in self._blocks[index]) * _narrowed(width, heads)

    def table_size(self, name: str, rest: str = "fp32") -> float:
        """Bytes of the embedding tables; a float one that a head shares is in the head's format."""
        table = TABLES[name]
        if table is None:
            return sum(stored(w, i, rest if self.tied else "fp32") for w, i in self._tables)
        bits, group = table
        total = 0.0
        for w, i in self._tables:
            if w < SMALL_TABLE:
                total += 4.0 * w
            elif self.tied:  # a product reads whole groups
                total += _grouped(w, i, bits, min(group, i), bits / 8)
            else:
                total += w * bits / 8 + w / i * math.ceil(i / min(group, i)) * (4 + bits / 8)
        return total

    def block_latency(self, index: int, width: float, name: str, heads: float = 1.0) -> float:
        """Seconds of one block."""
        return self._share[index] * self.latencies[name] * _narrowed(width, heads)

    def rest_latency(self, name: str) -> float:
        """Seconds of everything outside the blocks."""
        return self._share_rest * self.latencies[name]

    def rest_size(self, name: str) -> float:
        """Bytes of the layers outside the blocks, and of norms and biases."""
        return sum(stored(w, i, name) for w, i in self._rest) + self._plain

    def block_error(
        self, index: int, width: float, name: str, heads: float = 1.0, remains: float = 1.0
    ) -> float:
        """Error of one block; that of a width grows with the square of what is removed.

        `remains` of the removed neurons' share is counted.
        """
        error, key = self.survey.formats.get(name, {}).get(str(index), 0.0), str(index)
        for kept, halved in ((width, self.survey.widths), (heads, self.survey.heads)):
            if kept < 1:
                error += remains * halved.get(key, math.inf) * ((1 - kept) / 0.5) ** 2
        return error

    def rest_error(self, name: str, table: str) -> float:
        """Error of the layers outside the blocks; a head on a quantized table adds none."""
        if self.tied and not self._rest and table != "fp32":
            return 0.0
        return self.survey.rest.get(name, 0.0)

    def drop_of(self, cut: tuple[int, ...]) -> float:
        """Drop of a set of cut blocks after distillation; a chance gain counts as nothing lost."""
        depth = self._depth(cut)
        return self.remains * max(0.0, depth.drop) if depth else 0.0

    def _depth(self, cut: tuple[int, ...]) -> Depth | None:
        return next((d for d in self.survey.ladder if tuple(d.cut) == cut), None)

    def __call__(self, choice: Choice) -> Prediction:
        """Size, latency, error and drop of a choice, corrected."""
        kept = [i for i in range(len(choice.widths)) if i not in choice.cut]
        parts = [(i, choice.widths[i], choice.formats[i], choice.size(i)[1]) for i in kept]
        size = self.table_size(choice.table, choice.rest) + self.rest_size(choice.rest)
        size += sum(self.block_size(*p) for p in parts)
        latency = self.rest_latency(choice.rest) + sum(self.block_latency(*p) for p in parts)
        error = self.survey.tables.get(choice.table, 0.0)
        error += self.rest_error(choice.rest, choice.table)
        left = error + sum(self.block_error(*p, remains=self.remains) for p in parts)
        error += sum(self.block_error(*p) for p in parts)
        depth = self._depth(choice.cut)
        drop = self.slope * left + self.drop_of(choice.cut)
        return Prediction(
            size * self.corrections["size"],
            latency * self.corrections["latency"],
            error + (depth.error if depth else 0.0),
            drop,
        )

    def size_within(self, memory: float) -> float:
        """Bytes of the largest file that runs in `memory` bytes; below 0 where none does."""
        return (memory - self.memory[0]) / self.memory[1]

    def correct(
        self, choice: Choice, size: float, latency: float, memory: float | None = None
    ) -> None:
        """Learn from a measured candidate: its bytes, seconds and peak memory."""
        if memory is not None:
            self.memory = (memory - self.memory[1] * size, self.memory[1])
        said = self(choice)
        self.corrections["size"] *= size / said.size
        self.corrections["latency"] *= latency / said.latency


def _narrowed(width: float, heads: float) -> float:
    """Share of a transformer block that is left: its MLP has two thirds of the weights."""
    return (2 * width + heads) / 3
