"""Scores of attention against what the networks say themselves when they are asked for it."""

from typing import Any

import pytest
import torch
from tests.networks import bert, llama, resnet, text_batch, vit
from torch import nn

from penjing.errors import UsageError
from penjing.features.attention_maps import loss
from penjing.model import Model
from penjing.transferring.maps import check_maps, mapped


def told(model: Model, batch: Any) -> list[torch.Tensor]:
    """Probabilities [batch, heads, places, places] by block, as transformers gives them."""
    model.module.set_attn_implementation("eager")
    with torch.no_grad():
        output = model.module(**batch, output_attentions=True)
    model.module.set_attn_implementation("sdpa")
    return list(output.attentions)


@pytest.mark.parametrize("make", [bert, llama, vit])
def test_fused_attention_gives_what_a_written_out_one_says(make: Any) -> None:
    model = make()
    batch = model.example if make is vit else text_batch()
    wanted = told(model, batch)
    assert model.module.config._attn_implementation == "sdpa"
    with torch.no_grad(), mapped(model, model.blocks) as states:
        model.run(batch)
    there = batch.get("attention_mask")
    for (scores,), probabilities in zip(states, wanted, strict=True):
        found = scores.softmax(-1).transpose(1, 2)
        if there is not None:  # rows of padding are nobody's
            found, probabilities = (x.transpose(1, 2)[there.bool()] for x in (found, probabilities))
        assert torch.allclose(found, probabilities, atol=1e-5)


def test_a_written_out_attention_is_seen_too() -> None:
    model, batch = bert(), text_batch()
    with torch.no_grad(), mapped(model, model.blocks) as fused:
        model.run(batch)
    model.module.set_attn_implementation("eager")
    with torch.no_grad(), mapped(model, model.blocks) as plain:
        model.run(batch)
    for one, two in zip(fused, plain, strict=True):
        assert torch.allclose(one[0].softmax(-1), two[0].softmax(-1), atol=1e-5)


def test_a_block_can_be_asked_for_twice() -> None:
    model = bert()
    first, _, last = model.blocks
    with torch.no_grad(), mapped(model, [last, first, last]) as states:
        model.run(model.example)
    assert torch.equal(states[0][0], states[2][0])
    assert not torch.equal(states[0][0], states[1][0])


def test_the_students_scores_have_a_slope_and_queries_come_nearer() -> None:
    teacher, student = bert(), bert()
    query = student.module.encoder.layer[0].attention.self.query
    with torch.no_grad():
        noise = torch.randn(query.weight.shape, generator=torch.Generator().manual_seed(3))
        query.weight.add_(0.2 * noise)
    parameter = nn.Parameter(query.weight.detach().clone())
    query.weight = parameter
    values = []
    optimizer = torch.optim.Adam([parameter], lr=0.02)
    for _ in range(30):
        with mapped(student, student.blocks) as own:
            student.run(student.example)
        with torch.no_grad(), mapped(teacher, teacher.blocks) as theirs:
            teacher.run(student.example)
        value = loss(own[0][0], theirs[0][0], student.example["attention_mask"].bool())
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        values.append(float(value.detach()))
    assert values[-1] < 0.5 * values[0]


def test_no_attention_is_an_error() -> None:
    with pytest.raises(UsageError, match="attention in every block"):
        check_maps(resnet())
