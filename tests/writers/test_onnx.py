import collections
import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing import edits
from penjing.apply import apply
from penjing.errors import UsageError
from penjing.model import Model, Source
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import rtn
from penjing.recipe import ActivationRange, Edit, Recipe
from penjing.runtimes import onnxruntime as runtime
from penjing.steps.cut import Cut
from penjing.writers import _onnx_graph as graphs
from penjing.writers import onnx as writer
from penjing.writers import openvino

# One object each: networks of one source and the same shapes are traced once.
SOURCE = Source("huggingface", "tiny", "0")
FACTORY = Source("factory", "tiny", "0")


def text(rows: int, length: int, vocabulary: int = 50) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, vocabulary, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bert(layers: int = 2) -> Model:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=40,
    )  # fmt: skip
    module = BertModel(config, add_pooling_layer=False).eval()
    return Model(module, "embedding", text(2, 6), SOURCE)


def llama(tied: bool = True, layers: int = 2) -> Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return Model(LlamaForCausalLM(config).eval(), "causal", text(1, 5, 48), SOURCE)


def vit() -> Model:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        image_size=16, patch_size=8, num_labels=3,
    )  # fmt: skip
    example = {"pixel_values": torch.randn(1, 3, 16, 16)}
    return Model(ViTForImageClassification(config).eval(), "image", example, SOURCE)


def cnn() -> Model:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU6(), nn.Conv2d(16, 16, 3, groups=16, padding=1),
        nn.ReLU(), nn.Conv2d(16, 24, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(24, 5),
    ).eval()  # fmt: skip
    return Model(module, "image", {"pixel_values": torch.randn(4, 3, 12, 12)}, FACTORY)


def single(module: nn.Module, example: torch.Tensor) -> Model:
    return Model(module.eval(), "tensor", {"x": example}, FACTORY)


def quantize(model: Model, kind: type, scheme: Scheme) -> dict[str, IntegerPlanes]:
    """Quantize every layer of a kind; gives the planes."""
    made = {}
    for path, layer in list(model.module.named_modules()):
        name = f"{path}.weight".lstrip(".")
        if isinstance(layer, kind) and name in dict(model.parameters()):
            weight = layer.weight.detach()
            planes = rtn.fit(weight.flatten(1), scheme, None)
            made[name] = dataclasses.replace(planes, shape=tuple(weight.shape))
            edits.perform(model, Edit("quantize", name, made[name], "test"))
    return made


def calibrate(
    model: Model, kinds: tuple[type, ...], batch: dict[str, torch.Tensor] | None = None
) -> None:
    """Static ranges over the batch, or the example, for every layer of the kinds."""
    seen: dict[str, tuple[float, float]] = {}
    hooks = []
    for path, layer in model.module.named_modules():
        if isinstance(layer, kinds):

            def note(_: nn.Module, args: tuple[torch.Tensor, ...], path: str = path) -> None:
                low, high = args[0].amin().item(), args[0].amax().item()
                seen[path] = (min(low, 0.0), max(high, 0.0))

            hooks.append(layer.register_forward_pre_hook(note))
    with torch.no_grad():
        model.run(batch or model.example)
    for hook in hooks:
        hook.remove()
    for path, (low, high) in seen.items():
        scale = (high - low) / 255
        grid = ActivationRange(scale, round(-low / scale))
        edits.perform(model, Edit("activation", path, grid, "test"))


def both(model: Model, path: Path, batch: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """(torch, onnxruntime) on one batch."""
    writer.write(model, path)
    with torch.no_grad():
        wanted = model.run(batch).numpy()
    session = runtime.open(path, threads=1)
    return wanted, session.run({name: x.numpy() for name, x in batch.items()})


def relative(wanted: np.ndarray, got: np.ndarray) -> float:
    assert got.shape == wanted.shape
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def operators(path: Path) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("make", [bert, llama, vit, cnn])
def test_float_graphs_take_other_sizes(make, tmp_path: Path, capfd) -> None:
    model = make()
    if model.is_image:
        batch = {"pixel_values": torch.randn(3, *model.example["pixel_values"].shape[1:])}
    else:
        batch = text(3, 9, 48)
        batch["attention_mask"][1, 5:] = 0
    wanted, got = both(model, tmp_path / "m.onnx", batch)
    if model.interface == "causal":  # what a masked query gives is nobody's business
        kept = batch["attention_mask"].bool().numpy()
        wanted, got = wanted[kept], got[kept]
    assert relative(wanted, got) < 1e-5
    assert capfd.readouterr() == ("", "")


def test_a_single_sample_of_one_token(tmp_path: Path) -> None:
    model = bert()
    assert relative(*both(model, tmp_path / "m.onnx", text(1, 1))) < 1e-5


def test_attention_keeps_no_turn(tmp_path: Path) -> None:
    model = bert()
    writer.write(model, tmp_path / "model.onnx")
    kinds = collections.Counter(n.op_type for n in onnx.load(tmp_path / "model.onnx").graph.node)
    assert kinds["Attention"] == 2
    assert kinds["Transpose"] == kinds["Reshape"] == 0
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    batch = {name: x[:1].repeat(3, 2) for name, x in model.example.items()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 3:] = 0  # padding
    got = session.run(["output"], {n: x.numpy() for n, x in batch.items()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, model.run(batch).numpy(), atol=1e-5)


@pytest.mark.parametrize("static", [True, False])
def test_8_bit_inputs_merge_what_reads_the_same_tensor(static: bool, tmp_path: Path) -> None:
    model = bert()
    before = model.copy()
    quantize(model, nn.Linear, Scheme(8, 0, True))
    if static:
        calibrate(model, (nn.Linear,), text(8, 12))
    else:
        for path, layer in model.module.named_modules():
            if isinstance(layer, nn.Linear):
                edits.perform(model, Edit("activation", path, ActivationRange(0.0, 0), "test"))
    path = tmp_path / "m.onnx"
    batch = text(1, 12)
    wanted, got = both(model, path, batch)
    assert relative(wanted, got) < 0.03
    with torch.no_grad():
        assert relative(before.run(batch).numpy(), got) < 0.05
    kind = "MatMulIntegerToFloat" if static else "DynamicQuantizeMatMul"
    counts = operators(path)
    # Query, key and value are one product: four a layer, with static ranges that of the attention.
    assert counts[kind] == (6 if static else 8)
    assert counts["QAttention"] == (2 if static else 0)
    assert counts["Split"] == (0 if static else 2)
    assert counts["MatMul"] == 0
    assert counts["QuantizeLinear"] == (8 if static else 0)


def test_uses_are_found_under_transposition_tying_and_equal_content() -> None:
    model = llama()
    found = writer.find_uses(writer.float_graph(model), model)
    embedding = found["model.embed_tokens.weight"]
    assert sorted(use.node.op_type for use in embedding) == ["Gather", "MatMul"]
    twins = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    with torch.no_grad():
        twins[2].weight.copy_(twins[0].weight)
    pair = single(twins, torch.randn(2, 3, 6))
    uses = writer.find_uses(writer.float_graph(pair), pair)
    assert {name: [u.module for u in us] for name, us in uses.items()} == {
        "0.weight": ["0"], "2.weight": ["2"],
    }  # fmt: skip


def test_a_tied_table_is_stored_once(tmp_path: Path) -> None:
    model = llama()
    with torch.no_grad():
        model.module.model.embed_tokens.weight.mul_(20)
    quantize(model, nn.Embedding, Scheme(4, 32, False))
    path = tmp_path / "m.onnx"
    wanted, got = both(model, path, text(2, 7, 48))
    assert relative(wanted, got) < 0.02
    counts = operators(path)
    assert counts["GatherBlockQuantized"] == counts["MatMulNBits"] == 1
    codes = [t for t in onnx.load(path).graph.initializer if "codes" in t.name]
    assert [numpy_helper.to_array(t).nbytes for t in codes] == [48 * 32 // 2]


def test_a_large_tied_table_is_stored_once(tmp_path: Path) -> None:
    """The tracer folds small transposed constants by itself, and leaves large ones."""
    model = llama(layers=1)
    torch.manual_seed(0)
    table = torch.randn(3000, 32)
    model.module.resize_token_embeddings(3000)
    with torch.no_grad():
        model.module.model.embed_tokens.weight.copy_(table)
    quantize(model, nn.Embedding, Scheme(8, 32, False))
    path = tmp_path / "m.onnx"
    wanted, got = both(model, path, text(2, 7, 48))
    assert relative(wanted, got) < 0.02
    assert max(t.ByteSize() for t in onnx.load(path).graph.initializer) < 3000 * 32 * 1.01


@pytest.mark.parametrize("quantized", [False, True])
def test_a_large_tied_table_in_float_is_stored_once(quantized: bool, tmp_path: Path) -> None:
    model = llama(layers=1)
    model.module.resize_token_embeddings(3000)
    if quantized:
        layer = model.module.model.layers[0].mlp.down_proj
        planes = rtn.fit(layer.weight.detach(), Scheme(8, 16), None)
        name = "model.layers.0.mlp.down_proj.weight"
        edits.perform(model, Edit("quantize", name, planes, "test"))
    path = tmp_path / "m.onnx"
    wanted, got = both(model, path, text(2, 7, 48))
    assert relative(wanted, got) < (0.01 if quantized else 1e-5)
    table = 3000 * 32 * 4
    large = [t.ByteSize() for t in onnx.load(path).graph.initializer if t.ByteSize() >= table]
    assert len(large) == 1
    assert path.stat().st_size < 1.5 * table


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 32), (4, 32), (4, 0), (8, 64), (8, 0)])
def test_weight_only_matrices(bits: int, group: int, symmetric: bool, tmp_path: Path) -> None:
    layer = nn.Linear(96, 40)
    model = single(layer, torch.randn(2, 3, 96))
    planes = quantize(model, nn.Linear, Scheme(bits, group, symmetric))["weight"]
    path = tmp_path / "m.onnx"
    wanted, got = both(model, path, {"x": torch.randn(5, 3, 96)})
    # The operator rounds the input to int8 a block: half a step of 1/127 of about 2.5 sigma.
    assert relative(wanted, got) < 0.02
    assert operators(path)["MatMulNBits"] == 1
    graph = onnx.load(path).graph
    # 2 bits in blocks of 16 have only a slow kernel, and are stored in 4.
    width = {2: 4 if group == 16 else 2, 3: 4, 4: 4, 8: 8}[bits]
    codes = [t for t in graph.initializer if ".codes" in t.name]
    stored = 128 if group == 64 else 96  # whole blocks
    assert [numpy_helper.to_array(t).nbytes for t in codes] == [40 * stored * width // 8]
    assert not any(t.name == "weight" or list(t.dims) == [96, 40] for t in graph.initializer)
    assert any(".zero" in t.name for t in graph.initializer) == (not symmetric)
    assert planes.bits == (bits,)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 16), (4, 0), (8, 0)])
def test_tables_are_gathered_exactly(
    bits: int, group: int, symmetric: bool, tmp_path: Path
) -> None:
    model = single(nn.Embedding(31, 48), torch.arange(6).reshape(2, 3))
    planes = quantize(model, nn.Embedding, Scheme(bits, group, symmetric))["weight"]
    path = tmp_path / "m.onnx"
    writer.write(model, path)
    got = runtime.open(path, threads=1).run({"x": np.arange(33).reshape(11, 3) % 31})
    got = got.reshape(33, 48)[:31]
    size = planes.group
    scale = np.repeat(planes.scale[0].numpy(), size, 1)[:, :48]
    zero = np.repeat(planes.zero_point.numpy(), size, 1)[:, :48]
    assert np.array_equal(got, (planes.codes[0].numpy() - zero) * scale)
    assert operators(path)["GatherBlockQuantized"] == 1
    codes = next(t for t in onnx.load(path).graph.initializer if ".codes" in t.name)
    assert len(numpy_helper.to_array(codes).tobytes()) == 31 * 48 * bits // 8


def test_subclassed_convolutions_are_convolutions(tmp_path: Path) -> None:
    class Same(nn.Conv2d):
        pass

    torch.manual_seed(0)
    module = nn.Sequential(Same(3, 16, 3, padding=1), nn.ReLU(), Same(16, 8, 1)).eval()
    model = Model(module, "image", {"pixel_values": torch.randn(4, 3, 12, 12)}, FACTORY)
    quantize(model, Same, Scheme(8, 0, False))
    path = tmp_path / "m.onnx"
    assert relative(*both(model, path, {"pixel_values": torch.randn(2, 3, 12, 12)})) < 1e-5
    assert sum(".codes" in t.name for t in onnx.load(path).graph.initializer) == 2


def test_scales_that_fit_half_precision_are_stored_so(tmp_path: Path) -> None:
    model = single(nn.Linear(32, 8), torch.randn(2, 3, 32))
    planes = rtn.fit(model.module.weight.detach(), Scheme(4, 16, True), None)
    scale = planes.scale.half().float()
    planes = dataclasses.replace(planes, scale=scale, shift=-8 * scale[0])
    edits.perform(model, Edit("quantize", "weight", planes, "test"))
    assert relative(*both(model, tmp_path / "m.onnx", {"x": torch.randn(4, 3, 32)})) < 0.02
    stored = [t for t in onnx.load(tmp_path / "m.onnx").graph.initializer if ".scale" in t.name]
    assert [t.data_type for t in stored] == [onnx.TensorProto.FLOAT16]


def test_8_bit_inputs_of_a_flat_layer_without_bias(tmp_path: Path) -> None:
    model = single(
        nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 7, bias=False)), torch.randn(9, 20)
    )
    # 7 bits: exact on every processor, see `penjing.processor`.
    quantize(model, nn.Linear, Scheme(7, 0, True))
    calibrate(model, (nn.Linear,))
    wanted, got = both(model, tmp_path / "m.onnx", model.example)
    # By hand, in whole numbers.
    x = model.example["x"].numpy()
    for path in ("0", "1"):
        grid, planes = model.activations[path], model.planes[f"{path}.weight"]
        codes = np.clip(np.round(x / np.float32(grid.scale)) + grid.zero_point, 0, 255)
        product = (codes - grid.zero_point) @ (planes.codes[0].numpy().astype(float) - 64).T
        x = (product * grid.scale * planes.scale[0, :, 0].numpy()).astype(np.float32)
        if path == "0":
            x = x + model.module[0].bias.detach().numpy()
    assert relative(x, got) < 1e-5
    assert relative(wanted, got) < 1e-5


def test_convolutions_with_8_bit_inputs_run_in_integers(tmp_path: Path) -> None:
    model = cnn()
    quantize(model, nn.Conv2d, Scheme(8, 0, True))
    calibrate(model, (nn.Conv2d,))
    path = tmp_path / "m.onnx"
    wanted, got = both(model, path, {"pixel_values": torch.randn(2, 3, 12, 12)})
    assert relative(wanted, got) < 0.02
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options)
    counts = operators(tmp_path / "optimized.onnx")
    # The last one's result is pooled in float, and comes so from its product.
    assert counts["QLinearConv"] == 2
    assert counts["MatMulIntegerToFloat"] == 1


class Bottleneck(nn.Module):
    """The residual stream of a MobileNet: the first output is read twice, and added to."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.first, self.expand = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 24, 1, stride=stride)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.project, self.last = nn.Conv2d(24, 8, 1, bias=False), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        hidden = nn.functional.relu6(self.depth(nn.functional.relu6(self.expand(x))))
        return self.last(nn.functional.interpolate(self.project(hidden), x.shape[2:]) + x)


@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_added_comes_from_integer_products_unrounded(stride: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randn(4, 3, 9, 9)
    model = Model(Bottleneck(stride).eval(), "image", {"pixel_values": example}, FACTORY)
    quantize(model, nn.Conv2d, Scheme(7, 0, True))
    calibrate(model, (nn.Conv2d,))
    # Its result is not rounded, so its product is in floats, and its input stays as it is.
    model.module.last.penjing_range = None
    del model.activations["last"]
    path = tmp_path / "m.onnx"
    wanted, got = both(model, path, {"pixel_values": example})
    # With the sum rounded on one side alone it is 0.0065.
    assert relative(wanted, got) < 2e-3
    counts = operators(path)
    assert counts["MatMulIntegerToFloat"] == 2
    readers = [n for n in onnx.load(path).graph.node if n.op_type == "Add"]
    made = {n.output[0]: n.op_type for n in onnx.load(path).graph.node}
    assert "DequantizeLinear" not in {made[name] for name in readers[0].input}


@pytest.mark.parametrize("before", [nn.Identity, nn.ReLU, nn.Sigmoid])
def test_the_input_of_a_float_convolution_is_cut_to_its_range(
    before: type[nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), before(), nn.Conv2d(8, 4, 3)).eval()
    model = Model(module, "image", {"pixel_values": torch.randn(4, 3, 9, 9)}, FACTORY)
    quantize(model, nn.Conv2d, Scheme(7, 0, True))
    # Of the last one's inputs a good part lies beyond +-0.5.
    found = ActivationRange(0.5 / 128, 128)
    edits.perform(model, Edit("activation", "2", found, "test"))
    path = tmp_path / "m.onnx"
    wanted, got = both(model, path, model.example)
    # torch rounds what is left, by half a step of 1/256.
    assert relative(wanted, got) < 5e-3
    kinds = [n.op_type for n in onnx.load(path).graph.node if n.op_type in ("Clip", "Relu")]
    assert kinds == ["Clip"]


@pytest.mark.parametrize("bits", [4, 8])
def test_convolutions_with_low_bit_weights(bits: int, tmp_path: Path) -> None:
    model = cnn()
    quantize(model, nn.Conv2d, Scheme(bits, 0, False))
    path = tmp_path / "m.onnx"
    assert relative(*both(model, path, {"pixel_values": torch.randn(2, 3, 12, 12)})) < 1e-5
    codes = [t for t in onnx.load(path).graph.initializer if ".codes" in t.name]
    stored = sum(len(t.raw_data) for t in codes)
    assert stored == (16 * 27 + 16 * 9 + 24 * 16) * bits // 8


def test_a_projected_lstm_is_refused_and_a_plain_one_is_not() -> None:
    for width, said in ((0, []), (4, ["cells: an LSTM with proj_size"])):
        cells = nn.LSTM(6, 8, proj_size=width)
        model = net.wrap(nn.ModuleDict({"cells": cells}), "tensor", {"x": torch.zeros(3, 2, 6)})
        assert writer.check(model) == said
        assert openvino.check(model) == said
    with pytest.raises(UsageError, match=r"cannot express cells: an LSTM.*Python: it runs all"):
        writer.write(model, Path("never.onnx"))
    assert not Path("never.onnx").exists()


def test_what_cannot_be_expressed_is_refused_by_name() -> None:
    model = bert()
    name = "encoder.layer.0.output.dense.weight"
    weight = model.module.get_parameter(name).detach()
    single_plane = rtn.fit(weight, Scheme(4, 24, False), None)
    model.planes[name] = single_plane
    assert name in writer.check(model)[0]
    with pytest.raises(UsageError, match=r"output\.dense\.weight: groups of 24"):
        writer.write(model, Path("never.onnx"))
    assert not Path("never.onnx").exists()
    del model.planes[name]
    model.activations["encoder.layer.0.output.dense"] = ActivationRange(0.1, 0)
    assert "symmetric 8- or 7-bit weights" in writer.check(model)[0]
    assert writer.check(bert()) == []


def test_a_graph_is_made_again_after_every_kind_of_change(tmp_path: Path) -> None:
    """The graph of one network serves two runtimes; it must never be that of an earlier state."""
    model = single(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(4, 6))

    def same() -> bool:
        wanted, got = both(model, tmp_path / "m.onnx", model.example)
        return relative(wanted, got) < 1e-5

    assert same()
    assert same()
    with torch.no_grad():
        model.module[0].weight.mul_(2)  # in place
    assert same()
    model.module[0].weight.data = torch.randn(5, 6)
    assert same()
    model.module[2] = nn.Linear(5, 3)
    assert same()
    model.module[1] = nn.Tanh()  # no tensor of its own
    assert same()


def test_a_graph_is_traced_once_for_all_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that changed are in the second graph; another structure is traced anew."""
    model = bert(layers=1)
    with torch.no_grad():  # fresh networks have norms of ones
        for parameter in model.module.parameters():
            parameter.normal_()
    traced = []
    real = graphs._traced
    monkeypatch.setattr(graphs, "_kept", collections.deque())
    monkeypatch.setattr(graphs, "_traced", lambda m: traced.append(m) or real(m))
    first = writer.float_graph(model)
    twin = model.copy()
    with torch.no_grad():
        for parameter in twin.module.parameters():
            parameter.mul_(1.5)
    second = writer.float_graph(twin)
    assert len(traced) == 1
    assert second != first
    assert second == real(twin)
    blocks = net.stack(layers=2)
    whole = writer.float_graph(blocks)
    short = apply(blocks, Recipe((Cut(layers=1, patch="none"),)), [blocks.example]).model
    assert writer.float_graph(short) == real(short)
    assert len(traced) == 3
    # A fit goes back and forth.
    assert writer.float_graph(blocks) == whole
    assert len(traced) == 3


def test_what_the_tracer_merged_serves_while_it_is_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(first: float, second: float, weights: float) -> Model:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 4))
        with torch.no_grad():
            module[0].weight.mul_(weights)
            module[0].bias.fill_(first).add_(torch.arange(4) * first)
            module[2].bias.copy_(module[0].bias)
            module[3].bias.fill_(second)
        return Model(module.eval(), "tensor", {"x": torch.ones(2, 4)}, SOURCE)

    traced = []
    real = graphs._traced
    monkeypatch.setattr(graphs, "_kept", collections.deque())
    monkeypatch.setattr(graphs, "_traced", lambda m: traced.append(m) or real(m))
    writer.float_graph(made(1.0, 0.0, 1.0))
    # Others, but equal among themselves as before.
    assert writer.float_graph(made(2.0, 0.0, 3.0)) == real(made(2.0, 0.0, 3.0))
    assert len(traced) == 1
    # A bias of zeros is left out of the graph.
    biased = writer.float_graph(made(2.0, 0.5, 3.0))
    assert len(traced) == 2
    plain = writer.float_graph(made(2.0, 0.0, 3.0))
    assert len(biased.graph.initializer) == len(plain.graph.initializer) + 1
    apart = made(2.0, 0.0, 3.0)
    with torch.no_grad():
        apart.module[2].bias.add_(1)
    writer.float_graph(apart)
    assert len(traced) == 3


def test_a_single_number_is_part_of_the_graph() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * self.scale

    model = Model(Scaled().eval(), "tensor", {"x": torch.ones(2, 4)}, SOURCE)
    writer.float_graph(model)
    twin = model.copy()
    with torch.no_grad():
        twin.module.scale.fill_(3)
    assert writer.float_graph(twin) == graphs._traced(twin)


TRACES = """
import os, signal, sys, threading, time
from transformers import BertConfig, BertModel
import torch
from penjing.model import Model, Source
from penjing.writers import _onnx_graph as graphs
config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                    intermediate_size=32)
ids = torch.ones(2, 8, dtype=torch.long)
module = BertModel(config, add_pooling_layer=False).eval()
example = {"input_ids": ids, "attention_mask": ids}
model = Model(module, "embedding", example, Source("t", "t", ""))
real = torch.onnx.export
def export(*args, **more):
    def shoot():
        time.sleep(float(sys.argv[1]))
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=shoot, daemon=True).start()
    return real(*args, **more)
torch.onnx.export = export
try:
    graphs.float_graph(model)
    time.sleep(20)  # traced before the signal came
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("after", ["0.2", "0.8", "1.6"])
def test_an_interrupt_amid_the_tracer_does_not_crash(after: str) -> None:
    done = subprocess.run([sys.executable, "-c", TRACES, after], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "interrupted\n"
