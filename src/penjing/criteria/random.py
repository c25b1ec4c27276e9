"""Random scores: what every criterion must beat. Seed 0, always."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["needs", "score"]

needs: frozenset[str] = frozenset()


def score(weight: Tensor, stats: Any = None) -> Tensor:
    """Uniform numbers [out, in]; `stats` is not used."""
    return torch.rand(weight.shape, generator=torch.Generator().manual_seed(0))
