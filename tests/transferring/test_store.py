from pathlib import Path

import pytest
import torch
from tests.networks import bert, llama, text_batch

from penjing.losses import kl
from penjing.model import Model
from penjing.transferring import store
from penjing.transferring.store import Kept


def counted(model: Model, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    runs: list[int] = []
    plain = Model.run

    def run(self: Model, batch: object) -> torch.Tensor:
        runs.append(1)
        return plain(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "run", run)
    return runs


def test_a_teacher_runs_once_also_for_a_later_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, batch = bert(), text_batch()
    wanted = teacher.run(batch)
    runs = counted(teacher, monkeypatch)
    for folder in (None, tmp_path):
        one = Kept(teacher, folder)
        assert all(torch.equal(one(batch), wanted) for _ in range(3))
    assert torch.equal(Kept(teacher, tmp_path)(dict(batch)), wanted)
    assert len(runs) == 2
    one(batch, again=True)
    assert len(runs) == 3


def test_another_batch_or_teacher_is_not_taken_for_it(tmp_path: Path) -> None:
    one = Kept(bert(), tmp_path)
    first = one(text_batch(0))
    assert not torch.equal(one(text_batch(1)), first)
    other = bert()
    other.structure.append({"kind": "drop", "path": "x"})
    Kept(other, tmp_path)(text_batch(0))
    taught = bert()  # of the same source, as two artifacts can be
    with torch.no_grad():
        taught.module.encoder.layer[0].output.dense.weight.add_(1)
    assert not torch.equal(Kept(taught, tmp_path)(text_batch(0)), first)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_draws_of_a_language_model_are_right_on_average(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "DRAWS", 20_000)
    teacher, batch = llama(), text_batch(samples=2)
    there = batch["attention_mask"].bool()
    chance = teacher.run(batch)[there].softmax(-1)
    found = Kept(teacher, tmp_path)(batch)[there]
    assert float((found.exp() - chance).abs().max()) < 0.02
    student = torch.randn(chance.shape, generator=torch.Generator().manual_seed(0))
    # Of the two parts of KL the one with the student in it.
    wanted = -(chance * student.log_softmax(-1)).sum(-1).mean()
    entropy = -(found.exp() * found).sum(-1).mean()
    assert float(kl.loss(student, found) + entropy) == pytest.approx(float(wanted), rel=0.01)
    assert bool(torch.isfinite(kl.loss(student, found)))
