"""Magnitude: score = |w|; no data needed (Han et al., arXiv 1506.02626)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

__all__ = ["needs", "score"]

needs: frozenset[str] = frozenset()


def score(weight: Tensor, stats: Any = None) -> Tensor:
    """|weight|, [out, in]; larger means keep. `stats` is not used."""
    return weight.detach().abs()
