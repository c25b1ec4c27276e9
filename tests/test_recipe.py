"""Recipes survive TOML; wrong ones are refused with the part that is wrong."""

import tomllib
from dataclasses import dataclass
from typing import ClassVar

import pytest

from penjing.errors import InputError
from penjing.recipe import Recipe


@dataclass(frozen=True)
class Cut:
    name: ClassVar[str] = "cut"
    layers: int = 1
    patch: str | None = None
    targets: tuple[str, ...] = ("*",)


@dataclass(frozen=True)
class Quantize:
    name: ClassVar[str] = "quantize"
    bits: int = 8
    ratio: float = 0.5
    symmetric: bool = False


STEPS = {"cut": Cut, "quantize": Quantize}


def test_roundtrip_keeps_order_types_and_seed() -> None:
    recipe = Recipe(
        (
            Cut(2, targets=("encoder.*", 'odd "name"\n')),
            Quantize(4, 0.1, True),
            Cut(patch="linear"),
        ),
        seed=7,
    )
    assert Recipe.from_toml(recipe.to_toml(), STEPS) == recipe


def test_the_toml_is_what_the_documents_show() -> None:
    table = tomllib.loads(Recipe((Quantize(),), 3).to_toml())
    assert table == {
        "seed": 3,
        "step": [{"do": "quantize", "bits": 8, "ratio": 0.5, "symmetric": False}],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[", "not TOML"),
        ("", "no .*step"),
        ("seed = 1", "no .*step"),
        ('[[step]]\ndo = "burn"', "unknown step 1.*got burn.*allowed: cut, quantize"),
        ("[[step]]\nbits = 4", "unknown step 1"),
        ('[[step]]\ndo = "cut"\nlayer = 4', "cut has no option layer.*layers"),
    ],
)
def test_wrong_recipes(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.from_toml(text, STEPS)


def test_an_unedited_networks_recipe_is_read() -> None:
    text = Recipe((), seed=4).to_toml()
    assert Recipe.from_toml(text, STEPS) == Recipe((), seed=4)
