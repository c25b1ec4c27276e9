"""Checkpoints: descent that is broken off anywhere ends where it would have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import torch
from torch import Tensor

from penjing import checkpoint as module
from penjing.checkpoint import Checkpoint
from penjing.errors import InputError
from penjing.model import Batch
from penjing.optimizers import OPTIMIZERS
from penjing.training import Descent, Taken, descend

BATCHES = [{"x": torch.randn(4, 3, generator=torch.Generator().manual_seed(i))} for i in range(5)]


@pytest.fixture(autouse=True)
def _always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY", 0.0)


def _start() -> Tensor:
    return torch.linspace(-1, 1, 6).reshape(2, 3).requires_grad_()


def _run(
    weight: Tensor, path: Path | None, steps: int = 13, optimizer: str = "adamw"
) -> Iterator[Taken]:
    def value(batch: Batch, _: float) -> Tensor:
        return (batch["x"] @ weight.T).square().mean()

    descent = Descent(accumulate=2, decay=0.1)
    return descend(
        BATCHES, [([weight], 0.05)], value, steps=steps, optimizer=optimizer, descent=descent,
        checkpoint=Checkpoint(path),
    )  # fmt: skip


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS])
def test_what_is_broken_off_ends_with_the_same_bytes(tmp_path: Path, optimizer: str) -> None:
    whole = _start()
    losses = [t.loss for t in _run(whole, None, optimizer=optimizer)]
    path, seen = tmp_path / "a.safetensors", []
    for stops in (3, 4, 100):
        weight = _start()  # another process
        for number, taken in enumerate(_run(weight, path, optimizer=optimizer)):
            seen.append(taken.loss)
            if number + 1 == stops:
                break
    assert torch.equal(weight, whole)
    assert seen[:3] == losses[:3]
    assert len(seen) < 3 + 4 + len(losses)  # it went on
    assert seen[-1] == losses[-1]


def test_a_file_holds_no_pickle_and_a_torn_one_counts_for_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    for taken in _run(_start(), path, steps=3):
        assert taken.loss > 0
    with safetensors.safe_open(path, "pt") as file:
        assert {"parameter.0", "generator", "optimizer.0.exp_avg"} <= set(file.keys())
    found = Checkpoint(path).load()
    assert found is not None
    assert found[1]["step"] == 3
    path.write_bytes(path.read_bytes()[:100])
    assert Checkpoint(path).load() is None
    whole, again = _start(), _start()
    list(_run(whole, None))
    list(_run(again, path))
    assert torch.equal(whole, again)


def test_what_the_caller_keeps_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    one = Checkpoint(path, False, {"best": torch.ones(2)}, {"seen": [1.5]})
    one.save({"best": torch.zeros(2)}, {"step": 1})  # names do not meet
    two = Checkpoint(path)
    found = two.load()
    assert found is not None
    assert torch.equal(found[0]["best"], torch.zeros(2))
    assert torch.equal(two.tensors["best"], torch.ones(2))
    assert two.notes == {"seen": [1.5]}
    two.remove()
    assert Checkpoint(path).load() is None


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write the checkpoint"):
        Checkpoint(tmp_path / "none" / "a.safetensors").save({}, {})


def test_the_end_is_kept_where_something_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EVERY", 1e9)
    batch, kept = [{"x": torch.ones(1)}], []
    for last in (False, True):
        place = Checkpoint(tmp_path / f"{last}.safetensors", last)
        x = torch.ones(1, requires_grad=True)
        list(
            descend(
                batch, [([x], 0.1)], lambda _, __, x=x: x.square().sum(), steps=2, checkpoint=place
            )
        )
        kept.append(place.load() is not None)
    assert kept == [False, True]
