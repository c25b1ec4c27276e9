"""Which layers of a unit a step looks at."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from penjing.calibrate import Unit
from penjing.model import Model

__all__ = ["LEARNED", "canonical", "matches", "matrix_layers", "selected"]

# The criterion that takes away what the step before has learned to leave out (`steps.constrain`).
LEARNED = "learned"


def matches(path: str, targets: tuple[str, ...]) -> bool:
    """Whether a path is one of the globs; every path without globs."""
    return not targets or any(fnmatchcase(path, t) for t in targets)


def selected(unit: Unit, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """Layers of `unit` whose path matches one of the globs; all of them without globs."""
    return {n: m for n, m in unit.layers.items() if matches(n, targets)}


def matrix_layers(unit: Unit, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """Linear layers and convolutions; without globs only those inside the blocks.

    The layers outside the blocks (stem, head) are few and sensitive. A network without blocks
    has nothing else, so there they count.
    """
    inside = unit.index is not None or not unit.model.blocks
    chosen = selected(unit, targets) if targets or inside else {}
    return {n: m for n, m in chosen.items() if not isinstance(m, nn.Embedding)}


def canonical(model: Model, path: str) -> str:
    """The first name of a parameter, which a tied one is stored under."""
    holder, _, name = path.rpartition(".")
    parameter = getattr(model.module.get_submodule(holder), name)
    return next((n for n, p in model.parameters() if p is parameter), path)
