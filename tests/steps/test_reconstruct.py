"""Block reconstruction: nearer to what the block gave, on samples not trained on."""

from __future__ import annotations

import sys
from collections.abc import Callable
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


ARRAYS = net.arrays(40)


def _made(model: Model, step: Quantize, batches: list[net.Batch] | None = None) -> Applied:
    given = ARRAYS[:32] if "x" in model.example else _texts(0, 24)
    return apply(model, Recipe((step,)), batches or given)


def _error(found: Model, model: Model) -> float:
    """Squared error of the output on samples not calibrated on, padding left out."""
    total = 0.0
    for batch in ARRAYS[32:] if "x" in model.example else _texts(100, 4):
        with torch.no_grad():
            left = (found.run(batch) - model.run(batch)).square()
        shown = batch["attention_mask"].bool() if model.interface == "causal" else ...
        total += float(left[shown].mean())
    return total


@pytest.mark.parametrize(
    ("make", "step", "share"),
    [
        (net.stack, TWO, 0.8),
        (net.stack, replace(TWO, bits=3), 0.7),
        (net.stack, replace(TWO, group=0, rotate=True), 0.95),
        (net.stack, replace(TWO, group=0, codes="binary"), 0.9),
        (net.bert, replace(TWO, group=0, codes="binary"), 0.98),
        (net.llama, replace(TWO, method="rtn"), 0.9),
    ],
)
def test_less_error_on_samples_not_seen(
    make: Callable[[], Model], step: Quantize, share: float
) -> None:
    model = make()
    plain, refined = _made(model, step), _made(model, replace(step, refine=64))
    assert _error(refined.model, model) < share * _error(plain.model, model)


def test_what_is_stored_is_what_runs() -> None:
    """Codes within their bits, and weights that are those of the planes."""
    model = net.stack()
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
    model = net.stack()
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
    step = replace(TWO, method="rtn", refine=10, targets=("*.mlp.*",))
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
    model = net.stack()
    plain, found = _made(model, TWO).model, _made(model, replace(TWO, refine=20)).model
    assert net.same(plain, found)


def test_not_beside_8_bit_inputs() -> None:
    with pytest.raises(UsageError, match="refine"):
        Quantize(8, symmetric=True, activations=8, refine=10)
