"""Edits: what each changes, what is refused, and that they come back bit for bit."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing.edits import perform, replay
from penjing.errors import InputError
from penjing.model import Model
from penjing.planes import IntegerPlanes
from penjing.recipe import ActivationRange, Edit, Patch, Setting, Slice
from penjing.storededits import pack, unpack


def _planes(out: int, inputs: int, bits: int = 3) -> IntegerPlanes:
    generator = torch.Generator().manual_seed(2)
    return IntegerPlanes(
        torch.randint(0, 2**bits, (1, out, inputs), generator=generator).to(torch.uint8),
        (bits,), torch.rand(1, out, 1, generator=generator), torch.rand(out, 1), inputs,
    )  # fmt: skip


def _slices(keep: list[int], path: str = "blocks.1") -> Edit:
    kept = torch.tensor(keep)
    parts = (("up.weight", 0), ("up.bias", 0), ("down.weight", 1))
    return Edit("slice", path, tuple(Slice(f"{path}.{n}", d, kept) for n, d in parts), "t")


def _every_kind() -> list[Edit]:
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(8, 8, generator=generator)
    return [
        Edit("mask", "inp.weight", torch.rand(8, 6, generator=generator) > 0.5, "m", {"s": 0.1}),
        Edit("weight", "out.bias", torch.randn(4, generator=generator), "w"),
        _slices([0, 5, 7]),
        # Not contiguous, as a transposed solution is.
        Edit("patch", "blocks.2", Patch(matrix.T, matrix[:, 0], "before"), "p"),
        Edit("patch", "blocks.0", Patch(matrix, matrix[0], "after"), "p"),
        Edit("drop", "blocks.1", None, "d"),
        Edit("quantize", "blocks.0.up.weight", _planes(24, 8), "q", {"e": 1 / 3}),
        Edit("activation", "blocks.0.up", ActivationRange(1 / 3, 77), "a"),
    ]


def test_every_edit_comes_back_from_bytes_bit_for_bit() -> None:
    edits = [*_every_kind(), Edit("fold", "conv", "norm", "f")]
    tensors, text = pack(edits)
    again = unpack(load(save(tensors)), text)
    assert [(e.kind, e.path, e.why, e.note) for e in again] == [
        (e.kind, e.path, e.why, e.note) for e in edits
    ]
    assert again[-1].value == "norm"
    one, two = net.stack(), net.stack()
    for first, second in zip(edits[:-1], again[:-1], strict=True):
        perform(one, first)
        perform(two, second)
    assert net.same(one, two)
    assert torch.equal(one.run(one.example), two.run(two.example))
    assert not torch.equal(one.run(one.example), net.stack().run(one.example))


def test_pack_of_nothing_and_of_ten_edits_and_more() -> None:
    assert unpack(load(save(pack([])[0])), pack([])[1]) == []
    edits = [Edit("weight", "out.bias", torch.full((4,), float(n)), "w") for n in range(12)]
    again = unpack(*pack(edits))
    assert [float(e.value[0]) for e in again] == list(range(12))  # type: ignore[index]


def test_structure_replayed_on_meta_takes_the_weights() -> None:
    edited = net.stack()
    for edit in _every_kind():
        perform(edited, edit)
    structure = json.loads(json.dumps(edited.structure))
    with torch.device("meta"):
        empty = net.stack()
    replay(empty, structure)
    assert {p.device.type for p in empty.module.parameters()} == {"meta"}
    empty.module.to_empty(device="cpu")
    empty.module.load_state_dict(edited.module.state_dict())
    perform(empty, Edit("activation", "blocks.0.up", ActivationRange(1 / 3, 77), "a"))
    assert empty.blocks == edited.blocks
    assert torch.equal(empty.run(edited.example), edited.run(edited.example))


def test_a_fold_replayed_on_meta_takes_the_weights() -> None:
    edited = net.resnet()
    perform(edited, Edit("fold", "layer1.0.conv1", "layer1.0.bn1", "f"))
    with torch.device("meta"):
        empty = net.wrap(net.ResNet(), "tensor", edited.example)
    replay(empty, edited.structure)
    empty.module.to_empty(device="cpu")
    empty.module.load_state_dict(edited.module.state_dict())
    assert torch.equal(empty.run(edited.example), edited.run(edited.example))


def test_a_slice_by_hand() -> None:
    model = net.stack()
    block = model.module.blocks[1]
    up, bias, down = (p.detach().numpy().copy()
                      for p in (block.up.weight, block.up.bias, block.down.weight))  # fmt: skip
    perform(model, _slices([0, 5, 7]))
    np.testing.assert_array_equal(block.up.weight.detach().numpy(), up[[0, 5, 7]])
    np.testing.assert_array_equal(block.up.bias.detach().numpy(), bias[[0, 5, 7]])
    np.testing.assert_array_equal(block.down.weight.detach().numpy(), down[:, [0, 5, 7]])
    assert (block.up.out_features, block.down.in_features) == (3, 3)
    assert block.down.out_features == 8


def test_counts_of_heads_follow_a_slice() -> None:
    model = net.bert()
    path = "encoder.layer.0.attention.self"
    kept = torch.arange(8, 24)  # two heads of four
    slices = [Slice(f"{path}.{n}.weight", 0, kept) for n in ("query", "key", "value")]
    counts = [Setting(path, "num_attention_heads", 2), Setting(path, "all_head_size", 16)]
    edit = Edit("slice", path, (*slices, *counts), "by hand")
    (again,) = unpack(*pack([edit]))
    fresh = model.copy()
    perform(model, again)
    replay(fresh, model.structure)
    for one in (model, fresh):
        attention = one.module.get_submodule(path)
        assert attention.num_attention_heads == 2
        assert attention.all_head_size == 16
        assert attention.attention_head_size == 8
        assert attention.key.out_features == 16


def test_masks_add_up_and_follow_slices() -> None:
    model = net.stack()
    one, two = (torch.rand(24, 8, generator=torch.Generator().manual_seed(s)) > 0.4 for s in (1, 2))
    for mask in (one, two):
        perform(model, Edit("mask", "blocks.1.up.weight", mask, "m"))
    assert torch.equal(model.masks["blocks.1.up.weight"], one & two)
    perform(model, _slices([0, 5, 7]))
    weight = model.module.blocks[1].up.weight
    assert torch.equal(model.masks["blocks.1.up.weight"], (one & two)[[0, 5, 7]])
    perform(model, Edit("weight", "blocks.1.up.weight", torch.ones(3, 8), "w"))
    assert torch.equal(weight != 0, (one & two)[[0, 5, 7]])


@pytest.mark.parametrize(
    "edit",
    [
        Edit("mask", "blocks.1.up.weight", torch.ones(24, 8, dtype=torch.bool), "m"),
        Edit("weight", "blocks.1.up.weight", torch.ones(24, 8), "w"),
        _slices([0, 5, 7]),
    ],
    ids=lambda e: e.kind,
)
def test_a_quantized_weight_is_not_edited_behind_its_planes(edit: Edit) -> None:
    model = net.stack()
    planes = _planes(24, 8)
    perform(model, Edit("quantize", "blocks.1.up.weight", planes, "q"))
    before = net.state(model)
    with pytest.raises(InputError, match="quantized already"):
        perform(model, edit)
    assert all(torch.equal(v, before[n]) for n, v in net.state(model).items())
    assert torch.equal(model.module.blocks[1].up.weight, planes.dequantize())


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit("weight", "out.bias", torch.ones(5), "w"), r"out\.bias; got \(5,\); allowed: \(4,\)"),
        (Edit("mask", "out.nothing", torch.ones(4) > 0, "m"), "no such parameter"),
        (Edit("drop", "out", None, "d"), "only a repeated block"),
    ],
)
def test_edits_that_do_not_fit(edit: Edit, message: str) -> None:
    model = net.stack()
    with pytest.raises(InputError, match=message):
        perform(model, edit)
    assert model.structure == []


def test_a_drop_moves_everything_behind_it() -> None:
    model = net.stack(4)
    original = net.stack(4).module
    for number in range(4):
        mask = torch.ones(24, 8, dtype=torch.bool)
        mask[number] = False
        perform(model, Edit("mask", f"blocks.{number}.up.weight", mask, "m"))
        perform(model, Edit("activation", f"blocks.{number}.up", ActivationRange(1.0, number), "a"))
    perform(model, Edit("quantize", "blocks.3.down.weight", _planes(8, 24), "q"))
    perform(model, Edit("drop", "blocks.1", None, "d"))
    assert model.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert len(model.module.blocks) == 3
    for now, was in enumerate((0, 2, 3)):
        assert torch.equal(model.module.blocks[now].up.bias, original.blocks[was].up.bias)
        gone = (~model.masks[f"blocks.{now}.up.weight"]).any(1).nonzero().flatten().tolist()
        assert gone == [was]
        assert model.activations[f"blocks.{now}.up"].zero_point == was
    assert set(model.masks) == {f"blocks.{i}.up.weight" for i in range(3)}
    assert set(model.planes) == {"blocks.2.down.weight"}


def test_a_drop_from_a_sequential_with_names() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = {n: net.MlpBlock(6, 4) for n in ("first", "second", "third")}
            self.body = nn.Sequential()
            for name, part in parts.items():
                self.body.add_module(name, part)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    torch.manual_seed(0)
    model = net.wrap(Named(), "tensor", {"x": torch.randn(2, 6)})
    parts = dict(model.module.body.named_children())
    perform(model, Edit("drop", "body.second", None, "d"))
    assert model.blocks == ("body.first", "body.third")
    expected = parts["third"](parts["first"](model.example["x"]))
    assert torch.equal(model.run(model.example), expected)


def test_the_last_block_stays() -> None:
    model = net.stack(2)
    perform(model, Edit("drop", "blocks.0", None, "d"))
    assert model.blocks == ("blocks.0",)
    with pytest.raises(InputError, match="one must stay"):
        perform(model, Edit("drop", "blocks.0", None, "d"))


def test_config_and_layer_numbers_are_repaired() -> None:
    model = net.llama(3)
    original = net.llama(3).module.state_dict()
    perform(model, Edit("drop", "model.layers.1", None, "d"))
    assert model.module.config.num_hidden_layers == 2
    assert [layer.self_attn.layer_idx for layer in model.module.model.layers] == [0, 1]
    # A shallow network, built by transformers itself, with the same weights.
    config = LlamaConfig(**{**model.module.config.to_dict(), "num_hidden_layers": 2})
    shallow = LlamaForCausalLM(config).eval()
    shallow.load_state_dict(
        {n.replace("layers.2.", "layers.1."): v
         for n, v in original.items() if ".layers.1." not in n}
    )  # fmt: skip
    with torch.no_grad():
        assert torch.equal(model.run(model.example), shallow(**model.example).logits)


def _by_hand(model: Model, maps: dict[tuple[int, str], list[tuple[Tensor, Tensor]]]) -> Tensor:
    x = model.module.inp(model.example["x"])
    for number, block in enumerate(model.module.blocks):
        for weight, bias in maps.get((number, "before"), []):
            x = x @ weight.T + bias
        x = x + block.down(torch.relu(block.up(x)))
        for weight, bias in maps.get((number, "after"), []):
            x = x @ weight.T + bias
    return model.module.out(x)


@pytest.mark.parametrize("position", ["before", "after"])
def test_a_second_patch_stands_where_it_was_fitted(position: str) -> None:
    """`before`: the new patch takes what enters the block; `after`: what leaves the old patch."""
    model = net.stack()
    generator = torch.Generator().manual_seed(4)
    parts = [(torch.randn(8, 8, generator=generator), torch.randn(8, generator=generator))
             for _ in range(2)]  # fmt: skip
    for weight, bias in parts:
        perform(model, Edit("patch", "blocks.1", Patch(weight, bias, position), "p"))  # type: ignore[arg-type]
    order = parts[::-1] if position == "before" else parts
    wanted = _by_hand(model, {(1, position): order})
    torch.testing.assert_close(model.run(model.example), wanted, rtol=1e-4, atol=1e-3)
    assert len(model.structure) == 1


def test_patches_reach_blocks_called_by_name_and_that_give_tuples() -> None:
    class Tuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, hidden_states: Tensor, other: int = 0) -> tuple[Tensor, int]:
            return self.inner(hidden_states), other

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Tuple(), Tuple()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x, _ = block(hidden_states=x, other=3)
            return x

    torch.manual_seed(0)
    model = net.wrap(Net(), "tensor", {"x": torch.randn(2, 6)})
    weight, bias = torch.randn(6, 6), torch.randn(6)
    perform(model, Edit("patch", "blocks.0", Patch(weight, bias, "before"), "p"))
    perform(model, Edit("patch", "blocks.1", Patch(2 * weight, bias, "after"), "p"))
    one, two = (b.inner for b in model.module.blocks)
    wanted = two(one(model.example["x"] @ weight.T + bias)) @ (2 * weight).T + bias
    torch.testing.assert_close(model.run(model.example), wanted)


def test_fold_is_exact() -> None:
    model = net.resnet()
    before = model.run(model.example)
    for conv, norm in (("stem.0", "stem.1"), ("layer2.0.conv1", "layer2.0.bn1")):
        perform(model, Edit("fold", conv, norm, "f"))
    assert isinstance(model.module.stem[1], nn.Identity)
    torch.testing.assert_close(model.run(model.example), before, rtol=1e-5, atol=1e-5)


def _fake_quant(x: np.ndarray, scale: float, zero: int) -> np.ndarray:
    return ((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale).astype(np.float32)


def test_an_activation_range_rounds_the_input() -> None:
    model = net.stack()
    layer, x = model.module.out, torch.linspace(-3, 5, 64).reshape(8, 8)
    perform(model, Edit("activation", "out", ActivationRange(0.02, 100), "a"))
    wanted = _fake_quant(x.numpy(), 0.02, 100) @ layer.weight.detach().numpy().T
    found = layer(x).detach().numpy()
    np.testing.assert_allclose(found, wanted + layer.bias.detach().numpy(), rtol=1e-5, atol=1e-5)
    # A second range replaces the first.
    perform(model, Edit("activation", "out", ActivationRange(0.1, 30), "a"))
    wanted = _fake_quant(x.numpy(), 0.1, 30) @ layer.weight.detach().numpy().T
    found = layer(x).detach().numpy()
    np.testing.assert_allclose(found, wanted + layer.bias.detach().numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(-3.0, 5.0), (1.0, 2.0), (-2.0, -1.0)])
def test_a_dynamic_range_is_that_of_the_input(low: float, high: float) -> None:
    model = net.stack()
    layer, x = model.module.out, torch.linspace(low, high, 64).reshape(8, 8)
    perform(model, Edit("activation", "out", ActivationRange(0.0, 0), "a"))
    scale = (max(high, 0.0) - min(low, 0.0)) / 255
    rounded = _fake_quant(x.numpy(), scale, round(-min(low, 0.0) / scale))
    wanted = rounded @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_training_goes_through_rounded_inputs() -> None:
    model = net.stack()
    perform(model, Edit("activation", "out", ActivationRange(0.02, 100), "a"))
    model.run(model.example).square().sum().backward()
    assert float(model.module.inp.weight.grad.abs().max()) > 0


def test_untied_parameters_are_two_and_what_is_left_changes_nothing() -> None:
    model = net.llama(layers=1, tie_word_embeddings=True)
    before = {n: p.detach().clone() for n, p in model.module.state_dict().items()}
    perform(model, Edit("left", "lm_head", None, "test"))
    assert len(model.tied()) == 1
    perform(model, Edit("untie", "lm_head.weight", None, "test"))
    assert model.tied() == []
    model.module.lm_head.weight.data.zero_()
    name = "model.embed_tokens.weight"
    assert torch.equal(model.module.state_dict()[name], before[name])
    twin = net.llama(layers=1, tie_word_embeddings=True)
    replay(twin, model.structure)
    assert twin.tied() == []
    assert not twin.module.config.tie_word_embeddings
    edits = [Edit("untie", "lm_head.weight", None, "why"), Edit("left", "x", None, "why")]
    assert [(e.kind, e.path, e.value) for e in unpack(*pack(edits))] == [
        ("untie", "lm_head.weight", None), ("left", "x", None),
    ]  # fmt: skip


def _after() -> Patch:
    return Patch(torch.eye(32) + 0.1, torch.ones(32), "after")


def test_edits_of_a_shared_copy_are_its_own() -> None:
    """Numbers in common until an edit replaces them, whichever of the two is edited."""
    model = net.llama()
    before = net.state(model)
    twin = model.copy(shared=True)
    path = "model.layers.1.mlp.up_proj"
    own, other = (m.module.get_submodule(path).weight for m in (model, twin))
    assert own is not other
    assert own.data_ptr() == other.data_ptr()
    perform(twin, Edit("weight", f"{path}.weight", torch.zeros(own.shape), "t"))
    perform(twin, Edit("mask", "model.layers.0.mlp.up_proj.weight", own.abs() > 1, "t"))
    perform(twin, Edit("patch", "model.layers.0", _after(), "t"))
    perform(twin, Edit("patch", "model.layers.0", _after(), "t"))
    assert not other.any()
    assert all(torch.equal(value, before[name]) for name, value in net.state(model).items())
    perform(model, Edit("quantize", f"{path}.weight", _planes(*own.shape), "t"))
    assert not other.any()
    assert path not in twin.planes
    assert not twin.masks.keys() & model.masks.keys()


def test_what_is_left_is_kept_with_its_reason() -> None:
    model = net.stack()
    perform(model, Edit("left", "blocks.0.up", None, "nothing divides its inputs"))
    assert model.left == {"blocks.0.up": "nothing divides its inputs"}
