"""Deterministic gates: the smooth count by hand, and its pull."""

from __future__ import annotations

import pytest
import torch

from penjing.constraints.gates import Gates


def test_the_count_by_hand() -> None:
    gate = torch.tensor([0.0, 0.5, 1.0, -1.0, 2.0])
    # sigma is 1 at first: 2 g^2 / (g^2 + 1); and 0.1 at last: 1.01 g^2 / (g^2 + 0.01)
    first = torch.tensor([0.0, 0.5 / 1.25, 1.0, 1.0, 8 / 5])
    torch.testing.assert_close(Gates().count(gate, 0.0), first)
    last = torch.tensor([0.0, 0.2525 / 0.26, 1.0, 1.0, 4.04 / 4.01])
    torch.testing.assert_close(Gates().count(gate, 1.0), last)


@pytest.mark.parametrize("done", [0.0, 0.3, 0.55, 0.8, 1.0])
def test_what_is_there_or_not_counts_one_or_nothing_all_the_way(done: float) -> None:
    found = Gates().count(torch.tensor([0.0, 1.0]), done)
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0]))


def test_what_is_well_there_is_hardly_drawn_down() -> None:
    gate = torch.tensor([0.05, 1.0], requires_grad=True)
    Gates().count(gate, 1.0).sum().backward()
    assert gate.grad is not None
    # (1 + sigma^2) 2 g sigma^2 / (g^2 + sigma^2)^2
    assert float(gate.grad[0]) == pytest.approx(1.01 * 2 * 0.05 * 0.01 / 0.0125**2, rel=1e-4)
    assert float(gate.grad[1]) == pytest.approx(2 * 0.01 / 1.01, rel=1e-4)


def test_the_start_orders_by_the_guess_and_leaves_the_best_whole() -> None:
    assert Gates().start(torch.tensor([0.0, 0.5, 1.0])).tolist() == pytest.approx([0.8, 0.9, 1.0])
