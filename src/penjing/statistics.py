"""Paired bootstrap: the interval of a drop in quality, by resampling samples of both at once.

Each resample draws n samples with replacement, the same ones before and after, and computes

    drop = sign * (reduce(after) - reduce(before)) / (|reduce(before)| if relative else 1)

with sign = -1 where higher is better: positive is worse. The interval is the percentile one
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from penjing.errors import InputError, UsageError

__all__ = ["paired_bootstrap"]


def paired_bootstrap(
    before_rows: np.ndarray,
    after_rows: np.ndarray,
    reduce: Callable[[np.ndarray], float],
    *,
    relative: bool,
    higher_is_better: bool,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """The drop from before to after, and the low and high end of its interval.

    Args:
        before_rows: [n, m], one row a sample.
        after_rows: [n, m], the same samples.
        reduce: rows to the metric; called with resampled rows of the same shape.
        relative: divide by the metric of `before_rows`.
        higher_is_better: of the metric.
        confidence: between 0 and 1.
        resamples: number of resamples.
        seed: the same seed gives the same interval.

    Raises:
        InputError: rows that are not of the same samples, or a relative drop from zero.
        UsageError: confidence outside (0, 1), or no resamples.
    """
    if not 0 < confidence < 1 or resamples < 1:
        raise UsageError(
            "confidence and resamples",
            got=f"{confidence} and {resamples}",
            allowed="between 0 and 1; 1 or more",
        )
    if len(before_rows) != len(after_rows) or not len(before_rows):
        raise InputError(
            "before and after were evaluated on different samples",
            got=f"{len(before_rows)} and {len(after_rows)} samples",
            next="evaluate both on the same data",
        )
    sign = -1.0 if higher_is_better else 1.0

    def drop(before: float, after: float) -> float:
        # A bitwise equal pair has no drop, also where both are infinite or zero.
        if before == after:
            return 0.0
        return sign * (after - before) / (abs(before) if relative else 1.0)

    original = float(reduce(before_rows))
    if relative and original == 0:
        raise InputError(
            "a relative drop from a metric of zero", next="check the data of the evaluation"
        )
    value = drop(original, float(reduce(after_rows)))
    rng = np.random.default_rng(seed)
    n = len(before_rows)
    drops = np.empty(resamples)
    for i in range(resamples):
        chosen = rng.integers(0, n, n)
        before = float(reduce(before_rows[chosen]))
        after = float(reduce(after_rows[chosen]))
        drops[i] = np.nan if relative and before == 0 else drop(before, after)
    drops = drops[~np.isnan(drops)]
    if not len(drops):
        raise InputError("the metric is zero in every resample", got=f"{n} samples")
    tail = (1 - confidence) / 2
    low, high = np.quantile(drops, [tail, 1 - tail])
    return value, float(low), float(high)
