"""Masks against numpy's sort, plain loops and hand-made ties."""

import numpy as np
import pytest
import torch

from penjing.errors import InputError, UsageError
from penjing.masks import Pattern, blocks, n_m, unstructured

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
    assert Pattern.parse("2:4") == Pattern(0.5, 2, 4)
    assert Pattern.parse("1:4", 0.75) == Pattern(0.75, 1, 4)
    assert Pattern.parse("1x4", 0.6) == Pattern(0.6, block=(1, 4))
    assert Pattern.parse(None, 0.6) == Pattern.parse("1x1", 0.6) == Pattern(0.6)
    names = {"2:4": None, "1x4": 0.5, "16x32": 0.9}
    assert [str(Pattern.parse(n, s)) for n, s in names.items()] == [
        "2:4", "50% in blocks of 1x4", "90% in blocks of 16x32",
    ]  # fmt: skip
    assert [Pattern.parse(n, s).width for n, s in names.items()] == [4, 4, 32]
    for bad in ("2", "4:2", "0:4", "2:2", "a:b", "2:4:8", "-1:4", "²:4", "0x4", "4x0", "4X4", "x4",
                "1x4 ", "", "1x4x4", "1" * 5000 + "x4"):  # fmt: skip
        with pytest.raises(UsageError, match="not a pattern"):
            Pattern.parse(bad, 0.5)
    for text in (None, "1x4"):
        with pytest.raises(UsageError, match="no sparsity"):
            Pattern.parse(text)
    with pytest.raises(UsageError, match="disagree"):
        Pattern.parse("2:4", 0.4)


def test_what_fills_no_group_is_said() -> None:
    assert Pattern.parse("2:4").leftover(7, 8) == Pattern(0.5).leftover(7, 11) == ""
    two = Pattern.parse("2:4").leftover(7, 11)
    assert two == "the last 3 of each row fill no group of 4 and stay"
    both = Pattern.parse("4x8", 0.5).leftover(7, 11)
    assert both == "the last 3 of each row and the last 3 rows fill no block of 4x8 and stay"


@pytest.mark.parametrize("block", [(1, 4), (4, 1), (2, 3), (7, 11), (1, 1)])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.4, 0.5, 1.0])
def test_whole_blocks_go_by_their_sums(
    block: tuple[int, int], per_row: bool, sparsity: float
) -> None:
    scores, (high, wide) = SCORES.numpy(), block
    rows, columns = 7 // high, 11 // wide
    wanted = np.ones((7, 11), dtype=bool)
    sums = {}
    for i in range(rows):
        for j in range(columns):
            part = scores[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            sums[i, j] = sum(float(x) for x in part.flat)
    among = [[(i, j) for j in range(columns)] for i in range(rows)]
    if not per_row:
        among = [[place for row in among for place in row]]
    for places in among:
        for i, j in sorted(places, key=sums.__getitem__)[: round(sparsity * len(places))]:
            wanted[i * high : (i + 1) * high, j * wide : (j + 1) * wide] = False
    np.testing.assert_array_equal(blocks(SCORES, sparsity, block, per_row).numpy(), wanted)
    pattern = Pattern(sparsity, block=block)
    np.testing.assert_array_equal(pattern.mask(SCORES, per_row=per_row).numpy(), wanted)


def test_blocks_larger_than_the_weight_stay() -> None:
    assert blocks(SCORES, 0.9, (8, 1)).all()
    assert blocks(SCORES, 0.9, (1, 12), per_row=True).all()
    assert blocks(torch.zeros(0, 3), 0.5, (1, 2)).shape == (0, 3)


def test_bad_scores_and_shares_are_refused() -> None:
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="sparsity"):
            unstructured(SCORES, bad)
    with pytest.raises(UsageError, match="pattern"):
        n_m(SCORES, 4, 4)
    with pytest.raises(UsageError, match="block"):
        blocks(SCORES, 0.5, (0, 4))
    for call in (
        lambda s: unstructured(s, 0.5),
        lambda s: n_m(s, 1, 2),
        lambda s: blocks(s, 0.5, (1, 2)),
    ):
        with pytest.raises(InputError, match="NaN"):
            call(torch.tensor([[float("nan"), 1.0]]))
        with pytest.raises(InputError, match="scores"):
            call(torch.ones(4))
