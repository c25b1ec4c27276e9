import numpy as np
import pytest
from scipy import stats

from penjing.errors import InputError, UsageError
from penjing.statistics import paired_bootstrap


def mean(rows: np.ndarray) -> float:
    return float(rows[:, 0].mean())


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    truth, hits = 0.05, 0
    for seed in range(200):
        before = rng.normal(1.0, 0.3, (100, 1))
        after = before - truth + rng.normal(0, 0.2, (100, 1))
        _, low, high = paired_bootstrap(
            before, after, mean, relative=False, higher_is_better=True, resamples=400, seed=seed
        )
        hits += low <= truth <= high
    assert 180 <= hits <= 198


@pytest.mark.parametrize("relative", [False, True])
def test_against_scipy(relative: bool) -> None:
    rng = np.random.default_rng(1)
    before = rng.gamma(2.0, 1.0, (200, 1))
    after = before * rng.uniform(0.9, 1.5, (200, 1))
    value, low, high = paired_bootstrap(
        before, after, mean, relative=relative, higher_is_better=False, resamples=5000, seed=0
    )

    def drop(b: np.ndarray, a: np.ndarray, axis: int) -> np.ndarray:
        change = a.mean(axis) - b.mean(axis)
        return change / b.mean(axis) if relative else change

    other = stats.bootstrap(
        (before[:, 0], after[:, 0]),
        drop,
        paired=True,
        method="percentile",
        vectorized=True,
        n_resamples=5000,
        random_state=np.random.default_rng(5),
    ).confidence_interval
    assert value == pytest.approx(drop(before[:, 0], after[:, 0], 0))
    width = other.high - other.low
    assert abs(low - other.low) < 0.05 * width
    assert abs(high - other.high) < 0.05 * width


def test_pairs_cancel_and_positive_is_worse() -> None:
    before = np.random.default_rng(0).normal(0, 100, (50, 1))
    worse = paired_bootstrap(before, before - 1, mean, relative=False, higher_is_better=True)
    np.testing.assert_allclose(worse, 1.0)
    better = paired_bootstrap(before, before - 1, mean, relative=False, higher_is_better=False)
    np.testing.assert_allclose(better, -1.0)


def test_seed() -> None:
    rows = np.random.default_rng(0).random((2, 40, 1))
    runs = [
        paired_bootstrap(rows[0], rows[1], mean, relative=False, higher_is_better=True, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_refusals() -> None:
    rows = np.zeros((3, 1))
    with pytest.raises(InputError, match="got 3 and 2 samples"):
        paired_bootstrap(rows, rows[:2], mean, relative=False, higher_is_better=True)
    with pytest.raises(InputError, match="metric of zero"):
        paired_bootstrap(rows, rows, mean, relative=True, higher_is_better=True)
    with pytest.raises(UsageError, match="confidence"):
        paired_bootstrap(rows, rows, mean, relative=False, higher_is_better=True, confidence=95)
