"""Recipes in which what goes is learned: complete ones alone, from the verbs and by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
import penjing
from penjing.data import Dataset
from penjing.errors import InputError, UsageError
from penjing.learning import check_learned, learning
from penjing.recipe import Recipe
from penjing.steps.constrain import Constrain
from penjing.steps.cut import Cut
from penjing.steps.prune import Prune
from penjing.steps.recover import Recover
from penjing.steps.shrink import Shrink

PRUNE, SHRINK, CUT = (step(criterion="learned") for step in (Prune, Shrink, Cut))
DATA = Dataset("arrays", tuple({"x": x[:5].numpy()} for b in net.arrays() for x in b["x"]))


def test_whole_recipes_pass() -> None:
    check_learned(Recipe((Prune(0.5), Recover(), Cut(1))))
    check_learned(Recipe((Constrain(of="weights"), PRUNE, Recover())))
    check_learned(Recipe((Constrain(of="layers"), CUT, Constrain(), SHRINK)))


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((SHRINK,), "shrink with the criterion learned; next: put constrain before it"),
        ((Constrain(),), "put shrink with the criterion learned right after it"),
        ((Constrain(), CUT), "put shrink with"),
        ((Constrain(of="layers"), Recover(), CUT), "put cut with"),
        ((Constrain(of="weights"), Constrain(), SHRINK), "put prune with"),
        ((Constrain(), SHRINK, SHRINK), "put constrain before it"),
    ],
)
def test_parts_are_refused(steps: tuple[object, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_learned(Recipe(steps))
    with pytest.raises(UsageError, match=said):
        penjing.apply(net.stack(), Recipe(steps), DATA)


def test_options_are_taken_apart() -> None:
    options = {"steps": 7, "weights_lr": 1e-4, "length": 32}
    recipe = learning("lasso", "neurons", 0.3, SHRINK, 5, options, measure="macs")
    wanted = Constrain(0.3, "neurons", "macs", "lasso", steps=7, weights_lr=1e-4, seed=5)
    assert recipe == Recipe((wanted, SHRINK), 5)
    assert options == {"length": 32, "samples": 512}


def test_the_verbs() -> None:
    model = net.stack(4)
    pruned = penjing.prune(model, 0.6, learn="gates", steps=5, data=DATA)
    zeros = sum(int((~mask).sum()) for mask in pruned.masks.values())
    assert zeros / sum(m.numel() for m in pruned.masks.values()) == pytest.approx(0.6, abs=0.01)
    small = penjing.shrink(
        model, 0.3, of="parameters", learn="lasso", criterion="magnitude", steps=5, data=DATA
    )
    assert 1 - small.parameter_count / model.parameter_count == pytest.approx(0.3, abs=0.01)
    for way in ({"layers": 2}, {"layers": 0.5}, {"ratio": 0.5}):
        short = penjing.cut(model, **way, learn="gates", steps=5, data=DATA)  # type: ignore[arg-type]
        assert len(short.blocks) == 2
    assert short.recipe is not None
    assert [step.name for step in short.recipe.steps] == ["constrain", "cut"]


def test_trained_along_there_is_no_patch() -> None:
    model = net.stack(4)
    for rate, kinds in ((0.0, {"patch", "drop"}), (1e-3, {"drop"})):
        short = penjing.cut(model, 1, learn="gates", steps=5, weights_lr=rate, data=DATA)
        assert {entry["kind"] for entry in short.structure} == kinds


def test_labels_reach_the_training() -> None:
    model = net.vit(2)
    pictures = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0)).numpy()
    samples = tuple({"pixel_values": p} for p in pictures)
    data = Dataset("arrays", samples, np.arange(20) % 5, path="pictures")
    small = penjing.shrink(model, 0.3, learn="gates", loss="labels", steps=3, data=data)
    assert small.parameter_count < model.parameter_count
    with pytest.raises(InputError, match="a class for every sample"):
        penjing.shrink(
            model, 0.3, learn="gates", loss="labels", steps=3, data=Dataset("arrays", samples)
        )
    wrong = Dataset("arrays", samples, np.arange(20), path="pictures")
    with pytest.raises(InputError, match="labels outside the model's classes"):
        penjing.shrink(model, 0.3, learn="gates", loss="labels", steps=3, data=wrong)


def test_refusals() -> None:
    model = net.stack()
    with pytest.raises(UsageError, match="a pattern that is learned; got 2:4"):
        penjing.prune(model, pattern="2:4", learn="gates", data=DATA)
    with pytest.raises(UsageError, match="a constraint that is learned needs data"):
        penjing.prune(model, 0.5, learn="gates")
    with pytest.raises(UsageError, match="shrink needs data"):
        penjing.shrink(model, 0.5, learn="gates")
    with pytest.raises(UsageError, match="heads, of a constraint that is learned"):
        penjing.shrink(model, 0.5, heads=0.2, learn="gates", data=DATA)
    with pytest.raises(
        UsageError, match=r"unknown name in constraints; got 'dropout'; allowed: ga"
    ):
        penjing.shrink(model, 0.5, learn="dropout", data=DATA)
    with pytest.raises(UsageError, match="criterion that gates of weights start from; got admm"):
        penjing.prune(model, 0.5, learn="gates", criterion="admm", data=DATA)
