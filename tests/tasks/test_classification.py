import numpy as np
import pytest
import torch
from torch import nn

from penjing.data import Dataset
from penjing.errors import InputError
from penjing.model import Model, Source
from penjing.tasks.classification import task


def model(classes: int = 3) -> Model:
    source = Source("factory", "here", "0")
    return Model(nn.Linear(2, classes), "tensor", {"x": torch.zeros(2, 2)}, source)


def data(labels: list[int] | None) -> Dataset:
    array = None if labels is None else np.array(labels)
    return Dataset("arrays", ({"x": np.zeros(2)},) * 4, array, path="here.npz")


def test_by_hand() -> None:
    logits = np.array([[0.1, 2, 1], [3, 2, 1], [-3, -2, -1], [0, 1, 0]])
    rows = task.rows(task.record(logits, {}, None), data([1, 0, 0, 1]))
    assert rows.tolist() == [[1], [1], [0], [1]]
    assert task.reduce(rows) == 0.75


def test_labels_outside_the_classes_are_refused() -> None:
    task.check(data([0, 1, 2, 2]), model())
    with pytest.raises(
        InputError, match=r"label 3 on 2 samples, 3 samples in all; allowed: 0 to 2"
    ):
        task.check(data([0, 3, 9, 3]), model())
    with pytest.raises(InputError, match="label -1 on 1 samples"):
        task.check(data([0, -1, 2, 2]), model())
    with pytest.raises(InputError, match=r"here\.npz without class labels"):
        task.check(data(None), model())
    source = Source("factory", "here", "0")
    wide = Model(nn.Linear(2, 3), "tensor", {"x": torch.zeros(2, 2, 2)}, source)
    with pytest.raises(InputError, match="output of a classifier"):
        task.check(data([0, 1, 1, 1]), wide)
