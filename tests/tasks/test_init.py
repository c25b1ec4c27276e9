"""find and default_task over every kind of model and data; the contract of every task."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from penjing.data import Dataset
from penjing.errors import InputError, UsageError
from penjing.model import Model, Source
from penjing.registry import choices, lookup
from penjing.tasks import Custom, default_task, find


def model(interface: Any, classes: int = 3) -> Model:
    name = "pixel_values" if interface == "image" else "x"
    source = Source("factory", "here", "0")
    return Model(nn.Linear(2, classes), interface, {name: torch.zeros(2, 2)}, source)


def data(kind: Any = "text", labels: list[float] | None = None) -> Dataset:
    samples = (("a", "b"),) * 4 if kind == "pairs" else ("a", "b", "c", "d")
    return Dataset(kind, samples, None if labels is None else np.array(labels), path="here")


@pytest.mark.parametrize(
    ("interface", "dataset", "expected"),
    [
        ("embedding", data(labels=[0, 1, 0, 1]), "retrieval"),
        ("embedding", data(labels=[0, 1, 2, 3]), "fidelity"),
        ("embedding", data(), "fidelity"),
        ("embedding", data("pairs", [0.1, 0.2, 0.3, 0.4]), "similarity"),
        ("embedding", data("pairs"), "fidelity"),
        ("image", data("images", [0, 1, 2, 2]), "classification"),
        # A label outside the classes: its own check says so, another metric would hide it.
        ("image", data("images", [0, 1, 2, 3]), "classification"),
        ("image", data("images"), "fidelity"),
        ("tensor", data("arrays", [0, 1, 2, 2]), "classification"),
        ("causal", data(labels=[0, 1, 0, 1]), "perplexity"),
        ("causal", data("images"), "fidelity"),
    ],
)
def test_default(interface: str, dataset: Dataset, expected: str) -> None:
    chosen = model(interface)
    assert default_task(dataset, chosen) == expected
    assert find(None, dataset, chosen).metric == find(expected, dataset, chosen).metric


def test_fidelity_suits_the_output() -> None:
    assert find("fidelity", data(), model("embedding")).metric == "cosine"
    assert find("fidelity", data(), model("causal")).metric == "kl"
    assert not find("fidelity", data(), model("image")).higher_is_better


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(UsageError, match="classification, fidelity, perplexity, retrieval"):
        find("acuracy", data(), model("image"))


@pytest.mark.parametrize("name", choices("tasks"))
def test_contract(name: str) -> None:
    task = lookup("tasks", name, "task")
    assert isinstance(task.metric, str)
    assert {type(task.higher_is_better), type(task.relative), type(task.needs_reference)} == {bool}
    with pytest.raises(InputError):
        task.check(data(), model("weights"))


def test_own_function(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def margin(outputs, labels):\n"
        "    return outputs[:, 0] * labels\n"
        "def total(outputs, labels):\n"
        "    return outputs.sum()\n"
        "def broken(outputs, labels):\n"
        "    return labels.nothing\n"
        "number = 5\n"
    )
    dataset = data(labels=[1, 2, 3, 4])
    outputs = np.arange(8.0).reshape(4, 2)
    task = find(f"{file}:margin", dataset, model("embedding"))
    assert isinstance(task, Custom)
    assert task.metric == "margin"
    rows = task.rows(task.record(outputs, {}, None), dataset)
    assert rows.tolist() == [[0], [4], [12], [24]]
    assert task.reduce(rows) == 10
    with pytest.raises(InputError, match="causal"):
        task.check(dataset, model("causal"))
    for name, message in (("total", r"got shape \(\)"), ("broken", "broken failed; got Attr")):
        with pytest.raises(InputError, match=message):
            find(f"{file}:{name}", dataset, model("embedding")).rows(outputs, dataset)
    with pytest.raises(InputError, match="must be a function"):
        find(f"{file}:number", dataset, model("embedding"))
