"""What each family of codes allows."""

import pytest

from penjing.errors import UsageError
from penjing.scheme import FAMILIES, Scheme

GOOD = [
    ("integer", 8), ("binary", 1), ("residual", 3), ("ternary", 1.6), ("ternary", 3.2),
    ("power2", 4), ("additive", 1.25), ("additive", 2), ("e8", 2), ("trellis", 2),
]  # fmt: skip
BAD = [
    ("integer", 1), ("integer", 2.0), ("binary", 0), ("residual", 9), ("ternary", 2),
    ("power2", 5), ("additive", 1.3), ("additive", 4.125), ("e8", True), ("trellis", "2"),
    ("trellis", 1.5), ("e8", 2.125),
]  # fmt: skip


def test_every_family_is_here() -> None:
    assert {family for family, _ in GOOD} == {family for family, _ in BAD} == set(FAMILIES)


@pytest.mark.parametrize(("family", "bits"), GOOD)
def test_good(family: str, bits: float) -> None:
    assert Scheme(bits, 64, codes=family, scale_bits=8).bits == bits


@pytest.mark.parametrize(("family", "bits"), BAD)
def test_bad_bits_say_what_is_allowed(family: str, bits: float) -> None:
    with pytest.raises(UsageError, match="bits") as error:
        Scheme(bits, codes=family)
    assert FAMILIES[family][1] in str(error.value)


@pytest.mark.parametrize(("family", "size"), [("additive", 8), ("e8", 8), ("trellis", 4)])
def test_a_group_is_of_whole_vectors(family: str, size: int) -> None:
    assert Scheme(2, 3 * size, codes=family).group == 3 * size
    with pytest.raises(UsageError, match=f"multiple of {size}"):
        Scheme(2, 3 * size + 1, codes=family)


def test_other_fields() -> None:
    for change in ({"codes": "decimal"}, {"scale_bits": 4}, {"scale_bits": 16.0}):
        with pytest.raises(UsageError, match=next(iter(change))):
            Scheme(4, **change)  # type: ignore[arg-type]
