"""Taylor: score = |w| * mean over samples of |g|, g the slope of a sample's loss by w.

To first order, how far the loss moves when w is set to zero (Molchanov et al., CVPR 2019,
arXiv 1906.10771; of language models: LLM-Pruner, Ma et al., arXiv 2305.11627)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from penjing.criteria._gradient import gradient_of

__all__ = ["absolute", "needs", "score"]

absolute = True
needs = frozenset({"gradient"})


def score(weight: Tensor, stats: Any = None) -> Tensor:
    """|weight| * size, [out, in]; larger means keep.

    Args:
        weight: [out, in].
        stats: its `gradient` (`penjing.layerstats.Gradient`).

    Raises:
        InputError: there is none.
    """
    size: Tensor = gradient_of(stats, "taylor").size
    return weight.detach().abs() * size.to(weight)
