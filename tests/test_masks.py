"""Masks against numpy's sort and hand-made ties."""

import numpy as np
import pytest
import torch

from penjing.errors import InputError, UsageError
from penjing.masks import n_m, parse_pattern, unstructured

SCORES = torch.rand(7, 11, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.99, 1.0])
def test_the_least_go_and_the_count_is_exact(sparsity: float) -> None:
    mask = unstructured(SCORES, sparsity).numpy()
    count = round(sparsity * 77)
    least = np.argsort(SCORES.numpy().ravel(), kind="stable")[:count]
    assert set(np.flatnonzero(~mask.ravel())) == set(least)


def test_each_row_loses_the_same_number() -> None:
    mask = unstructured(SCORES, 0.5, per_row=True).numpy()
    least = np.argsort(SCORES.numpy(), axis=1, kind="stable")[:, : round(5.5)]
    assert [set(np.flatnonzero(~row)) for row in mask] == [set(row) for row in least]


def test_of_equals_the_first_go() -> None:
    scores = torch.tensor([[1.0, 0, 1, 1], [1, 1, 2, 1]])
    assert unstructured(scores, 0.5).tolist() == [[False] * 4, [True] * 4]
    assert unstructured(scores, 0.5, per_row=True).tolist() == [
        [False, False, True, True],
        [False, False, True, True],
    ]
    assert n_m(scores, 2, 4).tolist() == [[False, False, True, True], [False, False, True, True]]


def test_n_of_m_keeps_the_largest_and_the_tail() -> None:
    scores = torch.tensor([[5.0, 1, 4, 2, 9, 8, 7, 6, 0, 0]])
    assert n_m(scores, 2, 4).int().tolist() == [[1, 0, 1, 0, 1, 1, 0, 0, 1, 1]]
    assert n_m(scores, 1, 2).int().tolist() == [[1, 0, 1, 0, 1, 0, 1, 0, 0, 1]]
    assert n_m(scores, 1, 4).int().tolist() == [[1, 0, 0, 0, 1, 0, 0, 0, 1, 1]]
    assert n_m(scores, 3, 4).int().tolist() == [[1, 0, 1, 1, 1, 1, 1, 0, 1, 1]]
    assert n_m(scores[:, :3], 2, 4).all()


def test_infinite_scores_order_and_empty_ones_pass() -> None:
    scores = torch.tensor([[float("inf"), 1.0, float("-inf"), 0.0]])
    assert unstructured(scores, 0.5).int().tolist() == [[1, 1, 0, 0]]
    assert unstructured(torch.zeros(0, 3), 0.5).shape == (0, 3)
    assert unstructured(torch.zeros(3, 0), 0.5, per_row=True).shape == (3, 0)


def test_patterns_are_read() -> None:
    assert parse_pattern("2:4") == (2, 4)
    for bad in ("2", "4:2", "0:4", "2:2", "a:b", "2:4:8", "-1:4", "²:4"):
        with pytest.raises(UsageError, match="not a pattern"):
            parse_pattern(bad)


def test_bad_scores_and_shares_are_refused() -> None:
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="sparsity"):
            unstructured(SCORES, bad)
    with pytest.raises(UsageError, match="pattern"):
        n_m(SCORES, 4, 4)
    for call in (lambda s: unstructured(s, 0.5), lambda s: n_m(s, 1, 2)):
        with pytest.raises(InputError, match="NaN"):
            call(torch.tensor([[float("nan"), 1.0]]))
        with pytest.raises(InputError, match="scores"):
            call(torch.ones(4))
