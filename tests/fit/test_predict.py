"""Predicted sizes against the files that are really written; the rest by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from penjing.apply import apply
from penjing.fit.predict import Predictor, stored
from penjing.fit.space import FORMATS, Choice, recipe_of
from penjing.fit.survey import Depth, Survey
from penjing.measure import stored_size
from penjing.model import Model
from penjing.writers import onnx

Maker = Callable[..., Model]

LATENCIES = {"fp32": 8.0, "int8": 2.0, "w8": 4.0, "w4": 3.0}


def predictor_of(model: Model, survey: Survey | None = None, slope: float = 2.0) -> Predictor:
    return Predictor(model, survey or Survey(), LATENCIES, slope)


def uniform(model: Model, name: str, table: str, cut: tuple[int, ...] = ()) -> Choice:
    count = len(model.blocks)
    return Choice(cut, (1.0,) * count, (name,) * count, table, name)


def written(model: Model, choice: Choice, folder: Path, batches: list) -> int:
    structural, numbers = recipe_of(model, choice, method="rtn")
    edited = apply(apply(model, structural, batches).model, numbers, batches).model
    onnx.write(edited, folder / "model.onnx")
    return stored_size(folder / "model.onnx")


@pytest.mark.parametrize(
    ("name", "table", "cut"), [("int8", "e8", ()), ("int8", "e4", (1,)), ("w4", "fp32", ())]
)
def test_size_of_an_encoder(
    name: str, table: str, cut: tuple[int, ...], bert: Maker, batches: Callable, tmp_path: Path
) -> None:
    model = bert(2, 192, 3000)
    choice = uniform(model, name, table, cut)
    said = predictor_of(model)(choice).size
    # A linear patch of 192 x 192 may stand in for what was cut.
    spare = 4 * 192 * 193 if cut else 0
    got = written(model, choice, tmp_path, batches(1))
    assert 0.9 * got - spare <= said <= 1.1 * got


@pytest.mark.parametrize(("name", "table"), [("w8", "e8"), ("w4", "fp32")])
def test_size_of_a_decoder_whose_head_is_its_table(
    name: str, table: str, llama: Maker, batches: Callable, tmp_path: Path
) -> None:
    model = llama(True, 1, 192, 3000)
    choice = uniform(model, name, table)
    got = written(model, choice, tmp_path, batches(1))
    assert predictor_of(model)(choice).size == pytest.approx(got, rel=0.1)


def test_a_tied_head_is_counted_once(llama: Maker) -> None:
    tied, apart = (predictor_of(llama(tied)).plain.size for tied in (True, False))
    assert apart - tied == 4 * 600 * 32
    model = llama(True)
    assert tied == 4 * sum(p.numel() for _, p in model.parameters())


def test_bytes_of_a_layer_by_hand() -> None:
    # [48, 96]: 8-bit codes, one float32 scale a row, the zero point is known.
    assert stored(48 * 96, 96, "int8") == 48 * 96 + 48 * 4
    # Groups of 64: two a row, filled up; a scale and a zero point each.
    assert stored(48 * 96, 96, "w8") == 48 * 2 * (64 + 4 + 1)
    assert stored(48 * 96, 96, "w4") == 48 * 2 * (32 + 4 + 0.5)
    assert stored(48 * 96, 96, "fp32") == 4 * 48 * 96


def test_small_tables_stay_as_they_are(bert: Maker) -> None:
    small, large = predictor_of(bert(1, 16, 100)), predictor_of(bert(1, 32, 600))
    assert small.table_size("e4") == small.table_size("fp32")
    # 600 x 32 words are quantized in groups of 32; positions (64) and types (2) are too few.
    words = 600 * (16 + 4 + 0.5)
    assert large.table_size("e4") == words + 4 * 32 * (64 + 2)


def test_latency_of_the_plain_network_is_what_was_measured(bert: Maker) -> None:
    predictor = predictor_of(bert(3))
    assert predictor.plain.latency == pytest.approx(8.0)
    assert predictor(uniform(predictor.model, "int8", "fp32")).latency == pytest.approx(2.0)
    # Three equal blocks and a twentieth for the rest.
    one_cut = predictor(uniform(predictor.model, "fp32", "fp32", (1,))).latency
    assert one_cut == pytest.approx(8.0 * (0.05 + 0.95 * 2 / 3))


def test_errors_add_and_the_ladder_counts_for_its_cut(bert: Maker) -> None:
    survey = Survey(
        widths={"0": 0.1, "1": 0.4, "2": 0.4},
        heads={"2": 0.06},
        formats={"int8": {"0": 0.01, "1": 0.02, "2": 0.04}},
        tables={"e8": 0.001},
        rest={"int8": 0.005},
        ladder=[Depth([1], 0.3, 0.02), Depth([1, 2], 0.5, -0.01)],
    )
    predictor = predictor_of(bert(3), survey, slope=2.0)
    choice = Choice((1,), (0.5, 1.0, 0.75), ("int8", "int8", "int8"), "e8", "int8")
    said = predictor(choice)
    # Half the width costs what was measured, a quarter a fourth of it.
    own = 0.001 + 0.005 + (0.01 + 0.1) + (0.04 + 0.4 / 4)
    assert said.error == pytest.approx(own + 0.3)
    assert said.drop == pytest.approx(2.0 * own + 0.02)
    # Distillation mends what cuts and narrower blocks cost, not what rounding does.
    predictor.remains = 0.5
    heads = replace(choice, heads=(1.0, 1.0, 0.5))
    left = 0.001 + 0.005 + 0.01 + 0.04 + 0.5 * (0.1 + 0.4 / 4 + 0.06)
    assert predictor(heads).error == pytest.approx(own + 0.06 + 0.3)
    assert predictor(heads).drop == pytest.approx(2.0 * left + 0.5 * 0.02)
    # A gain by chance is not spent.
    deeper = Choice((1, 2), (1.0,) * 3, ("fp32",) * 3, "fp32", "fp32")
    assert predictor(deeper).drop == 0.0
    assert predictor(deeper).error == pytest.approx(0.5)


def test_a_width_that_cannot_be_has_no_finite_error(bert: Maker) -> None:
    assert predictor_of(bert(1)).block_error(0, 0.5, "fp32") == float("inf")


def test_corrections_make_the_prediction_what_was_measured(bert: Maker) -> None:
    predictor = predictor_of(bert(3))
    choice = uniform(predictor.model, "int8", "fp32")
    other = uniform(predictor.model, "fp32", "fp32")
    before, beside = predictor(choice), predictor(other)
    predictor.correct(choice, 1.2 * before.size, 0.5 * before.latency)
    for _ in range(2):
        assert predictor(choice).size == pytest.approx(1.2 * before.size)
        assert predictor(choice).latency == pytest.approx(0.5 * before.latency)
        assert predictor(other).size == pytest.approx(1.2 * beside.size)
        # Learning the same again changes nothing.
        predictor.correct(choice, 1.2 * before.size, 0.5 * before.latency)


def test_every_format_has_a_size(bert: Maker) -> None:
    predictor = predictor_of(bert(2))
    sizes = [predictor.block_size(0, 1.0, name) for name in ("w4", "int8", "w8", "fp32")]
    assert sizes == sorted(sizes)
    assert set(FORMATS) == set(LATENCIES)


def test_what_distillation_leaves_of_a_cut(bert: Maker) -> None:
    model = bert(3)
    survey = Survey(ladder=[Depth([1], 0.3, 0.08), Depth([0, 1], 0.5, -0.02)])
    predictor = predictor_of(model, survey)
    choice = uniform(model, "fp32", "fp32", (1,))
    assert predictor(choice).drop == pytest.approx(0.08)
    predictor.remains = 0.25
    assert predictor(choice).drop == pytest.approx(0.02)
    assert predictor.drop_of((0, 1)) == 0.0


def test_memory_as_a_line_over_size(bert: Maker) -> None:
    model = bert(2)
    predictor = Predictor(model, Survey(), LATENCIES, 1.0, memory=(60e6, 1.5))
    # 60 MB without a file, 1.5 bytes for each of its bytes: 90 MB are enough for 20 MB.
    assert predictor.size_within(90e6) == pytest.approx(20e6)
    assert predictor.size_within(50e6) < 0
    # A file of 10 MB took 80 MB: 65 MB are there without it.
    choice = uniform(model, "fp32", "fp32")
    predictor.correct(choice, 10_000_000, 1.0, 80_000_000)
    assert predictor.size_within(95e6) == pytest.approx(20e6)


def test_the_mlp_is_two_thirds_of_a_block_and_the_heads_one(bert: Maker) -> None:
    predictor = predictor_of(bert(2))
    for figure in (predictor.block_size, predictor.block_latency):
        whole = figure(0, 1.0, "int8")
        # A quarter of 2/3, and half of 1/3.
        assert figure(0, 0.25, "int8") == pytest.approx(whole * (1 / 6 + 1 / 3))
        assert figure(0, 1.0, "int8", 0.5) == pytest.approx(whole * (2 / 3 + 1 / 6))
