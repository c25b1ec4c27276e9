import numpy as np
import pytest
import torch

from penjing.quantizers import _feedback
from penjing.quantizers._refit import affine, solve


def problem(out: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, inputs, generator=generator)
    x = x @ torch.randn(inputs, inputs, generator=generator)
    return torch.randn(out, inputs, generator=generator), (x.T @ x / 400).double()


def error(weight: torch.Tensor, other: torch.Tensor, gram: torch.Tensor) -> float:
    off = (other - weight).double()
    return float(((off @ gram.double()) * off).sum())


def halves(columns: torch.Tensor, place: int) -> torch.Tensor:
    return (columns * 2).round().clamp(-3, 3) / 2


def textbook(weight: np.ndarray, gram: np.ndarray, order: list[int], d: int) -> np.ndarray:
    """Groups of columns with the exact inverse of what is left."""
    w, made = weight.astype(np.float64).copy(), np.zeros_like(weight)
    damped = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))
    left = [place * d + i for place in order for i in range(d)]
    while left:
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        own = left[:d]
        made[:, own] = halves(torch.tensor(w[:, own]).float(), 0).numpy()
        off = (w[:, own] - made[:, own]) @ np.linalg.inv(inverse[:d, :d])
        w[:, left] -= off @ inverse[:d]
        left = left[d:]
    return made


@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize("width", [1, 2, 4])
def test_equals_the_textbook(width: int, block: int) -> None:
    weight, gram = problem(6, 16)
    order = _feedback.act_order(gram, width)
    made = _feedback.run(weight, gram, halves, width=width, block=block)
    wanted = textbook(weight.numpy(), gram.numpy(), order.tolist(), width)
    np.testing.assert_array_equal(made.numpy(), wanted)


def test_an_order_of_ones_own() -> None:
    weight, gram = problem(6, 16)
    order = torch.tensor([3, 1, 0, 2])
    made = _feedback.run(weight, gram, halves, order=order, width=4)
    wanted = textbook(weight.numpy(), gram.numpy(), order.tolist(), 4)
    np.testing.assert_array_equal(made.numpy(), wanted)


def test_act_order_by_hand() -> None:
    gram = torch.diag(torch.tensor([1.0, 2.0, 5.0, 0.0, 4.0]))
    assert _feedback.act_order(gram).tolist() == [2, 4, 1, 0, 3]
    assert _feedback.act_order(gram, 2).tolist() == [1, 2, 0]  # 3, 5, 4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("width", [1, 5])
def test_feedback_beats_nearest_and_polish_beats_feedback(seed: int, width: int) -> None:
    weight, gram = problem(20, 33, seed)
    nearest = error(weight, halves(weight, 0), gram)
    made = _feedback.run(weight, gram, halves, width=width)
    fed = error(weight, made, gram)
    assert fed < 0.8 * nearest
    smooth = _feedback.damped(gram)
    better, loss = _feedback.polish(weight, made, smooth, halves)
    assert error(weight, better, smooth) <= error(weight, made, smooth)
    assert error(weight, better, gram) < fed
    assert float(loss.sum()) == pytest.approx(error(weight, better, smooth), rel=1e-4)


def test_polish_ends_where_no_single_change_helps() -> None:
    weight, gram = problem(5, 12, 7)
    smooth = _feedback.damped(gram)
    made = halves(weight, 0)
    for block in (3, 128, 128, 128, 128, 128, 128, 128, 128):
        made, _ = _feedback.polish(weight, made, smooth, halves, block=block)
    least = error(weight, made, smooth)
    for column in range(12):
        for value in torch.arange(-3, 4) / 2:
            other = made.clone()
            other[2, column] = value
            assert error(weight, other, smooth) >= least - 1e-4


def test_the_metric_is_the_cost_with_ideal_columns_to_come() -> None:
    _, gram = problem(1, 12, 3)
    order = torch.tensor([2, 0, 1])
    made = _feedback.factor(gram, order=order, width=4, damping=0.0)
    own, rest = gram[:4, :4], gram[4:8, 4:8]  # place 0, and place 1 that comes after it
    wanted = own - gram[:4, 4:8] @ torch.linalg.inv(rest) @ gram[4:8, :4]
    # float32 of a badly conditioned inverse
    torch.testing.assert_close(made.metric(0).double(), wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made.metric(2).double(), torch.linalg.inv(
        torch.linalg.inv(gram)[8:, 8:]), rtol=1e-3, atol=1e-3)  # fmt: skip


def test_a_last_place_that_is_not_full() -> None:
    weight, gram = problem(4, 13, 5)
    made = _feedback.run(weight, gram, halves, width=4)
    assert made.shape == weight.shape
    assert torch.equal(made, halves(made, 0))


@pytest.mark.parametrize("group", [10, 4])
def test_scales_are_least_squares(group: int) -> None:
    weight, gram = problem(3, 10, 11)
    gram = gram + 0.1 * gram.diagonal().mean() * torch.eye(10)
    basis = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(2))
    groups = -(-10 // group)
    found = solve(weight, lambda rows: basis[:, rows], torch.ones(2, 3, groups), group,
                  gram.float(), 0)  # fmt: skip
    root = torch.linalg.cholesky(gram).numpy()
    for row in range(3):
        parts = []
        for g in range(groups):
            part = torch.zeros(2, 10)
            part[:, g * group : (g + 1) * group] = basis[:, row, g * group : (g + 1) * group]
            parts.append(part)
        matrix = torch.cat(parts).numpy() @ root  # [groups * planes, in]
        wanted = np.linalg.lstsq(matrix.T, weight[row].numpy() @ root, rcond=None)[0]
        np.testing.assert_allclose(found[:, row].T.flatten().numpy(), wanted, rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("group", [10, 4])
@pytest.mark.parametrize("levels", [None, 15])
def test_an_affine_grid_is_the_best_of_all_zero_points(group: int, levels: int | None) -> None:
    """The scales by least squares in numpy; the zero points better than those before."""
    weight, gram = problem(3, 10, 11)
    gram = gram + 0.1 * gram.diagonal().mean() * torch.eye(10)
    root = torch.linalg.cholesky(gram).numpy()
    groups = -(-10 // group)
    zero = torch.full((3, groups), 8.0)
    scale = torch.full((3, groups), 0.4)
    # Where it may move, the codes are of another zero point.
    codes = (weight / 0.4 + (6 if levels else 8)).round().clamp(0, 15).to(torch.uint8)
    image = weight @ gram.float()
    found, moved = affine(image, codes, scale, zero, group, gram.float(), levels)
    assert torch.equal(moved, moved.round())
    assert torch.equal(moved, zero) == (levels is None)

    def best(row: int, zeros: np.ndarray) -> tuple[np.ndarray, float]:
        matrix = np.zeros((groups, 10))
        for g in range(groups):
            own = slice(g * group, (g + 1) * group)
            matrix[g, own] = codes[row, own].numpy().astype(float) - zeros[g]
        goal = weight[row].numpy() @ root
        scales = np.linalg.lstsq((matrix @ root).T, goal, rcond=None)[0]
        return scales, float(np.square(scales @ matrix @ root - goal).sum())

    now = [best(row, moved[row].numpy()) for row in range(3)]
    before = [best(row, zero[row].numpy()) for row in range(3)]
    for row, (wanted, _) in enumerate(now):
        np.testing.assert_allclose(found[row].numpy(), wanted, rtol=2e-3)
    if levels:
        assert sum(e for _, e in now) < sum(e for _, e in before)


def test_a_negative_scale_is_not_taken() -> None:
    basis = torch.ones(1, 2, 4)
    weight = torch.tensor([[1.0] * 4, [-1.0] * 4])
    found = solve(weight, lambda rows: basis[:, rows], torch.full((1, 2, 1), 0.5), 4,
                  torch.eye(4), 1)  # fmt: skip
    assert found.flatten().tolist() == pytest.approx([1.0, 0.5], abs=1e-4)
