"""Indices as text, and back."""

import random

import pytest

from penjing.indices import from_text, to_text


@pytest.mark.parametrize(
    ("indices", "text"),
    [([], ""), ([7], "7"), ([0, 1, 2, 3], "0-3"), ([0, 2, 3, 9], "0 2-3 9"), ([3, 1, 2], "3 1-2")],
)
def test_by_hand(indices: list[int], text: str) -> None:
    assert to_text(indices) == text
    assert from_text(text) == indices


def test_any_order_comes_back() -> None:
    draw = random.Random(0)
    for _ in range(200):
        indices = [draw.randrange(30) for _ in range(draw.randrange(40))]
        assert from_text(to_text(indices)) == indices


def test_what_is_no_such_text() -> None:
    for text in ("a", "1-b", "--", "0-99999999999"):
        with pytest.raises(ValueError, match=r"invalid literal|more than"):
            from_text(text)
