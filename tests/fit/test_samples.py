"""Calibration and evaluation data of a fit share nothing, and a file's order does not matter."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from penjing.data import Dataset
from penjing.errors import InputError
from penjing.fit.samples import about, divide, drop_of
from penjing.model import Model, Source
from penjing.tasks import find

COUNT = 400


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    return Model(module, "tensor", {"x": torch.zeros(1, 4)}, Source("test", "net", ""))


def data(count: int = COUNT, seed: int = 0, labelled: bool = True) -> Dataset:
    """Sorted by class, as files often are."""
    random = np.random.default_rng(seed)
    rows = tuple({"x": x} for x in random.normal(size=(count, 4)).astype(np.float32))
    labels = np.sort(np.arange(count) % 3).astype(np.int64) if labelled else None
    return Dataset("arrays", rows, labels, ("a", "b", "c"))


def rows_of(batches: list) -> set[bytes]:
    return {row.numpy().tobytes() for batch in batches for row in batch["x"]}


def test_nothing_is_calibrated_on_and_reported_on(model: Model) -> None:
    notes: list[str] = []
    found = divide(model, data(), None, find("classification", data(), model), 128, 0, notes)
    own, reported = set(found.calibration.digests()), set(found.evaluation.digests())
    assert len(own) == round(0.35 * COUNT)
    assert len(reported) == COUNT - len(own)
    assert not own & reported
    assert notes == ["calibration data: 140 samples split off --data; figures are on the others"]
    used, searched = rows_of(found.edits), rows_of(found.search)
    assert not used & searched
    assert used | searched <= rows_of(found.everything)
    calibration = {s["x"].tobytes() for s in found.calibration.samples}
    assert rows_of(found.everything) == calibration


def test_every_class_is_among_what_edits_see(model: Model) -> None:
    dataset = data()
    found = divide(model, dataset, None, find("classification", dataset, model), 128, 0, [])
    label = {
        hashlib.sha256(s["x"].tobytes()).digest(): int(y)
        for s, y in zip(dataset.samples, dataset.labels, strict=True)
    }
    for batches in (found.edits, found.search):
        seen = [label[hashlib.sha256(row).digest()] for row in rows_of(batches)]
        assert min(np.bincount(seen, minlength=3)) > len(seen) / 6


def test_the_seed_says_which(model: Model) -> None:
    task = find("classification", data(), model)
    one, same, other = (divide(model, data(), None, task, 128, s, []) for s in (0, 0, 1))
    assert one.calibration.digests() == same.calibration.digests()
    assert set(one.calibration.digests()) != set(other.calibration.digests())


def test_given_calibration_is_used_and_an_overlap_refused(model: Model) -> None:
    task = find("classification", data(), model)
    mine = data(20, seed=1)
    found = divide(model, data(), mine, task, 128, 0, [])
    assert len(found.evaluation) == COUNT
    assert set(found.calibration.digests()) == set(mine.digests())
    with pytest.raises(InputError, match="overlap"):
        divide(model, data(), data().subset([5]), task, 128, 0, [])


@pytest.mark.parametrize("count", [1, 7])
def test_too_little_data(count: int, model: Model) -> None:
    few = data(count)
    with pytest.raises(InputError, match="8 or more"):
        divide(model, few, None, find("classification", few, model), 128, 0, [])


def test_one_batch_is_used_for_both(model: Model) -> None:
    few = data(9)
    found = divide(model, few, None, find("classification", few, model), 128, 0, [])
    assert len(found.calibration) == 4
    assert rows_of(found.edits) == rows_of(found.search)


def test_the_drop_is_of_the_users_metric(model: Model) -> None:
    dataset = data()
    with torch.no_grad():  # labels that the network gives itself: it is always right
        stacked = torch.stack([torch.from_numpy(s["x"]) for s in dataset.samples])
        labels = model.module(stacked).argmax(1).numpy()
    dataset = Dataset("arrays", dataset.samples, labels, dataset.classes)
    task = find("classification", dataset, model)
    found = divide(model, dataset, None, task, 128, 0, [])
    drop = drop_of(model, found, task, 128, 0, [])
    assert drop(model).value == 0
    broken = model.copy()
    broken.module.weight.data.zero_()
    broken.module.bias.data = torch.tensor([1.0, 0.0, 0.0])
    share = (found.calibration.labels == 0).mean()
    assert drop(broken).value == pytest.approx(1 - share)


def test_without_labels_no_drop_is_known_and_it_is_said(model: Model) -> None:
    task = find("classification", data(), model)
    found = divide(model, data(), data(20, seed=1, labelled=False), task, 128, 0, [])
    notes: list[str] = []
    assert drop_of(model, found, task, 128, 0, notes)(model).value == 0.0
    assert "no drops are known before a candidate is measured" in notes[0]


def test_what_a_survey_depends_on(model: Model, tmp_path: Path) -> None:
    dataset = data()
    task, other = (find(n, dataset, model) for n in ("classification", "fidelity"))
    found = divide(model, dataset, None, task, 128, 0, [])
    labels = found.calibration.labels.copy()
    labels[0] = (labels[0] + 1) % 3
    changed = divide(model, dataset, None, task, 128, 0, [])
    changed.calibration = Dataset("arrays", changed.calibration.samples, labels)
    keys = {
        about(found, task, 128),
        about(found, other, 128),
        about(found, task, 64),
        about(changed, task, 128),
    }
    assert len(keys) == 4
    assert about(divide(model, dataset, None, task, 128, 0, []), task, 128) in keys
    # A function of one's own is told by its file.
    for number in (1, 2):
        path = tmp_path / f"metric{number}.py"
        path.write_text(f"def score(outputs, labels):\n    return outputs[:, 0] * {number}\n")
        keys.add(about(found, find(f"{path}:score", dataset, model), 128))
    assert len(keys) == 6
