"""What a network is drawn to, against torch's own losses."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing.errors import UsageError
from penjing.gradients import LABELS
from penjing.objective import Objective, products


def test_labels_of_a_classifier_are_compared_by_cross_entropy() -> None:
    model = net.vit()
    batch = {**model.example, LABELS: torch.tensor([3, 1])}
    with torch.no_grad():
        chances = model.run(batch).softmax(-1)
    wanted = -float((chances[0, 3].log() + chances[1, 1].log()) / 2)
    assert Objective(model, LABELS).exact(model, batch) == pytest.approx(wanted, rel=1e-5)


def test_labels_of_a_language_model_are_its_next_tokens() -> None:
    model, batch = net.llama(1), net.text_batch(2)
    with torch.no_grad():
        chances = model.run(batch).log_softmax(-1)
    found = []
    for row, ids in enumerate(batch["input_ids"].tolist()):
        length = int(batch["attention_mask"][row].sum())
        found += [float(chances[row, place - 1, ids[place]]) for place in range(1, length)]
    wanted = -sum(found) / len(found)
    assert Objective(model, LABELS).exact(model, batch) == pytest.approx(wanted, rel=1e-5)


def test_the_original_is_at_distance_zero_of_itself() -> None:
    for model, batch in ((net.bert(1), net.text_batch(1)), (net.llama(1), net.text_batch(1))):
        far = Objective(model)
        assert far.exact(model, batch) == pytest.approx(0, abs=1e-5)
        with torch.no_grad():
            assert float(far(model, batch)) == pytest.approx(0, abs=1e-3)


def test_labels_that_are_not_there_are_said() -> None:
    model = net.vit()
    with pytest.raises(UsageError, match="the loss labels; got no labels"):
        Objective(model, LABELS)(model, model.example)
    stack = net.stack()
    batch = {**stack.example, LABELS: torch.tensor([0, 1])}
    with pytest.raises(UsageError, match=r"got labels, outputs \[2, 5, 4\]"):
        Objective(stack, LABELS)(stack, batch)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_float32_where_products_are_bfloat16(masked: bool) -> None:
    """Its gradients are those of the same formula in float64, to the last bits of bfloat16's."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, generator=draw).bfloat16() for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool).tril() if masked else None
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    with products("bfloat16", "cpu"):
        made = nn.functional.scaled_dot_product_attention(*given, attn_mask=mask)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert made.dtype == torch.bfloat16
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    scores = exact[0] @ exact[1].transpose(-1, -2) / 8**0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    wanted = scores.softmax(-1) @ exact[2]
    torch.testing.assert_close(made.double(), wanted, rtol=2**-8, atol=1e-6)
    slope = torch.randn(made.shape, generator=draw).bfloat16()
    made.backward(slope)
    wanted.backward(slope.double())
    for a, b in zip(given, exact, strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=2**-7, atol=1e-5)
