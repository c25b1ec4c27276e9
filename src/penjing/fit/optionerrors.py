"""Errors of options: what a survey is."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Depth", "Survey"]


@dataclass
class Depth:
    """A set of cut blocks, measured whole."""

    cut: list[int]
    error: float
    drop: float


@dataclass
class Survey:
    """Errors of options.

    Attributes:
        cuts: error of cutting one block, with its patch, by block.
        widths: error of halving a block's hidden units, by block; absent where it cannot.
        heads: error of halving a block's heads, by block; absent where it cannot.
        formats: error of one block in a format, by format name and block.
        tables: error of the embedding tables, by table format.
        rest: error of the layers outside the blocks, by format.
        ladder: greedy sets of cut blocks, by depth.
        evaluations: networks run.
        seconds: time it took, in all runs together.
        complete: whether every unit was measured.
        fresh: networks run this time; 0 where an earlier survey served.
        batches: of search data that errors were measured on.
    """

    cuts: dict[str, float] = field(default_factory=dict)
    widths: dict[str, float] = field(default_factory=dict)
    heads: dict[str, float] = field(default_factory=dict)
    formats: dict[str, dict[str, float]] = field(default_factory=dict)
    tables: dict[str, float] = field(default_factory=dict)
    rest: dict[str, float] = field(default_factory=dict)
    ladder: list[Depth] = field(default_factory=list)
    evaluations: int = 0
    seconds: float = 0.0
    complete: bool = False
    fresh: int = 0
    batches: int = 0

    def add(self, other: Survey) -> None:
        """Take over the errors of other units."""
        for mine, its in ((self.cuts, other.cuts), (self.widths, other.widths),
                          (self.heads, other.heads), (self.tables, other.tables)):  # fmt: skip
            mine.update(its)
        for name, errors in other.formats.items():
            self.formats.setdefault(name, {}).update(errors)
        for name, error in other.rest.items():
            self.rest[name] = self.rest.get(name, 0.0) + error
        self.evaluations += other.evaluations
