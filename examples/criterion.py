"""Relative importance: a weight's share of its row and of its column, times its input's size.

    score = (|w| / sum of its row + |w| / sum of its column) * sqrt(norm of its input)

(Zhang et al., Plug-and-Play, ICLR 2024)

    penjing prune ./my-model --sparsity 0.5 --criterion examples/criterion.py:score \\
        --data calibration.jsonl -o ./pruned
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def score(weight: Tensor, stats: Any = None) -> Tensor:
    """[out, in], larger means keep."""
    size = weight.detach().abs()
    share = size / size.sum(1, keepdim=True).clamp_min(1e-12)
    share = share + size / size.sum(0, keepdim=True).clamp_min(1e-12)  # [out, in]
    norm = getattr(stats, "norm", None)
    return share if norm is None else share * norm.to(share.dtype).sqrt()
