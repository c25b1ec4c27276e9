"""Counts against torch's own flop counter, hand-computed values and a brute-force live set."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from penjing.errors import InputError, UsageError
from penjing.inspect import inspect, left_alone, sized_batch
from penjing.model import Interface, Model, Source
from penjing.planes import IntegerPlanes

transformers = pytest.importorskip("transformers")


def model_of(module: nn.Module, interface: Interface, **example: torch.Tensor) -> Model:
    source = Source("huggingface", "x", "0")
    return Model(module=module.eval(), interface=interface, example=example, source=source)


def encoder() -> Model:
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=40,
    )  # fmt: skip
    tokens = torch.arange(12).reshape(2, 6)
    return model_of(
        transformers.BertModel(config, add_pooling_layer=False),
        "embedding",
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
    )


def decoder() -> Model:
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, intermediate_size=40, max_position_embeddings=64,
        tie_word_embeddings=True,
    )  # fmt: skip
    tokens = torch.arange(8).reshape(1, 8)
    return model_of(
        transformers.LlamaForCausalLM(config),
        "causal",
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
    )


def convolutional() -> Model:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ConvTranspose2d(8, 4, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    return model_of(module, "tensor", pixel_values=torch.zeros(1, 3, 16, 16))


def torch_layer() -> Model:
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    return model_of(layer, "tensor", x=torch.zeros(1, 5, 16))


@pytest.mark.parametrize("build", [encoder, decoder, convolutional, torch_layer])
def test_macs_agree_with_torchs_flop_counter(build: Callable[[], Model]) -> None:
    model = build()
    found = inspect(model, batch=3, length=20, latency=False)
    inputs = {
        name: torch.ones(3, 20, dtype=torch.long)
        if value.dtype == torch.long
        else torch.zeros(3, *value.shape[1:])
        for name, value in model.example.items()
    }
    # Torch's counter knows neither the CPU's fused attention nor its fused transformer layer.
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    plain = sdpa_kernel(SDPBackend.MATH)
    try:
        with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
            model.run(inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    assert found.totals.macs == counter.get_total_flops() // 2
    assert found.totals.macs == sum(layer.macs for layer in found.layers)
    assert found.totals.parameters == sum(p.numel() for p in model.module.parameters())


def test_macs_by_hand() -> None:
    layers = {layer.name: layer for layer in inspect(convolutional(), batch=2).layers}
    assert layers["0"].macs == 2 * 8 * 8 * 8 * (3 * 9)  # batch, out, height, width, in * kernel
    assert layers["3"].macs == 2 * 8 * 8 * 8 * (1 * 9)  # depthwise: one input each
    assert layers["4"].macs == 2 * 8 * 8 * 8 * (4 * 4)  # in * height * width, out * kernel
    assert layers["7"].macs == 2 * 4 * 5
    assert layers["1"].macs == 0
    assert layers["1"].parameters == 16
    assert "2" not in layers


def test_attention_products_belong_to_the_attention() -> None:
    found = inspect(encoder(), batch=2, length=10, latency=False)
    attention = [layer for layer in found.layers if layer.macs and not layer.parameters]
    assert len(attention) == 2
    assert all("attention" in layer.name for layer in attention)
    # heads * queries * keys * (width of q + width of v), twice the samples
    assert [layer.macs for layer in attention] == [2 * 4 * 10 * 10 * (8 + 8)] * 2


def test_recurrent_by_hand() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 5, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0]

    found = inspect(model_of(Last(), "tensor", x=torch.zeros(1, 7, 6)), batch=3, latency=False)
    assert found.totals.macs == 3 * 7 * 4 * 5 * (6 + 5)


def test_peak_memory_of_a_chain_by_hand() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(10, 1000, bias=False)
            self.narrow = nn.Linear(1000, 10, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.narrow(self.wide(x))

    found = inspect(model_of(Chain(), "tensor", x=torch.zeros(1, 10)), batch=4, latency=False)
    wide, narrow = found.layers
    assert wide.peak_memory_bytes == 4 * (4 * 10 + 4 * 1000)
    assert narrow.peak_memory_bytes == 4 * (4 * 10 + 4 * 1000 + 4 * 10)
    assert found.totals.peak_memory_bytes == narrow.peak_memory_bytes


def test_freed_tensors_do_not_add_up() -> None:
    deep = nn.Sequential(*(nn.Linear(64, 64) for _ in range(20)))
    found = inspect(model_of(deep, "tensor", x=torch.zeros(1, 64)), batch=8, latency=False)
    one = 4 * 8 * 64
    assert found.totals.peak_memory_bytes in range(2 * one, 4 * one + 1)


def test_tied_weights_count_once() -> None:
    model = decoder()
    found = inspect(model, length=8, latency=False)
    assert found.tied == (("model.embed_tokens.weight", "lm_head.weight"),)
    head = found.layers[-1]
    assert (head.name, head.parameters, head.bytes) == ("lm_head", 0, 0)
    assert head.tied_to == "model.embed_tokens"
    assert head.macs == 8 * 24 * 61


def test_modules_that_run_twice_are_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unit = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.unit(self.unit(x))

    found = inspect(model_of(Twice(), "tensor", x=torch.zeros(1, 4)), latency=False)
    assert found.shared == ("unit",)
    assert found.layers[0].macs == 2 * 16


def test_quantized_weights_cost_what_they_store() -> None:
    model = model_of(nn.Sequential(nn.Linear(64, 32)), "tensor", x=torch.zeros(1, 64))
    model.planes["0.weight"] = IntegerPlanes(
        codes=torch.zeros(1, 32, 64, dtype=torch.uint8),
        bits=(4,),
        scale=torch.ones(1, 32, 2),
        shift=torch.zeros(32, 2),
        group=32,
    )
    found = inspect(model, latency=False)
    # half a byte a weight, two groups a row with scale and shift as they are stored, fp32 bias
    packed = 32 * 64 // 2 + sum(
        t.numel() * t.element_size()
        for name, t in model.planes["0.weight"].tensors().items()
        if not name.startswith("codes")
    )
    assert found.totals.bytes == packed + 4 * 32
    assert found.totals.stored_bits_per_weight < 32 / 3


def test_latency_is_measured() -> None:
    class Sleepy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch.linalg.svd(torch.ones(150, 150))
            return x

    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Sleepy(), nn.Linear(4, 4)))
    found = inspect(model_of(module, "tensor", x=torch.zeros(1, 4)))
    times = {layer.name: layer.latency_ms for layer in found.layers}
    assert found.totals.latency_ms is not None
    assert all(t is not None and 0 < t < found.totals.latency_ms / 2 for t in times.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("build", [encoder, decoder, convolutional])
def test_the_meta_device_gives_the_same_counts(build: Callable[[], Model]) -> None:
    real = inspect(build(), length=16, latency=False)
    model = build()
    model.module.to("meta")
    if hasattr(model.module, "tie_weights"):
        model.module.tie_weights()  # moving to another device unties
    found = inspect(model, length=16)
    assert found.totals.latency_ms is None
    assert found.totals.macs == real.totals.macs
    assert found.totals.bytes == real.totals.bytes


def test_bare_weights_have_no_macs() -> None:
    module = nn.ParameterDict({"a": nn.Parameter(torch.zeros(3, 4)), "b": torch.zeros(5)})
    found = inspect(model_of(module, "weights"))
    assert [(layer.name, layer.kind, layer.bytes) for layer in found.layers] == [
        ("a", "3x4", 48),
        ("b", "5", 20),
    ]
    assert found.totals.macs is None


def test_json_and_sort() -> None:
    found = inspect(convolutional(), latency=False)
    assert (
        json.loads(json.dumps(found.to_json()))["totals"]["parameters"] == 216 + 16 + 80 + 132 + 25
    )
    macs = [layer.macs for layer in found.sorted("macs").layers]
    assert macs == sorted(macs, reverse=True)
    assert found.sorted("order") == found
    with pytest.raises(UsageError, match="allowed: order, parameters"):
        found.sorted("colour")


def test_the_default_length_is_what_the_network_takes() -> None:
    assert inspect(encoder(), latency=False).length == 40
    # Asked for by name it is a wish that cannot be met, 128 like any other.
    with pytest.raises(UsageError, match="allowed: 1 to 40"):
        inspect(encoder(), length=128, latency=False)
    assert sized_batch(encoder(), batch=3)["input_ids"].shape == (3, 40)


def test_what_no_step_handles_is_named() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.LSTM(16, 32, batch_first=True)
            self.norm = nn.LayerNorm(32)
            self.head = nn.Linear(32, 200)

    # 4 gates: (16 + 32) * 32 * 4; biases are no matrices.
    assert left_alone(model_of(Mixed(), "tensor", x=torch.zeros(1, 3, 16))) == [
        "cells (LSTM, 6,144)"
    ]
    assert left_alone(encoder()) == []


def test_impossible_sizes() -> None:
    with pytest.raises(UsageError, match="allowed: 1 to 40"):
        inspect(encoder(), length=41)
    with pytest.raises(UsageError, match="batch"):
        inspect(encoder(), batch=0)
    wrong = model_of(nn.Linear(3, 3), "tensor", x=torch.zeros(1, 4))
    with pytest.raises(InputError, match="does not run at batch 1"):
        inspect(wrong)
