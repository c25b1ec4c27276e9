"""Curves of training in the report, and the way they come there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.model import Model
from penjing.progress import sparkline
from penjing.recipe import Recipe
from penjing.report.curves import curves
from penjing.steps._recovery import curve_of
from penjing.steps.prune import Prune
from penjing.steps.recover import Recover
from penjing.writers.artifact import save


def _run(journal: Path | None = None) -> Model:
    step = Recover(seconds=0, steps=150, lr=3e-3)
    recipe = Recipe((Prune(0.7, "magnitude"), step))
    return apply(net.stack(), recipe, net.arrays(9), journal=journal).model


def test_a_curve_is_means_of_parts() -> None:
    assert curve_of([3.0, 1.0]).tolist() == [3, 1]
    found = curve_of([float(i) for i in range(400)])
    assert len(found) == 100
    assert found[:2].tolist() == [1.5, 5.5]


def test_bars_fall_as_the_loss_does() -> None:
    assert sparkline([]) == ""
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([7.0, 6, 5, 4, 3, 2, 1, 0]) == "█▇▆▅▄▃▂▁"
    assert sparkline([8.0, 6, 1, 1, 0, 0], 3) == "█▂▁"


def test_training_leaves_its_curve_in_the_model_the_journal_and_the_file(tmp_path: Path) -> None:
    model = _run(tmp_path / "journal")
    (curve,) = model.curves
    assert curve["step"] == "recover"
    assert "150 steps" in curve["why"]
    assert len(curve["losses"]) == 100
    assert curve["losses"][-1] < 0.5 * curve["losses"][0]
    assert _run(tmp_path / "journal").curves == model.curves  # read back
    assert model.copy().curves == model.curves
    save(model, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["metrics"]["curves"] == model.curves


def test_a_picture_has_every_point_and_no_markup_of_others() -> None:
    page = curves([{"step": "recover", "why": "<b>7 steps</b>", "losses": [4.0, 2.0, 1.5, 1.0]}])
    assert "<h2>Training</h2>" in page
    assert "<b>" not in page
    (path,) = re.findall(r'class="front" d="M([^"]+)"', page)
    points = [tuple(map(float, point.split())) for point in path.split(" L")]
    assert len(points) == 4
    assert [x for x, _ in points] == pytest.approx([64, 252, 440, 628])
    heights = [y for _, y in points]
    assert heights == sorted(heights)  # falls as the loss does


@pytest.mark.parametrize("losses", [[], [1.0], ["x"], [float("nan")] * 3])
def test_nothing_is_drawn_of_nothing(losses: list[object]) -> None:
    assert curves([{"step": "recover", "why": "", "losses": losses}]) == ""
    assert curves([]) == ""
