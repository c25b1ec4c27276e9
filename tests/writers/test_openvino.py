"""The IR against torch and against IntegerPlanes computed in torch."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from penjing.errors import ExportError, UsageError
from penjing.model import Model, Source
from penjing.planes import IntegerPlanes
from penjing.recipe import ActivationRange
from penjing.rotation import Rotation

ov = pytest.importorskip("openvino")

from penjing.runtimes import openvino as runtime  # noqa: E402
from penjing.writers import openvino as writer  # noqa: E402


def planes_of(weight: torch.Tensor, bits: int, group: int = 0, symmetric: bool = False):
    """Round to nearest, written out here so that the oracle is not the code under test."""
    rows = weight.detach().reshape(len(weight), -1)
    out, inputs = rows.shape
    group = group or inputs
    groups = -(-inputs // group)
    codes = torch.zeros(1, out, inputs, dtype=torch.uint8)
    scale, shift = torch.zeros(1, out, groups), torch.zeros(out, groups)
    for o in range(out):
        for g in range(groups):
            part = rows[o, g * group : (g + 1) * group]
            if symmetric:
                zero = 2 ** (bits - 1)
                step = part.abs().max() / (zero - 1)
            else:
                low, high = part.min().clamp(max=0), part.max().clamp(min=0)
                step = (high - low) / (2**bits - 1)
                zero = torch.round(-low / step)
            q = (torch.round(part / step) + zero).clamp(0, 2**bits - 1)
            codes[0, o, g * group : (g + 1) * group] = q.to(torch.uint8)
            scale[0, o, g], shift[o, g] = step, -step * zero
    return IntegerPlanes(codes, (bits,), scale, shift, group, tuple(weight.shape))


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 24)
        self.a = nn.Linear(24, 32)
        self.b = nn.Linear(32, 24)

    def forward(self, ids):
        return self.b(torch.relu(self.a(self.embed(ids))))


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, groups=4)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))).mean((2, 3)))


def model_of(module: nn.Module, example: dict, interface: str = "tensor") -> Model:
    torch.manual_seed(3)
    for p in module.parameters():
        nn.init.normal_(p, std=0.2)
    return Model(module.eval(), interface, example, Source("factory", "here", "0"))


def quantize(model: Model, path: str, planes: IntegerPlanes) -> None:
    model.planes[path] = planes
    model.module.get_parameter(path).data = planes.dequantize()


def written(model: Model, folder: Path) -> tuple[np.ndarray, np.ndarray, object]:
    writer.write(model, folder)
    session = runtime.open(folder, threads=1)
    batch = {name: tensor.numpy() for name, tensor in model.example.items()}
    with torch.no_grad():
        return session.run(batch), model.run(model.example).numpy(), session


def text() -> Model:
    torch.manual_seed(0)
    return model_of(Text(), {"ids": torch.randint(0, 50, (2, 7))})


def test_float_equals_torch_and_batch_is_free(tmp_path: Path) -> None:
    model = text()
    got, want, session = written(model, tmp_path)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert session.inputs == {"ids": (None, 7)}
    five = torch.randint(0, 50, (5, 7))
    np.testing.assert_allclose(
        session.run({"ids": five.numpy()}), model.run({"ids": five}).detach(), atol=1e-5
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("group", "symmetric"), [(0, False), (8, False), (7, False), (0, True)])
def test_every_width_computes_the_planes(bits: int, group: int, symmetric: bool) -> None:
    if bits == 1 and symmetric:
        return
    torch.manual_seed(bits)
    planes = planes_of(torch.randn(6, 24), bits, group, symmetric)
    node = writer.low_bit(planes, [6, 24], signed=symmetric)
    graph = ov.Model([node.output(0)], [], "planes")
    got = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([])[0]
    np.testing.assert_allclose(got, planes.dequantize().numpy(), atol=1e-6)


def test_two_planes_and_a_zero_scale() -> None:
    codes = torch.randint(0, 2, (2, 4, 6), dtype=torch.uint8)
    scale = torch.rand(2, 4, 1)
    scale[0, 1] = 0
    planes = IntegerPlanes(codes, (1, 1), scale, torch.rand(4, 1), 6)
    want = scale[0] * codes[0] + scale[1] * codes[1] + planes.shift
    for part, expected in (
        (planes, want),
        (
            IntegerPlanes(codes[:1], (1,), scale[:1], planes.shift, 6),
            scale[0] * codes[0] + planes.shift,
        ),
    ):
        graph = ov.Model([writer.low_bit(part, [4, 6]).output(0)], [], "planes")
        np.testing.assert_allclose(
            ov.Core().compile_model(graph, "CPU")([])[0], expected, atol=1e-6
        )


def test_low_bits_are_stored_low_and_stay_right(tmp_path: Path) -> None:
    model = text()
    plain = tmp_path / "plain"
    writer.write(model, plain)
    quantize(model, "embed.weight", planes_of(model.module.embed.weight, 4))
    quantize(model, "a.weight", planes_of(model.module.a.weight, 4, 8))
    quantize(model, "b.weight", planes_of(model.module.b.weight, 8))
    got, want, _ = written(model, tmp_path / "low")
    # The runtime rounds the inputs of low-bit weights to 8 bits, in groups of 32.
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
    floats = (50 * 24 + 2 * 24 * 32) * 4
    codes = 50 * 12 + 24 * 16 + 24 * 32
    saved = (plain / "model.bin").stat().st_size - (tmp_path / "low/model.bin").stat().st_size
    scales = (50 + 32 * 3 + 24) * 5 + 512
    assert floats - codes - scales <= saved <= floats - codes


@pytest.mark.parametrize("kind", ["text", "image"])
def test_static_activations_run_in_int8(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    if kind == "text":
        model, layers = text(), ["a", "b"]
    else:
        model = model_of(Image(), {"pixel_values": torch.randn(2, 3, 16, 16)}, "image")
        layers = ["a", "b", "head"]
    seen: dict[str, torch.Tensor] = {}
    for name in layers:
        module = model.module.get_submodule(name)
        module.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    model.run(model.example)
    for name in layers:
        module = model.module.get_submodule(name)
        module._forward_pre_hooks.clear()
        quantize(model, f"{name}.weight", planes_of(module.weight, 7, 0, True))
        low, high = min(seen[name].min().item(), 0.0), seen[name].max().item()
        scale = (high - low) / 255
        zero = round(-low / scale)
        model.activations[name] = ActivationRange(scale, zero)

        def hook(_, x, scale=scale, zero=zero):
            return ((torch.clamp(torch.round(x[0] / scale) + zero, 0, 255) - zero) * scale,)

        module.register_forward_pre_hook(hook)
    got, want, session = written(model, tmp_path)
    # One step of a quantized input through one row of weights, at most.
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()
    kinds = {}
    for node in session.compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) in ("FullyConnected", "Convolution"):
            kinds[node.get_friendly_name()] = info["runtimePrecision"].astype(str)
    assert len(kinds) == len(layers)
    assert set(kinds.values()) <= {"u8", "i8"}


def test_equal_weights_keep_their_own_input_ranges(tmp_path: Path) -> None:
    model = model_of(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), {"x": torch.randn(4, 8)}
    )
    model.module[2].weight.data = model.module[0].weight.data.clone()
    ranges = {"0": ActivationRange(0.05, 128), "2": ActivationRange(0.005, 0)}
    for name, r in ranges.items():
        quantize(
            model, f"{name}.weight", planes_of(model.module.get_submodule(name).weight, 7, 0, True)
        )
        model.activations[name] = r

        def hook(_, x, r=r):
            q = torch.clamp(torch.round(x[0] / r.scale) + r.zero_point, 0, 255)
            return ((q - r.zero_point) * r.scale,)

        model.module.get_submodule(name).register_forward_pre_hook(hook)
    got, want, _ = written(model, tmp_path)
    np.testing.assert_allclose(got, want, atol=0.02)


def test_a_weight_that_is_not_there_is_named() -> None:
    parameter = ov.opset13.parameter([2, 3], np.float32)
    graph = ov.Model([ov.opset13.relu(parameter)], [parameter], "g")
    lost = writer.Weight("lost.weight", np.ones((2, 3), np.float32), None, None)
    with pytest.raises(ExportError, match=r"lost\.weight"):
        writer.compress(graph, [lost])


def test_a_decoder_is_refused_before_any_work(tmp_path: Path) -> None:
    model = text()
    model.interface = "causal"
    with pytest.raises(UsageError, match="onnx"):
        writer.write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_openvino_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"penjing\[openvino\]"):
        writer.require()


def test_rotated_layers_rotate_their_input_once(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(96, 16), nn.Linear(96, 16, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) * self.b(x)

    model = model_of(Heads(), {"x": torch.randn(2, 5, 96)})
    for name in ("a", "b"):
        weight = model.module.get_parameter(f"{name}.weight").detach()
        planes = dataclasses.replace(planes_of(Rotation(96).apply(weight), 4), rotation=0)
        # Other than zero error, and yet the weight and not its rotation.
        assert 0 < float((planes.dequantize() - weight).abs().max()) < 0.1
        quantize(model, f"{name}.weight", planes)
    _, want, _ = written(model, tmp_path)
    # On some processors the runtime rounds the inputs of such layers to 8 bits; not here.
    exact = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    graph = ov.Core().read_model(tmp_path / "model.xml")
    got = ov.Core().compile_model(graph, "CPU", exact)([model.example["x"].numpy()])[0]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    kinds = [op.get_type_name() for op in graph.get_ops()]
    assert kinds.count("MatMul") == 4


def test_rows_of_two_bits_that_end_amid_a_byte(tmp_path: Path) -> None:
    """As ternary codes have them: the runtime's own kernel was off by a quarter."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(36, 50), nn.GELU(), nn.Linear(50, 36))
    model = model_of(module, {"x": torch.randn(2, 7, 36)})
    for path in ("0.weight", "2.weight"):
        weight = model.module.get_parameter(path).detach()
        step = weight.abs().mean(1, keepdim=True)
        codes = (weight / step).round().clamp(-1, 1)
        planes = IntegerPlanes(
            (codes + 1).to(torch.uint8)[None], (2,), step[None], -1.04 * step, weight.shape[1],
            tuple(weight.shape),
        )  # fmt: skip
        assert torch.allclose(planes.dequantize(), (codes - 0.04) * step)
        quantize(model, path, planes)
    got, want, _ = written(model, tmp_path)
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_ranges_found_at_run_time_leave_inputs_in_floats(tmp_path: Path) -> None:
    model = text()
    for name in ("a", "b"):
        weight = model.module.get_submodule(name).weight
        quantize(model, f"{name}.weight", planes_of(weight, 8, 0, True))
        model.activations[name] = ActivationRange(0.0, 0)
    got, want, _ = written(model, tmp_path)
    np.testing.assert_allclose(got, want, atol=0.02 * np.abs(want).max())
