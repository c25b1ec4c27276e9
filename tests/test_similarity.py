import numpy as np
import pytest
import torch

from penjing.similarity import linear_cka

GENERATOR = torch.Generator().manual_seed(0)


def hsic(x: torch.Tensor, y: torch.Tensor) -> float:
    """From kernels, as section 2 has it."""
    centre = np.eye(len(x)) - 1 / len(x)
    one, two = (z.double().numpy() @ z.double().numpy().T for z in (x, y))
    return float(np.trace(one @ centre @ two @ centre))


@pytest.mark.parametrize("samples", [5, 50])
def test_against_kernels(samples: int) -> None:
    x = torch.randn(samples, 7, generator=GENERATOR)
    y = x[:, :4] + torch.randn(samples, 4, generator=GENERATOR) + 3
    wanted = hsic(x, y) / (hsic(x, x) * hsic(y, y)) ** 0.5
    assert linear_cka(x, y) == pytest.approx(wanted, rel=1e-9)


def test_rotations_and_scales_do_not_count() -> None:
    x = torch.randn(20, 6, generator=GENERATOR).double()
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=GENERATOR).double())
    assert linear_cka(x, 3 * x @ turn + 1) == pytest.approx(1)
    assert linear_cka(x, torch.ones(20, 2)) == 0
