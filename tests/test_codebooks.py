import pytest

from penjing.codebooks import NAMES, table
from penjing.errors import InputError


def test_powers_of_two() -> None:
    assert table("power2-2").flatten().tolist() == [0, 1, -1, 2]
    assert table("power2-3").flatten().tolist() == [0, 1, -1, 2, -2, 4, -4, 8]
    four = table("power2-4").flatten().tolist()
    assert len(set(four)) == 16
    assert max(four) == 128
    assert all(n == 0 or abs(n) & (abs(n) - 1) == 0 for n in four)


def test_names() -> None:
    assert all(table(name).ndim == 2 for name in NAMES)
    with pytest.raises(InputError, match="power2-4"):
        table("power2-9")
