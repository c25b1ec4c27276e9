"""Training: what a network is drawn to, against torch's own losses, and the way down."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing.errors import InputError, UsageError
from penjing.objective import check_loss
from penjing.training import check_optimizer, descend, held_out, schedule


def test_an_eighth_is_held_out() -> None:
    batches = [{"x": torch.full((2, 1), float(i))} for i in range(16)]
    train, test = held_out(batches)
    assert [int(b["x"][0]) for b in test] == [0, 1]
    assert [int(b["x"][0]) for b in train] == list(range(2, 16))
    train, test = held_out([{"x": torch.arange(9.0)}])
    assert (test[0]["x"].tolist(), train[0]["x"].tolist()) == ([0.0], list(range(1, 9)))
    train, test = held_out([{"x": torch.zeros(1)}])
    assert (len(train), len(test)) == (1, 0)


def test_the_rate_rises_for_a_twentieth_of_the_way_and_falls_to_nothing() -> None:
    assert schedule(0.0) == pytest.approx(0.05)
    assert schedule(0.5) == pytest.approx(0.5)
    assert schedule(0.9999) < 1e-6
    assert max(range(100), key=lambda i: schedule(i / 100)) in (4, 5)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_descent_finds_the_mean(optimizer: str) -> None:
    x = torch.zeros(3, requires_grad=True)
    wanted = torch.tensor([0.3, -0.2, 0.1])

    def value(batch: net.Batch, _: float) -> Tensor:
        return (x - batch["x"]).square().sum()

    batches = [{"x": wanted + shift} for shift in (-0.1, 0.1)]
    steps = list(descend(batches, [([x], 0.01)], value, steps=300, optimizer=optimizer))
    assert len(steps) == 300
    assert steps[0].done == 0
    assert steps[-1].done == pytest.approx(299 / 300)
    torch.testing.assert_close(x.detach(), wanted, atol=0.02, rtol=0)


def test_every_batch_takes_its_turn_in_an_order_of_the_seed() -> None:
    def order(seed: int) -> list[int]:
        seen: list[int] = []
        x = torch.zeros(1, requires_grad=True)

        def value(batch: net.Batch, _: float) -> Tensor:
            seen.append(int(batch["x"]))
            return x.square().sum()

        batches = [{"x": torch.tensor(i)} for i in range(5)]
        list(descend(batches, [([x], 0.1)], value, steps=10, seed=seed))
        return seen

    found = order(0)
    assert sorted(found[:5]) == sorted(found[5:]) == list(range(5))
    assert found == order(0)
    assert found != order(1)


def test_the_length_of_a_step_is_what_a_gradient_of_one_moves() -> None:
    x = torch.zeros(2, requires_grad=True)
    slope = torch.tensor([0.2, 0.4])
    for step in descend([{}], [([x], 0.1)], lambda _, __: (slope * x).sum(), steps=2):
        before = x.detach().clone()
        rate = 0.1 * schedule(step.done)
        # The gradient is constant: Adam's mean of its squares is its square.
        torch.testing.assert_close(step.length(x), rate / slope, rtol=1e-4, atol=1e-6)
        assert before.shape == (2,)
    plain = descend([{}], [([x], 0.1)], lambda _, __: x.square().sum(), steps=1, optimizer="sgd")
    assert next(plain).length(x) == pytest.approx(0.1 * schedule(0.0))


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import torch\ndef rms(groups): return torch.optim.RMSprop(groups)\n")
    check_optimizer(f"{file}:rms")
    x = torch.ones(1, requires_grad=True)
    spec = f"{file}:rms"
    list(descend([{}], [([x], 0.05)], lambda _, __: x.square().sum(), steps=60, optimizer=spec))
    assert abs(float(x.detach())) < 0.2


def test_refusals() -> None:
    with pytest.raises(UsageError, match="unknown optimizer; got adagard; allowed: adamw, sgd"):
        check_optimizer("adagard")
    with pytest.raises(UsageError, match="unknown name in losses"):
        check_loss("hinge")
    for fine in (None, "labels", "mse"):
        check_loss(fine)
    x = torch.zeros(1, requires_grad=True)
    with pytest.raises(InputError, match="loss is not finite"):
        list(descend([{}], [([x], 0.1)], lambda _, __: (x / 0).sum(), steps=1))
