"""Errors of a planted network, and a survey that is kept, extended and made again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from penjing.errors import InputError
from penjing.fit import survey as module
from penjing.fit.survey import Survey, error_of, survey
from penjing.fit.variant import Suffixes
from penjing.model import Batch, Model

Maker = Callable[..., Model]
Batches = Callable[..., list[Batch]]
FORMATS = ("int8", "fp32")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENJING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def planted(model: Model, index: int) -> Model:
    """Block `index` hardly changes its input: both of its residual branches are tiny."""
    block = model.module.get_submodule(model.blocks[index])
    with torch.no_grad():
        for layer in (block.attention.output.dense, block.output.dense):
            layer.weight.mul_(1e-3)
            layer.bias.zero_()
    return model


def run(model: Model, batches: list[Batch], limit: float = 1.0, **options: object) -> Survey:
    drops: list[Model] = []

    def drop_of(variant: Model) -> float:
        drops.append(variant)
        return 0.1 * (len(model.blocks) - len(variant.blocks))

    drop_of_ = options.pop("drop_of", drop_of)
    found = survey(
        model, batches[:1], batches[1:], drop_of_, FORMATS, limit=limit, seconds=60, **options
    )  # type: ignore[arg-type]
    found.drops = len(drops)  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("index", [1, 2])
def test_the_planted_block_costs_least(index: int, bert: Maker, batches: Batches) -> None:
    found = run(planted(bert(3), index), batches(2))
    assert set(found.cuts) == set("012")
    least = min(found.cuts, key=found.cuts.__getitem__)
    assert int(least) == index
    others = [v for k, v in found.cuts.items() if k != least]
    assert found.cuts[least] < 0.1 * min(others)
    assert found.ladder[0].cut == [index]


def test_what_is_measured(bert: Maker, batches: Batches) -> None:
    found = run(bert(3), batches(2))
    assert set(found.formats["int8"]) == set(found.widths) == set(found.heads) == set("012")
    assert "fp32" not in found.formats
    # Four bits cost more than eight, half a hidden layer more than eight bits.
    assert 0 < found.tables["e8"] < found.tables["e4"] < 0.5
    for key, error in found.formats["int8"].items():
        assert 0 < error < found.widths[key]
    # Sets grow by one, errors are of the whole set.
    assert [len(d.cut) for d in found.ladder] == [1, 2]
    assert set(found.ladder[0].cut) < set(found.ladder[1].cut)
    assert [d.drop for d in found.ladder] == pytest.approx([0.1, 0.2])


def test_a_second_survey_is_read(bert: Maker, batches: Batches) -> None:
    model, data = bert(2), batches(2)
    first, second = run(model, data), run(model, data)
    assert second.drops == 0  # type: ignore[attr-defined]
    assert second.evaluations == first.evaluations
    assert (second.cuts, second.ladder, second.formats) == (
        first.cuts, first.ladder, first.formats,
    )  # fmt: skip


def test_a_second_survey_runs_no_network(
    bert: Maker, batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = bert(2), batches(2)
    run(model, data)
    monkeypatch.setattr(Model, "run", lambda *_: pytest.fail("a network was run"))
    run(model, data)


def test_another_limit_extends_only_the_ladder(bert: Maker, batches: Batches) -> None:
    model, data = bert(4), batches(2)
    short = run(model, data, limit=0.05)
    assert len(short.ladder) == 1  # a drop of 0.1 is above the limit
    long = run(model, data, limit=1.0)
    assert len(long.ladder) == 3
    assert long.drops == 2  # type: ignore[attr-defined]
    assert long.ladder[0] == short.ladder[0]
    assert long.cuts == short.cuts
    # Two extensions at the second depth, and two at the third.
    assert long.evaluations == short.evaluations + 4


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"ladder": 3}', '{"ladder": [], "more": 1}', "\xff"]
)
def test_a_damaged_file_is_no_survey(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(text.encode("latin-1"))
    assert module._read(tmp_path / "s.json") == Survey()


def test_a_damaged_file_is_made_again(bert: Maker, batches: Batches, cache: Path) -> None:
    model, data = bert(2), batches(2)
    first = run(model, data)
    (path,) = cache.glob("survey-*.json")
    path.write_text(path.read_text()[:-9])
    again = run(model, data)
    assert again.drops > 0  # type: ignore[attr-defined]
    assert again.cuts == first.cuts
    assert json.loads(path.read_text())["cuts"] == first.cuts


def test_the_key_tells_everything_apart(bert: Maker, batches: Batches) -> None:
    def key(
        model: Model, data: list[Batch], formats: tuple[str, ...] = FORMATS, about: str = ""
    ) -> str:
        return module._key(model, data[:1], data[1:], formats, about)

    def turned(data: list[Batch]) -> list[Batch]:
        return [{n: t.reshape(-1, 6) for n, t in b.items()} for b in data]

    model, data = bert(2), batches(2)
    weights = bert(2)
    weights.module.encoder.layer[0].output.dense.weight.data[0, 0] += 1e-3
    fewer = bert(2)
    fewer.blocks = fewer.blocks[:1]
    keys = [
        key(model, data),
        key(weights, data),  # the same source, but edited
        key(fewer, data),
        key(model, batches(2, seed=5)),
        key(model, data[::-1]),
        key(model, turned(data)),  # the same bytes in another shape
        module._key(model, data, [], FORMATS, ""),  # the same batches, divided otherwise
        key(model, data, ("int8",)),
        key(model, data, about="perplexity"),
    ]
    assert len(set(keys)) == len(keys)
    assert key(bert(2), batches(2)) == keys[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert key(model, data) == keys[0]
    torch.set_num_threads(threads)


def test_the_error_is_one_minus_cosine(bert: Maker, batches: Batches) -> None:
    model, other, data = bert(1), bert(1), batches(2)
    other.module.encoder.layer[0].output.dense.weight.data.mul_(-1)
    with torch.no_grad():
        wanted = [model.run(b) for b in data]
        got = torch.cat([other.run(b) for b in data]).double().numpy()
        error = error_of(other, data, wanted)
    a = torch.cat(wanted).double().numpy()
    cosine = (a * got).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(got, axis=1)
    assert error == pytest.approx(1 - cosine.mean(), rel=1e-4)
    assert error > 0.01


def test_the_error_of_logits_is_kl_over_real_tokens(llama: Maker, batches: Batches) -> None:
    model, other = llama(layers=1), llama(layers=1)
    other.module.lm_head.weight.data.mul_(3)
    data = batches(1)
    data[0]["attention_mask"][:, 7:] = 0
    with torch.no_grad():
        wanted = [model.run(b) for b in data]
        error = error_of(other, data, wanted)
        p = wanted[0][:, :7].double().softmax(-1).numpy()
        q = other.run(data[0])[:, :7].double().softmax(-1).numpy()
    assert error == pytest.approx((p * np.log(p / q)).sum(-1).mean(), rel=1e-4)


def test_a_network_that_gives_nan_is_not_perfect(bert: Maker, batches: Batches) -> None:
    model, data = bert(1), batches(1)
    with torch.no_grad():
        wanted = [model.run(b) for b in data]
        model.module.encoder.layer[0].output.dense.weight.data[0, 0] = math.nan
        assert error_of(model, data, wanted) == math.inf


def test_infinite_errors_are_kept(tmp_path: Path) -> None:
    found = Survey(cuts={"0": math.inf}, complete=True)
    module._write(tmp_path / "s.json", found)
    assert module._read(tmp_path / "s.json") == found


def test_a_metric_that_fails_ends_the_ladder(bert: Maker, batches: Batches) -> None:
    def broken(_: Model) -> float:
        raise InputError("the model's output is not a number (NaN)")

    found = run(bert(2), batches(2), drop_of=broken)
    assert found.ladder == []
    assert len(found.cuts) == 2


def test_a_cache_that_cannot_be_made_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PENJING_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InputError, match="PENJING_CACHE"):
        module.cache_folder()


def test_a_survey_that_is_out_of_time_counts_the_rest_as_worst(
    bert: Maker, batches: Batches, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = bert(4), batches(2)
    whole = run(model, data)
    for path in cache.glob("survey-*.json"):
        path.unlink()
    now, seen = [0.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    real = Suffixes.enter

    def enter(self: object, unit: object) -> None:
        real(self, unit)  # type: ignore[arg-type]
        if unit.index is not None:  # type: ignore[attr-defined]
            seen.append(unit.index)  # type: ignore[attr-defined]
            now[0] += 1.0

    monkeypatch.setattr(Suffixes, "enter", enter)
    found = run(model, data, deadline=1.5)
    assert seen == [0, 1]
    assert not found.complete
    # The clock passes the deadline on the way into block 1: only block 0 is measured.
    assert set(found.widths) == set(found.cuts) == {"0"}
    assert found.formats["int8"] == dict.fromkeys("0123", whole.formats["int8"]["0"])
    # The sets of cut blocks have a time of their own, and what was measured to choose from.
    assert [depth.cut for depth in found.ladder] == [[0]]
    assert found.tables == whole.tables
    assert not list(cache.glob("survey-*.json"))


def test_a_survey_says_how_much_of_it_is_new(bert: Maker, batches: Batches) -> None:
    model, data = bert(3), batches(2)
    first = run(model, data, limit=0.05)
    assert first.fresh == first.evaluations > 0
    again = run(model, data, limit=0.05)
    assert (again.fresh, again.evaluations) == (0, first.evaluations)
    longer = run(model, data, limit=1.0)
    assert longer.fresh == longer.evaluations - first.evaluations == 2
