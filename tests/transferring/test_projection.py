import numpy as np
import torch

from penjing.transferring.projection import Projection

GENERATOR = torch.Generator().manual_seed(0)
MAP = torch.randn(5, 3, generator=GENERATOR)


def test_solved_finds_a_linear_map() -> None:
    x = torch.randn(8, 20, 3, generator=GENERATOR)
    y = x @ MAP.T + 2
    found = Projection(learned=False)(x, y, None)
    assert float((found - y).norm() / (y - 2).norm()) < 0.02
    assert not found.requires_grad


def test_solved_is_least_squares_of_what_was_seen() -> None:
    one = Projection(learned=False)
    for _ in range(40):
        x = torch.randn(16, 4, 3, generator=GENERATOR)
        noise = torch.randn(16, 4, 5, generator=GENERATOR)
        given = one(x, x @ MAP.T + noise, None)
    alone, *_ = np.linalg.lstsq(x.flatten(0, 1), (x @ MAP.T + noise).flatten(0, 1), rcond=None)
    assert given.shape == (16, 4, 5)
    assert one.weight is not None
    # The last batch alone says less of the map than all of them.
    assert float((one.weight - MAP).norm()) < np.linalg.norm(alone.T - MAP.numpy())


def test_padding_is_not_seen() -> None:
    x = torch.randn(4, 6, 3, generator=GENERATOR)
    y = x @ MAP.T
    mask = torch.arange(6) < torch.tensor([6, 3, 2, 5]).unsqueeze(1)
    wild = torch.where(mask.unsqueeze(-1), y, torch.full_like(y, 100.0))
    plain, masked = Projection(False), Projection(False)
    plain(x[mask].unsqueeze(0), y[mask].unsqueeze(0), None)
    masked(x, wild, mask)
    torch.testing.assert_close(plain.weight, masked.weight)


def test_a_learned_one_is_trained_and_not_solved_again() -> None:
    x = torch.randn(4, 6, 3, generator=GENERATOR)
    one = Projection(learned=True)
    assert one.parameters() == []
    one(x, x @ MAP.T, None)
    (weight, bias), before = one.parameters(), one.weight.clone()  # type: ignore[union-attr]
    one(x, x @ MAP.T + 3, None)
    assert torch.equal(weight, before)
    one(x, x @ MAP.T + 3, None).sum().backward()  # type: ignore[no-untyped-call]
    assert bias.grad is not None
