import numpy as np
import pytest
from scipy.spatial.distance import cdist

from penjing.data import Dataset
from penjing.tasks import retrieval
from penjing.tasks.retrieval import task


def test_against_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(150, 6)).astype(np.float32)
    labels = rng.integers(0, 3, 150)
    distances = cdist(vectors, vectors, "cosine")
    np.fill_diagonal(distances, np.inf)
    expected = labels[distances.argmin(axis=1)] == labels
    monkeypatch.setattr(retrieval, "BLOCK", 64)
    records = np.concatenate([task.record(part, {}, None) for part in np.split(vectors, 3)])
    rows = task.rows(records, Dataset("arrays", tuple(vectors), labels))
    np.testing.assert_array_equal(rows[:, 0], expected)
    assert task.reduce(rows) == pytest.approx(expected.mean())
    assert 0 < expected.mean() < 1


def test_blocks_change_nothing() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(1500, 4))
    labels = rng.integers(0, 2, 1500)
    distances = cdist(vectors, vectors, "cosine")
    np.fill_diagonal(distances, np.inf)
    rows = task.rows(task.record(vectors, {}, None), Dataset("arrays", tuple(vectors), labels))
    # Near ties may fall either way between float32 and float64.
    assert (rows[:, 0] == (labels[distances.argmin(1)] == labels)).mean() > 0.998


def test_a_sample_is_not_its_own_neighbour() -> None:
    vectors = np.array([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 0.9]])
    dataset = Dataset("arrays", tuple(vectors), np.array([0, 1, 0, 1]))
    assert task.reduce(task.rows(task.record(vectors, {}, None), dataset)) == 0.0


def test_length_does_not_matter_and_zero_vectors_do_not_fail() -> None:
    vectors = np.array([[1.0, 0], [100, 1], [0, 1], [1, 100], [0, 0]])
    dataset = Dataset("arrays", tuple(vectors), np.array([0, 0, 1, 1, 2]))
    rows = task.rows(task.record(vectors, {}, None), dataset)
    assert rows[:, 0].tolist() == [1, 1, 1, 1, 0]
