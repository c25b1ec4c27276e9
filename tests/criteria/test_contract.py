"""Every criterion: shape, determinism, purity, and better than random."""

from types import SimpleNamespace

import pytest
import torch

from penjing import registry
from penjing.layerstats import Gradient
from penjing.masks import unstructured

NAMES = registry.choices("criteria")
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(400, 24, generator=GENERATOR) * torch.logspace(-1, 1, 24)  # [tokens, in]
WEIGHT = torch.randn(16, 24, generator=GENERATOR)
GRAM = (X.T @ X / 400).double()
# Of the loss <z, y>, z ~ N(0, I): its slope by w is z x, E|z| = sqrt(2 / pi), E[z^2] = 1.
GRADIENT = Gradient(
    (2 / torch.pi) ** 0.5 * X.abs().mean(0).expand(16, -1),
    X.square().mean(0).expand(16, -1),
    torch.zeros(400, 24),
)
STATS = SimpleNamespace(gram=GRAM, norm=GRAM.diagonal().sqrt().float(), gradient=GRADIENT)


def loss(name: str, sparsity: float) -> float:
    score = registry.lookup("criteria", name, "score")
    kept = unstructured(score(WEIGHT, STATS), sparsity, per_row=True)
    return float((X @ (WEIGHT * ~kept).T).square().sum())


@pytest.mark.parametrize("name", NAMES)
def test_scores_have_the_weights_shape_and_change_nothing(name: str) -> None:
    score = registry.lookup("criteria", name, "score")
    weight = WEIGHT.clone().requires_grad_()
    first, second = score(weight, STATS), score(weight, STATS)
    assert first.shape == WEIGHT.shape
    assert first.is_floating_point()
    assert not first.requires_grad
    assert torch.equal(first, second)
    assert torch.equal(weight, WEIGHT)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"random"}))
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_better_than_random(name: str, sparsity: float) -> None:
    assert loss(name, sparsity) < 0.8 * loss("random", sparsity)


@pytest.mark.parametrize("name", ["wanda", "taylor", "fisher"])
def test_data_help(name: str) -> None:
    assert loss(name, 0.5) < 0.8 * loss("magnitude", 0.5)
