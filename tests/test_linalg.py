"""Linear algebra against numpy and hand-solved cases."""

import numpy as np
import pytest
import torch

from penjing.errors import InputError
from penjing.linalg import (
    Cross,
    Gram,
    affine_ridge,
    asymmetric_target,
    damped_cholesky,
    inverse_cholesky_upper,
    ridge,
)


def samples(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def test_gram_is_the_mean_of_outer_products() -> None:
    x = samples(5000, 6) * torch.tensor([1, 10, 0.1, 1, 1, 1]) + 3  # more than one chunk
    gram = Gram(6)
    gram.add(x[:1000].reshape(10, 100, 6))
    gram.add(x[1000:])
    wide = x.numpy().astype(np.float64)
    np.testing.assert_allclose(gram.matrix.numpy(), wide.T @ wide / 5000, rtol=1e-6)
    np.testing.assert_allclose(gram.norm.numpy(), np.sqrt((wide**2).mean(0)), rtol=1e-6)
    assert gram.matrix.dtype == torch.float64
    assert gram.count == 5000


def test_gram_takes_values_whose_squares_overflow_float32() -> None:
    gram = Gram(2)
    gram.add(torch.tensor([[1e30, 0.0], [0.0, 1.0]]))
    assert gram.matrix[0, 0].item() == pytest.approx(1e60 / 2, rel=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_batch_changes_nothing(bad: float) -> None:
    gram = Gram(2)
    gram.add(torch.ones(3, 2))
    with pytest.raises(InputError, match="NaN or infinite"):
        gram.add(torch.tensor([[1.0, 1.0], [bad, 1.0]]))
    with pytest.raises(InputError, match="width"):
        gram.add(torch.ones(3, 3))
    assert gram.count == 3
    assert gram.matrix.tolist() == [[1, 1], [1, 1]]


def test_an_empty_gram_says_so() -> None:
    with pytest.raises(InputError, match="no calibration data"):
        _ = Gram(2).matrix
    with pytest.raises(InputError, match="no calibration data"):
        _ = Gram(2).norm


def test_damping_is_a_share_of_the_live_mean_diagonal() -> None:
    # Live diagonal 4 and 2, mean 3, so 0.3 is added; the dead input gets 1 + 0.3.
    matrix = torch.tensor([[4.0, 1, 0], [1, 2, 0], [0, 0, 0]], dtype=torch.float64)
    lower = damped_cholesky(matrix, 0.1)
    wanted = [[4.3, 1, 0], [1, 2.3, 0], [0, 0, 1.3]]
    np.testing.assert_allclose((lower @ lower.T).numpy(), wanted, rtol=1e-12)
    assert torch.equal(lower, lower.tril())
    assert matrix[2, 2] == 0


def test_rank_one_zero_and_undamped_singular_matrices_factor() -> None:
    ones = torch.ones(4, 4, dtype=torch.float64)
    for matrix, damping in ((ones, 0.01), (ones, 0.0), (0 * ones, 0.01), (0 * ones, 0.0)):
        lower = damped_cholesky(matrix, damping)
        assert torch.isfinite(lower).all()
        assert (lower.diagonal() > 0).all()


def test_damping_grows_until_the_matrix_is_definite() -> None:
    # Eigenvalues 1 +- 1.05: definite only with more than 0.05 added, so not at 1 %.
    matrix = torch.tensor([[1.0, 1.05], [1.05, 1.0]], dtype=torch.float64)
    lower = damped_cholesky(matrix, 0.01)
    np.testing.assert_allclose((lower @ lower.T).numpy(), [[1.1, 1.05], [1.05, 1.1]], rtol=1e-12)


def test_hopeless_matrices_are_refused() -> None:
    with pytest.raises(InputError, match="negative diagonal"):
        damped_cholesky(-torch.eye(2))
    with pytest.raises(InputError, match="NaN"):
        damped_cholesky(torch.full((2, 2), float("nan")))
    with pytest.raises(InputError, match="not positive definite"):
        damped_cholesky(torch.tensor([[1.0, 1e9], [1e9, 1.0]]))


def test_inverse_factor_against_numpy() -> None:
    x = samples(50, 7).double()
    matrix = x.T @ x / 50
    upper = inverse_cholesky_upper(matrix, 0.01).numpy()
    damped = matrix.numpy() + 0.01 * np.trace(matrix.numpy()) / 7 * np.eye(7)
    np.testing.assert_allclose(upper.T @ upper, np.linalg.inv(damped), rtol=1e-9)
    np.testing.assert_array_equal(upper, np.triu(upper))


def test_ridge_is_least_squares_on_augmented_data() -> None:
    x, y, prior = samples(40, 3).double(), samples(40, 2, 1).double(), samples(3, 2, 2).double()
    gram, cross = x.T @ x / 40, x.T @ y / 40
    added = 0.5 * np.trace(gram.numpy()) / 3
    # sqrt(n lambda) rows that pull B to the prior, solved by numpy's SVD least squares.
    pull = np.sqrt(40 * added) * np.eye(3)
    rows = np.vstack([x.numpy(), pull])
    right = np.vstack([y.numpy(), pull @ prior.numpy()])
    wanted = np.linalg.lstsq(rows, right, rcond=None)[0]
    np.testing.assert_allclose(ridge(gram, cross, 0.5, prior).numpy(), wanted, rtol=1e-9)


def test_ridge_leaves_a_dead_input_at_its_prior() -> None:
    gram = torch.diag(torch.tensor([2.0, 0.0], dtype=torch.float64))
    cross = torch.tensor([[6.0], [0.0]], dtype=torch.float64)
    prior = torch.tensor([[1.0], [7.0]], dtype=torch.float64)
    # Live: (2 + 0.2)^-1 (6 + 0.2 * 1) = 6.2 / 2.2.
    found = ridge(gram, cross, 0.1, prior).flatten()
    np.testing.assert_allclose(found.numpy(), [6.2 / 2.2, 7.0], rtol=1e-12)


def test_ridge_refuses_what_does_not_fit() -> None:
    with pytest.raises(InputError, match="shapes of a ridge"):
        ridge(torch.eye(3), torch.ones(2, 1))
    with pytest.raises(InputError, match="NaN"):
        ridge(torch.eye(2), torch.full((2, 1), float("nan")))


def sums(x: torch.Tensor, y: torch.Tensor) -> tuple[int, *tuple[torch.Tensor, ...]]:
    return len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y


def test_affine_ridge_recovers_a_map_with_a_bias() -> None:
    x = samples(200, 3).double() + torch.tensor([5.0, -1, 0])
    weight, bias = samples(2, 3, 1).double(), torch.tensor([0.5, -9.0], dtype=torch.float64)
    found, shift = affine_ridge(*sums(x, x @ weight.T + bias), strength=0.0)
    np.testing.assert_allclose(found.numpy(), weight.numpy(), atol=1e-9)
    np.testing.assert_allclose(shift.numpy(), bias.numpy(), atol=1e-9)


def test_affine_ridge_far_from_data_is_the_prior_with_a_free_bias() -> None:
    x = samples(50, 3).double() + 2
    y = samples(50, 3, 1).double() - 4
    weight, bias = affine_ridge(*sums(x, y), strength=1e12, toward=torch.eye(3))
    np.testing.assert_allclose(weight.numpy(), np.eye(3), atol=1e-9)
    np.testing.assert_allclose(bias.numpy(), (y.mean(0) - x.mean(0)).numpy(), atol=1e-9)


def test_affine_ridge_with_a_constant_input() -> None:
    x = torch.cat([samples(50, 1).double(), torch.full((50, 1), 3.0, dtype=torch.float64)], 1)
    y = x[:, :1] * 2
    weight, bias = affine_ridge(*sums(x, y), strength=1e-9, toward=torch.tensor([[0.0, 5.0]]))
    np.testing.assert_allclose(weight.numpy(), [[2, 5]], atol=1e-6)
    np.testing.assert_allclose(bias.numpy(), [-15], atol=1e-6)
    with pytest.raises(InputError, match="no calibration data"):
        affine_ridge(0, *sums(x, y)[1:])


def test_the_asymmetric_target_is_least_squares_on_the_edited_inputs() -> None:
    generator = np.random.default_rng(5)
    was = generator.standard_normal((200, 6))
    now = was + 0.3 * generator.standard_normal((200, 6))
    weight = generator.standard_normal((4, 6))
    gram, cross = Gram(6), Cross(6)
    gram.add(torch.from_numpy(now))
    for part in (slice(0, 70), slice(70, 200)):
        cross.add(torch.from_numpy(was[part]), torch.from_numpy(now[part]))
    wanted = np.linalg.lstsq(now, was @ weight.T, rcond=None)[0].T  # [out, in]
    tensor = torch.from_numpy(weight)
    found = asymmetric_target(tensor, gram.matrix, cross.matrix, 1.0, damping=1e-9)
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-5)
    half = asymmetric_target(tensor, gram.matrix, cross.matrix, 0.5, damping=1e-9)
    np.testing.assert_allclose(half.numpy(), (weight + wanted) / 2, atol=1e-5)
    same = asymmetric_target(tensor, gram.matrix, gram.matrix, 1.0)
    np.testing.assert_allclose(same.numpy(), weight, atol=1e-6)
