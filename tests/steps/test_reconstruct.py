"""Block reconstruction: nearer to what the block gave, on samples not trained on."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import Applied, apply
from penjing.errors import UsageError
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps.prune import Prune
from penjing.steps.quantize import Quantize

TWO = Quantize(2, group=8, symmetric=False)


def _texts(first: int, count: int) -> list[net.Batch]:
    return [net.text_batch(seed=first + n, samples=8) for n in range(count)]


def _made(model: Model, step: Quantize, count: int = 6) -> Applied:
    return apply(model, Recipe((step,)), _texts(0, count))


def _error(found: Model, model: Model) -> float:
    """Mean squared error of the output on texts not calibrated on, padding left out."""
    total = 0.0
    for batch in _texts(100, 4):
        with torch.no_grad():
            left = (found.run(batch) - model.run(batch)).square()
        total += float(left[batch["attention_mask"].bool()].mean() if left.ndim == 3 else left.mean())
    return total


@pytest.mark.parametrize("make", [net.llama, net.bert])
@pytest.mark.parametrize("codes", ["integer", "binary"])
def test_less_error_on_texts_not_seen(make: object, codes: str) -> None:
    model = make()  # type: ignore[operator]
    step = replace(TWO, codes=codes)
    plain, refined = _made(model, step), _made(model, replace(step, refine=100))
    assert _error(refined.model, model) < 0.8 * _error(plain.model, model)


def test_what_is_stored_is_what_runs() -> None:
    """Codes within their bits, and weights that are those of the planes."""
    model = net.llama()
    plain, found = _made(model, TWO), _made(model, replace(TWO, refine=30))
    turned = 0
    for name, planes in found.model.planes.items():
        assert int(planes.codes.max()) <= 3
        assert planes.stored_bytes == plain.model.planes[name].stored_bytes
        assert torch.equal(found.model.module.get_parameter(name), planes.dequantize())
        turned += int((planes.codes != plain.model.planes[name].codes).sum())
    assert turned
    why = [d.why for d in found.done if d.why.startswith("30 steps")]
    assert why
    assert all("held-out error" in w for w in why)


def test_the_same_again_and_the_given_network_stays() -> None:
    model = net.bert()
    before = net.state(model)
    first, second = (_made(model, replace(TWO, refine=10)).model for _ in range(2))
    assert net.same(first, second)
    assert all(torch.equal(value, before[name]) for name, value in net.state(model).items())
    assert not any(p.grad is not None for p in model.module.parameters())


def test_removed_connections_stay_removed() -> None:
    model = apply(net.llama(), Recipe((Prune(0.5, "magnitude"),))).model
    found = _made(model, replace(TWO, refine=10)).model
    assert found.masks
    for name, mask in found.masks.items():
        assert not found.module.get_parameter(name)[~mask].any()


def test_only_targets_and_norms_move() -> None:
    model = net.llama()
    step = replace(TWO, refine=10, targets=("*.mlp.*",))
    found = _made(model, step).model
    for name, parameter in found.module.named_parameters():
        moved = not torch.equal(parameter, model.module.get_parameter(name))
        allowed = ".mlp." in name or (".layers." in name and parameter.ndim == 1)
        assert allowed or not moved
        if ".mlp." in name:
            assert moved


def test_steps_that_do_not_help_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate that throws the weights about, held-out samples refuse every block."""
    from penjing.steps import _reconstruct

    monkeypatch.setattr(_reconstruct, "_SCALES", 30.0)
    model = net.llama()
    plain, found = _made(model, TWO).model, _made(model, replace(TWO, refine=20)).model
    assert net.same(plain, found)


def test_round_to_nearest_can_be_refined() -> None:
    model = net.bert()
    step = replace(TWO, method="rtn")
    plain, refined = _made(model, step), _made(model, replace(step, refine=100))
    assert _error(refined.model, model) < 0.7 * _error(plain.model, model)


def test_not_beside_8_bit_inputs() -> None:
    with pytest.raises(UsageError, match="refine"):
        Quantize(8, symmetric=True, activations=8, refine=10)
