"""Every pruner: the exact pattern, nothing changed in place, and better than what is simpler."""

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from penjing import registry
from penjing.errors import InputError
from penjing.linalg import masked_least_squares
from penjing.masks import Pattern

NAMES = registry.choices("pruners")
GENERATOR = torch.Generator().manual_seed(0)
MIX = torch.randn(32, 32, generator=GENERATOR) * torch.logspace(-1, 0.5, 32)
X = torch.randn(600, 32, generator=GENERATOR) @ MIX  # [tokens, in]
WEIGHT = torch.randn(12, 32, generator=GENERATOR)
GRAM = (X.T @ X / 600).double()
STATS = SimpleNamespace(gram=GRAM, norm=GRAM.diagonal().sqrt().float(), count=600)
PATTERNS = [
    Pattern(0.5), Pattern(0.7), Pattern(0.5, 2, 4), Pattern(0.5, 1, 4), Pattern(0.5, block=(1, 4)),
    Pattern(0.5, block=(4, 1)), Pattern(0.5, block=(2, 8)),
]  # fmt: skip


def loss(weight: Tensor) -> float:
    return float((X @ (WEIGHT - weight).T).square().sum())


def wanda(pattern: Pattern) -> Tensor:
    scores = registry.lookup("criteria", "wanda", "score")(WEIGHT, STATS)
    return WEIGHT * pattern.mask(scores, per_row=True)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_pattern_is_kept_exactly(name: str, pattern: Pattern) -> None:
    before = WEIGHT.clone()
    fit = registry.lookup("pruners", name, "fit")
    weight, mask = fit(WEIGHT, pattern, STATS)
    again, _ = fit(WEIGHT, pattern, STATS)
    assert torch.equal(weight, again)
    assert torch.equal(before, WEIGHT)
    assert weight.shape == mask.shape == WEIGHT.shape
    assert weight.dtype == torch.float32
    assert not weight[~mask].any()
    if pattern.of:
        assert (mask.reshape(12, -1, pattern.of).sum(-1) == pattern.kept).all()
    else:  # in all, or in each row
        high, wide = pattern.block
        each = mask.reshape(12 // high, high, 32 // wide, wide).transpose(1, 2).flatten(2)
        assert (each.all(-1) | ~each.any(-1)).all()
        rows, columns = each.shape[:2]
        gone = {round(pattern.sparsity * rows * columns), rows * round(pattern.sparsity * columns)}
        assert int((~each[..., 0]).sum()) in gone


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_better_than_wanda(name: str, pattern: Pattern) -> None:
    weight, _ = registry.lookup("pruners", name, "fit")(WEIGHT, pattern, STATS)
    # SparseGPT fits with the mask that it has so far, the others with the whole one.
    assert loss(weight) < (1.0 if name == "sparsegpt" else 0.8) * loss(wanda(pattern))


@pytest.mark.parametrize("pattern", [*PATTERNS[:3], *PATTERNS[4:6]], ids=str)
def test_admm_is_the_best(pattern: Pattern) -> None:
    found = {
        n: loss(registry.lookup("pruners", n, "fit")(WEIGHT, pattern, STATS)[0]) for n in NAMES
    }
    assert found["admm"] == min(found.values())


@pytest.mark.parametrize("wide", [1, 2])
def test_admm_is_near_the_best_of_all_masks(wide: int) -> None:
    """One row of ten places, five stay: all 252 masks, each with its least squares by numpy."""
    ratios = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        size = 10 * wide
        mix = torch.randn(size, size, generator=generator)
        x = torch.randn(200, size, generator=generator) @ mix
        w = torch.randn(1, size, generator=generator)
        gram = (x.T @ x / 200).double()
        added = 0.01 * float(gram.diagonal().mean()) * np.eye(size)
        a = np.linalg.cholesky(gram.numpy() + added).T
        y = a @ w.double().numpy().T
        every = []
        for places in combinations(range(10), 5):
            kept = [wide * place + at for place in places for at in range(wide)]
            solved = np.linalg.lstsq(a[:, kept], y, rcond=None)[0]
            every.append(float(np.square(a[:, kept] @ solved - y).sum()))
        fit = registry.lookup("pruners", "admm", "fit")
        weight, _ = fit(w, Pattern(0.5, block=(1, wide)), SimpleNamespace(gram=gram, count=600))
        found = float(np.square(a @ weight.double().numpy().T - y).sum())
        assert found >= 0.999 * min(every)
        assert found < np.median(every)
        ratios.append(found / min(every))
    assert np.median(ratios) < 1.5


def test_dead_inputs_and_a_gram_matrix_of_rank_one() -> None:
    dead = GRAM.clone()
    dead[3], dead[:, 3] = 0, 0
    one = torch.outer(X[0], X[0]).double()
    for name in NAMES:
        for gram in (dead, one, torch.zeros_like(GRAM)):
            stats = SimpleNamespace(gram=gram, norm=gram.diagonal().sqrt().float(), count=600)
            weight, mask = registry.lookup("pruners", name, "fit")(WEIGHT, Pattern(0.5), stats)
            assert torch.isfinite(weight).all()
            assert int(mask.sum()) == mask.numel() // 2


def test_masked_least_squares_is_that_of_numpy() -> None:
    mask = torch.rand(WEIGHT.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    found = masked_least_squares(WEIGHT, GRAM, mask, WEIGHT, steps=200)
    added = 0.01 * float(GRAM.diagonal().mean())
    root = np.linalg.cholesky(GRAM.numpy() + added * np.eye(32)).T
    for row in range(len(WEIGHT)):
        kept = mask[row].nonzero().flatten().tolist()
        y = root @ WEIGHT[row].double().numpy()
        solved = np.linalg.lstsq(root[:, kept], y, rcond=None)[0]
        np.testing.assert_allclose(found[row, kept].numpy(), solved, rtol=2e-3, atol=2e-3)
    assert not found[~mask].any()
    few = masked_least_squares(WEIGHT, GRAM, mask, WEIGHT, steps=12)
    assert loss(found) <= loss(few) * 1.01 < 0.9 * loss(WEIGHT * mask)


def test_values_that_are_not_finite_are_named() -> None:
    bad = GRAM.clone()
    bad[0, 0] = float("nan")
    mask = torch.ones_like(WEIGHT, dtype=torch.bool)
    with pytest.raises(InputError, match="NaN"):
        masked_least_squares(WEIGHT, bad, mask, WEIGHT)


@pytest.mark.parametrize("pattern", [Pattern(0.5), Pattern(0.7)], ids=str)
def test_of_few_samples_fast_is_nearer_on_others_than_one_mask(pattern: Pattern) -> None:
    fast, better = registry.lookup("pruners", "fast", "fit"), []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1064, 32, generator=generator) @ MIX
        few, others = x[:64], x[64:]
        gram = (few.T @ few / 64).double()
        stats = SimpleNamespace(gram=gram, norm=gram.diagonal().sqrt().float(), count=64)
        alone = pattern.mask(WEIGHT.abs() * stats.norm, per_row=True)
        single = masked_least_squares(WEIGHT, gram, alone, WEIGHT, 12)
        off = [
            float((others @ (WEIGHT - made).T).square().sum())
            for made in (fast(WEIGHT, pattern, stats)[0], single)
        ]
        better.append(off[0] / off[1])
    assert float(np.median(better)) < 1
