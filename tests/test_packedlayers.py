"""Packed layers against the float layers whose weights they hold."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
import transformers
from torch import nn

from penjing.edits import perform
from penjing.model import Model, Source
from penjing.packedlayers import PackedEmbedding, PackedLinear, PackedPlanes, pack_model
from penjing.planes import IntegerPlanes, Scheme, round_scales
from penjing.quantizers import rtn
from penjing.recipe import ActivationRange, Edit


def binary(weight: torch.Tensor, scale_bits: int) -> IntegerPlanes:
    """Two greedy planes of signs, one scale a row each."""
    rest, codes, scales = weight, [], []
    for _ in range(2):
        size = round_scales(2 * rest.abs().mean(1, keepdim=True).unsqueeze(0), scale_bits)[0]
        codes.append((rest > 0).to(torch.uint8))
        rest = rest - size * (codes[-1] - 0.5)
        scales.append(size)
    scale = torch.stack(scales)
    shift = -scale[0] * 0.5 - scale[1] * 0.5
    return IntegerPlanes(
        torch.stack(codes), (1, 1), scale, shift, weight.shape[1],
        scale_bits=scale_bits, offset="centre", centre=(0.5, 0.5),
    )  # fmt: skip


def vectors(weight: torch.Tensor, scale_bits: int) -> IntegerPlanes:
    """Random codes of two codebooks of 8-dimensional vectors."""
    generator = torch.Generator().manual_seed(3)
    n = -(-weight.shape[1] // 8)
    codes = torch.randint(0, 512, (2, len(weight), n), generator=generator).to(torch.int32)
    tables = torch.randint(-9, 10, (2, 512, 8), generator=generator).to(torch.int8)
    one = round_scales(torch.rand(1, len(weight), 3, generator=generator), scale_bits)
    shift = round_scales(torch.randn(len(weight), 3, generator=generator), scale_bits, signed=True)
    return IntegerPlanes(
        codes, (9, 9), one.expand(2, -1, -1).contiguous(), shift, -(-weight.shape[1] // 3),
        tuple(weight.shape), tables=tables, scale_bits=scale_bits,
    )  # fmt: skip


MAKERS = {
    "4 bits": lambda w: rtn.fit(w, Scheme(4, 16, scale_bits=8)),
    "3 bits symmetric": lambda w: rtn.fit(w, Scheme(3, 16, True, scale_bits=16)),
    "8 bits": lambda w: rtn.fit(w, Scheme(8)),
    "binary": lambda w: binary(w, 8),
    "vectors in 8 bits": lambda w: vectors(w, 8),
    "vectors": lambda w: vectors(w, 16),
}


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_linear_layer_and_a_table(name: str) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(300, 70), torch.randn(300)
    planes = MAKERS[name](weight)
    dense = planes.dequantize()
    packed = PackedPlanes(planes)
    assert torch.equal(packed.rows(slice(None)), dense)
    rows = torch.tensor([299, 0, 0, 77])
    assert torch.equal(packed.rows(rows), dense[rows])
    x = torch.randn(4, 5, 70)
    wanted = (x.double() @ dense.double().T + bias).float()
    found = PackedLinear(packed, bias)(x)
    assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
    ids = torch.randint(0, 300, (3, 9))
    assert torch.equal(PackedEmbedding(packed)(ids), dense[ids])
    # Only zero points are kept wider than they are stored.
    wide = 0 if planes.offset != "zero" else planes.shift.numel()
    tables = 0 if planes.tables is None else planes.tables.nbytes
    assert packed.stored_bytes <= planes.stored_bytes + wide + tables


def test_many_blocks_of_rows() -> None:
    weight = torch.randn(1100, 1000)
    planes = rtn.fit(weight, Scheme(4, 100))
    layer = PackedLinear(PackedPlanes(planes))
    assert len(list(layer.packed.blocks())) > 3
    x = torch.randn(2, 1000)
    assert torch.allclose(layer(x), x @ planes.dequantize().T, atol=1e-3)


def llama() -> Model:
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=500, max_position_embeddings=32, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 500, (2, 7))
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Model(module, "causal", example, Source("factory", "test", "0"))


def quantized() -> Model:
    model = llama()
    for name, parameter in list(model.parameters()):
        if parameter.ndim == 2:
            planes = rtn.fit(parameter.detach(), Scheme(4, 32, scale_bits=16))
            perform(model, Edit("quantize", name, planes, "test"))
    down = "model.layers.0.mlp.down_proj"
    perform(model, Edit("activation", down, ActivationRange(0.0, 0), "test"))
    return model


def test_a_whole_network_says_the_same() -> None:
    model = quantized()
    with torch.no_grad():
        wanted = model.run(model.example)
        without = model.module.model.layers[0].mlp.down_proj
        before = {n: p.clone() for n, p in model.parameters()}
        packed = pack_model(model)
        found = packed.run(model.example)
        assert torch.allclose(found, wanted, atol=1e-4 * float(wanted.abs().max()))
        # Its inputs are quantized still: without, the output is another.
        packed.module.model.layers[0].mlp.down_proj._forward_pre_hooks.clear()
        assert not torch.allclose(packed.run(model.example), found, rtol=0, atol=1e-6)
    assert model.module.model.layers[0].mlp.down_proj is without
    assert all(torch.equal(p, before[n]) for n, p in model.parameters())
    assert isinstance(packed.module.lm_head, PackedLinear)
    assert packed.module.lm_head.packed is packed.module.model.embed_tokens.packed


def test_the_float_weights_are_gone() -> None:
    model = quantized()
    stored = sum(p.stored_bytes for p in model.planes.values())
    packed = pack_model(model)
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in [*packed.module.parameters(), *packed.module.buffers()]
    }
    norms = sum(p.nbytes for _, p in model.parameters() if p.ndim == 1)
    assert sum(held.values()) < 1.3 * stored + norms + 4096
    kept = [p for _, p in model.parameters() if p.ndim == 2]
    big = {t.data_ptr() for t in kept}
    assert not big & set(held)
    gc.collect()


def test_layers_with_a_forward_of_their_own_stay() -> None:
    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    module = nn.Sequential(Twice(8, 8), nn.Linear(8, 8))
    model = Model(module.eval(), "tensor", {"x": torch.randn(2, 8)}, Source("factory", "t", "0"))
    for name in ("0.weight", "1.weight"):
        planes = rtn.fit(module.get_parameter(name).detach(), Scheme(4))
        perform(model, Edit("quantize", name, planes, "test"))
    packed = pack_model(model)
    assert [type(m) for m in packed.module] == [Twice, PackedLinear]
    with torch.no_grad():
        assert torch.allclose(packed.run(model.example), model.run(model.example), atol=1e-5)


@pytest.mark.parametrize("name", list(MAKERS))
def test_rotated_planes(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(10, 48, generator=generator)
    planes = dataclasses.replace(MAKERS[name](weight), rotation=0)
    dense = planes.dequantize()
    layer = PackedLinear(PackedPlanes(planes), torch.ones(10))
    x = torch.randn(2, 3, 48, generator=generator)
    size = float(dense.abs().max())
    torch.testing.assert_close(layer(x), x @ dense.T + 1, rtol=1e-4, atol=1e-4 * size)
    torch.testing.assert_close(layer.weight, dense, rtol=1e-5, atol=1e-5 * size)
    table = PackedEmbedding(PackedPlanes(planes))
    ids = torch.tensor([[3, 9], [0, 3]])
    torch.testing.assert_close(table(ids), dense[ids], rtol=1e-5, atol=1e-5 * size)
