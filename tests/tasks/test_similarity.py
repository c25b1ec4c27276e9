import numpy as np
import pytest
from scipy.spatial.distance import cosine
from scipy.stats import spearmanr

from penjing.data import Dataset
from penjing.tasks.similarity import task


def test_against_scipy_with_ties() -> None:
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(80, 5)).astype(np.float32)
    scores = rng.integers(0, 4, 40).astype(float)
    cosines = [1 - cosine(a, b) for a, b in zip(outputs[::2], outputs[1::2], strict=True)]
    # An odd batch size: a pair may be parted between two batches.
    records = np.concatenate([task.record(part, {}, None) for part in np.array_split(outputs, 3)])
    rows = task.rows(records, Dataset("pairs", (("a", "b"),) * 40, scores))
    assert task.reduce(rows) == pytest.approx(spearmanr(cosines, scores).statistic)
    chosen = rng.integers(0, 40, 40)
    expected = spearmanr(np.array(cosines)[chosen], scores[chosen]).statistic
    assert task.reduce(rows[chosen]) == pytest.approx(expected)


def test_constant_cosines_rank_nothing() -> None:
    dataset = Dataset("pairs", (("a", "b"),) * 2, np.array([0.1, 0.9]))
    assert task.reduce(task.rows(np.ones((4, 3)), dataset)) == 0.0
