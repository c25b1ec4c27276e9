from types import SimpleNamespace

import pytest
import torch

from penjing.planes import Scheme
from penjing.quantizers import _kmeans, additive


@pytest.mark.parametrize("bits", [n / 4 for n in range(4, 17)])
@pytest.mark.parametrize("weights", [384 * 384, 4096 * 4096])
def test_widths_sum_to_the_bits_and_codebooks_stay_small(bits: float, weights: int) -> None:
    found = additive.widths(bits, weights)
    assert sum(found) == 8 * bits
    assert all(3 <= k <= 8 for k in found)
    assert sum(8 * 2**k for k in found) <= 0.06 * weights * bits / 8


def test_all_is_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    planes = additive.fit(weight, Scheme(2, 0, True, "additive", 16))
    tables = sum(8 * 2 ** int(bits) for bits in planes.bits)
    # One scale of 16 bits a row, shared by the codebooks.
    assert planes.stored_bytes == 64 * 64 * 2 // 8 + tables + 64 * 2


def test_sums_of_two_books_are_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    books = torch.randint(-40, 41, (2, 8, 8), generator=generator).float()
    books[1] *= 0.1
    codes = torch.randint(0, 8, (2, 400), generator=generator)
    weight = (books[0][codes[0]] + books[1][codes[1]]).reshape(50, 64)
    planes = additive.fit(weight, Scheme(1, 0, True, "additive"))
    off = (planes.dequantize() - weight).square().mean() / weight.square().mean()
    assert off < 0.05  # the first book alone leaves that much, a random code everything


def test_kmeans_weights_by_hand() -> None:
    points = torch.tensor([[0.0, 5.0], [3.0, 7.0]])
    weights = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    table = _kmeans.residual(points, weights, [0])
    assert table[0, 0].tolist() == [1.0, 7.0]


def test_learning_the_books_lowers_the_error() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    gram = (x.T @ x / 300).double()
    weight = torch.randn(96, 64, generator=generator)
    scheme, stats = Scheme(2, 0, True, "additive", 16), SimpleNamespace(gram=gram)
    errors = []
    for rounds in (0, 3):
        off = (additive.fit(weight, scheme, stats, rounds=rounds).dequantize() - weight).double()
        errors.append(float(((off @ gram) * off).sum()))
    assert errors[1] < 0.96 * errors[0]
