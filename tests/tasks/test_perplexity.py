import math

import numpy as np
import pytest
import torch

from penjing.data import Dataset
from penjing.tasks.perplexity import task

DATASET = Dataset("text", ("a", "b"))


def test_by_hand() -> None:
    probabilities = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]])
    logits = np.log(np.stack([probabilities, probabilities])).astype(np.float32) + 7
    batch = {
        "input_ids": torch.tensor([[0, 1, 2], [2, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    rows = task.rows(task.record(logits, batch, None), DATASET)
    # First text: p(1) = 0.25 and p(2) = 0.8; second: p(0) = 0.5, and the padding counts nothing.
    np.testing.assert_allclose(rows, [[-math.log(0.25 * 0.8), 2], [-math.log(0.5), 1]], rtol=1e-6)
    assert task.reduce(rows) == pytest.approx((0.25 * 0.8 * 0.5) ** (-1 / 3))


def test_equal_logits_give_the_size_of_the_vocabulary() -> None:
    batch = {"input_ids": torch.zeros(2, 9, dtype=torch.int64)}
    rows = task.record(np.zeros((2, 9, 37), np.float32), batch, None)
    assert task.reduce(rows) == pytest.approx(37)


def test_a_hopeless_model_is_infinite() -> None:
    assert task.reduce(np.array([[1e6, 10.0]])) == math.inf
