"""The search space: what can be done to each block, and the recipe of a choice.

A choice says which blocks go, how many hidden units and heads of the others stay, and in
which number format each part is stored and computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from penjing.graph import is_weighted
from penjing.model import Model
from penjing.processor import weight_bits
from penjing.recipe import Recipe
from penjing.steps.cut import Cut
from penjing.steps.fold import Fold, has_norms
from penjing.steps.quantize import Quantize
from penjing.steps.recover import Recover
from penjing.steps.shrink import Shrink

__all__ = ["FORMATS", "Choice", "Format", "formats_for", "outside_blocks", "recipe_of"]


@dataclass(frozen=True)
class Format:
    """A number format of linear layers and convolutions.

    Attributes:
        name: as reports show it.
        bits: stored bits of a weight, metadata left out; 32 is unquantized.
        options: of `Quantize`; None leaves the layer alone.
    """

    name: str
    bits: int
    options: tuple[tuple[str, Any], ...] | None

    def quantize(self, method: str, targets: tuple[str, ...]) -> Quantize | None:
        """The step for these layers."""
        if self.options is None:
            return None
        return Quantize(**dict(self.options), method=method, targets=targets)


FORMATS = {
    f.name: f
    for f in (
        Format("fp32", 32, None),
        Format("int8", 8, (("bits", weight_bits()), ("symmetric", True), ("activations", 8))),
        Format("w8", 8, (("bits", 8), ("group", 64))),
        Format("w4", 4, (("bits", 4), ("group", 64))),
    )
}

# Formats of embedding tables: bits and entries that share a scale.
TABLES = {"fp32": None, "e8": (8, 128), "e4": (4, 32)}


def formats_for(model: Model) -> tuple[str, ...]:
    """Formats that make sense for this kind of network, the plain one first.

    One token at a time is bound by memory, so decoders gain from few bits; encoders and
    convolutional networks are bound by arithmetic and gain from 8-bit activations.
    """
    return ("w8", "w4") if model.interface == "causal" else ("int8", "fp32")


@dataclass(frozen=True)
class Choice:
    """One point of the search space.

    Attributes:
        cut: numbers of the blocks that go, ascending.
        widths: of every block of the original, the kept fraction of its hidden units.
        formats: of every block of the original.
        table: format of the embedding tables.
        rest: format of the layers outside the blocks.
        heads: of every block of the original, the kept fraction of its heads; empty for all.
    """

    cut: tuple[int, ...]
    widths: tuple[float, ...]
    formats: tuple[str, ...]
    table: str
    rest: str
    heads: tuple[float, ...] = ()

    def size(self, index: int) -> tuple[float, float]:
        """Kept fractions of a block's hidden units and of its heads."""
        return self.widths[index], self.heads[index] if self.heads else 1.0

    def describe(self) -> str:
        """A few words for tables and plots."""
        kept = [i for i in range(len(self.widths)) if i not in self.cut]
        parts = [f"{len(kept)} of {len(self.widths)} blocks"] if self.widths else []
        used = sorted({self.formats[i] for i in kept} | {self.rest})
        parts.append("/".join(used))
        if narrow := sum(self.size(i) != (1.0, 1.0) for i in kept):
            parts.append(f"{narrow} narrowed")
        if self.table != "fp32":
            parts.append(f"embeddings {self.table[1:]} bits")
        return ", ".join(parts)


def recipe_of(
    model: Model, choice: Choice, *, method: str = "gptq", recover: float = 0.0, seed: int = 0
) -> tuple[Recipe, Recipe]:
    """Two recipes in the safe order: structure and recovery, then numbers.

    Args:
        model: the original.
        choice: what to do.
        method: quantizer of weights.
        recover: seconds of distillation, 0 for none.
    """
    structural: list[Any] = []
    if choice.cut:
        structural.append(Cut(blocks=tuple(model.blocks[i] for i in choice.cut)))
    kept = [i for i in range(len(model.blocks)) if i not in choice.cut]
    paths = dict(zip(kept, _renumbered(model.blocks, choice.cut), strict=True))
    for width, heads in sorted({choice.size(i) for i in kept} - {(1.0, 1.0)}):
        globs = tuple(f"{paths[i]}.*" for i in kept if choice.size(i) == (width, heads))
        structural.append(Shrink(ratio=1 - width, heads=1 - heads, targets=globs))
    if recover and structural:
        structural.append(Recover(seconds=recover))
    numbers: list[Any] = [Fold()] if has_norms(model) else []
    groups: dict[str, list[str]] = {}
    for i in kept:
        groups.setdefault(choice.formats[i], []).append(f"{paths[i]}.*")
    outside = tuple(outside_blocks(model))
    if outside:
        groups.setdefault(choice.rest, []).extend(outside)
    if (table := TABLES[choice.table]) is not None:
        bits, group = table
        numbers.append(Quantize(0, embeddings=bits, embedding_group=group, method="rtn"))
    for name, paths_in in groups.items():
        step = FORMATS[name].quantize(method, tuple(paths_in))
        if step is not None:
            numbers.append(step)
    return Recipe(tuple(structural), seed), Recipe(tuple(numbers), seed)


def outside_blocks(model: Model) -> list[str]:
    """Weighted layers outside the blocks, embeddings left out."""
    return [
        name
        for name, module in model.module.named_modules()
        if is_weighted(module)
        and not hasattr(module, "num_embeddings")
        and not any(name == b or name.startswith(f"{b}.") for b in model.blocks)
    ]


def _renumbered(blocks: tuple[str, ...], cut: tuple[int, ...]) -> list[str]:
    """Paths of the kept blocks after the cut ones are gone.

    Blocks numbered in their list move up; blocks with names of their own keep them.
    """
    gone = [blocks[i].rpartition(".")[::2] for i in cut]
    paths = []
    for number, path in enumerate(blocks):
        if number in cut:
            continue
        prefix, _, name = path.rpartition(".")
        if name.isdigit():
            below = sum(p == prefix and n.isdigit() and int(n) < int(name) for p, n in gone)
            path = f"{prefix}.{int(name) - below}" if prefix else str(int(name) - below)
        paths.append(path)
    return paths
