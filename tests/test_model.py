"""How a model is run, copied and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from penjing.edits import perform
from penjing.errors import InputError
from penjing.model import Model, Source, parent_of, pool
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import rtn
from penjing.recipe import Edit

SIZES: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32,
}  # fmt: skip


def source(**details: object) -> Source:
    return Source("test", "net", "", details)


def text(rows: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    ids = torch.randint(2, 50, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:, 3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_mean_pooling_by_hand() -> None:
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [100.0, 100.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert pool(hidden, mask, "mean").tolist() == [[2.0, 4.0]]
    assert pool(hidden, mask, "cls").tolist() == [[1.0, 2.0]]
    # A text of no tokens is no division by zero.
    assert torch.isfinite(pool(hidden, torch.zeros(1, 3), "mean")).all()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_an_embedding_leaves_padding_out(pooling: str) -> None:
    torch.manual_seed(0)
    module = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    batch = text()
    model = Model(module, "embedding", batch, source(pooling=pooling))
    with torch.no_grad():
        together = model.run(batch)
        hidden = module(**batch).last_hidden_state
        short = {n: t[1:, :3] for n, t in batch.items()}
        alone = model.run(short)
    kept = hidden[1, :3].mean(0) if pooling == "mean" else hidden[1, 0]
    torch.testing.assert_close(together[1], kept)
    torch.testing.assert_close(together[1], alone[0], atol=1e-5, rtol=1e-5)


def test_each_interface_gives_one_float32_tensor() -> None:
    batch = text()
    classifier = transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZES, num_labels=3)
    ).eval()
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    convolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 7))
    image = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    cases: list[tuple[Model, tuple[int, ...]]] = [
        (Model(classifier, "classifier", batch, source()), (2, 3)),
        (Model(llama, "causal", batch, source()), (2, 5, 50)),
        (Model(convolution, "image", image, Source("factory", "net", "")), (2, 7)),
    ]
    for model, shape in cases:
        with torch.no_grad():
            output = model.run(model.example)
        assert output.shape == shape
        assert output.dtype == torch.float32
    assert [m.is_image for m, _ in cases] == [False, False, True]
    with pytest.raises(InputError, match="cannot be run"):
        Model(nn.Linear(2, 2), "weights", {}, source()).run({})


def test_tensor_inputs_are_in_the_order_of_the_example() -> None:
    class Subtract(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a - b

    one, two = torch.ones(1, 2), torch.full((1, 2), 5.0)
    model = Model(Subtract(), "tensor", {"b": one, "a": two}, source())
    assert model.run({"a": one, "b": two}).tolist() == [[4.0, 4.0]]


def linear() -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4, bias=False))
    return Model(module, "tensor", {"x": torch.zeros(1, 8)}, source())


def quantized(model: Model, path: str, bits: int) -> IntegerPlanes:
    weight = model.module.get_parameter(path).detach()
    return rtn.fit(weight, Scheme(bits), None)


EDITS: list[Callable[[Model], None]] = [
    lambda m: m.module[0].weight.data.zero_(),
    lambda m: perform(m, Edit("quantize", "0.weight", quantized(m, "0.weight", 4), "")),
    lambda m: perform(m, Edit("mask", "1.weight", torch.zeros(4, 6, dtype=torch.bool), "")),
    lambda m: m.structure.append({"kind": "drop", "path": "0"}),
]


@pytest.mark.parametrize("edit", EDITS)
def test_a_copy_is_independent(edit: Callable[[Model], None]) -> None:
    model = linear()
    x = torch.randn(3, 8)
    before = model.run({"x": x}).detach().clone()
    edit(model.copy())
    assert torch.equal(model.run({"x": x}), before)
    assert (model.masks, model.planes, model.structure) == ({}, {}, [])


def test_a_copy_keeps_ties() -> None:
    module = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
    module[1].weight = module[0].weight
    model = Model(module, "tensor", {"x": torch.zeros(1, 1, dtype=torch.long)}, source())
    for one in (model, model.copy()):
        assert one.tied() == [("0.weight", "1.weight")]
        assert [n for n, _ in one.parameters()] == ["0.weight"]
    assert linear().tied() == []


def test_stored_bits_by_hand() -> None:
    model = linear()
    assert model.stored_bits() == 32.0
    perform(model, Edit("quantize", "0.weight", planes := quantized(model, "0.weight", 4), ""))
    codes = 6 * 8 * 4 // 8
    assert planes.stored_bytes >= codes + 6 * 4
    rest = 4 * (6 + 6 * 4)  # bias and the other layer
    expected = 8 * (planes.stored_bytes + rest) / (48 + 6 + 24)
    assert model.stored_bits() == pytest.approx(expected)
    assert np.isfinite(expected)


def test_stored_bits_of_a_pruned_weight_by_hand() -> None:
    module = nn.Sequential(nn.Linear(64, 32))
    model = Model(module, "tensor", {"x": torch.zeros(1, 64)}, source())
    mask = torch.ones(32, 64, dtype=torch.bool)
    mask[:, :48] = False
    perform(model, Edit("mask", "0.weight", mask, ""))
    assert model.stored_bytes("0.weight") == 32 * 64 // 8 + 32 * 16 * 4
    assert model.stored_bytes("0.bias") == 32 * 4
    assert model.stored_bits() == 8 * (256 + 2048 + 128) / (32 * 64 + 32)


def test_parents() -> None:
    model = linear()
    assert parent_of(model.module, "0.weight") == (model.module[0], "weight")
    assert parent_of(model.module, "1") == (model.module, "1")
    assert model.device == torch.device("cpu")
