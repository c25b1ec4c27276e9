"""The .pte against torch and against integers computed in float64, in ExecuTorch's own runtime."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.networks import bert, llama
from torch import nn
from torch.nn import functional

from penjing.edits import perform
from penjing.errors import UsageError
from penjing.export import export
from penjing.model import Model, Source
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import rtn
from penjing.recipe import ActivationRange, Edit

pytest.importorskip("executorch")
pytest.importorskip("torchao")

from penjing.runtimes import executorch as runtime
from penjing.writers import executorch as writer


def model_of(module: nn.Module, x: torch.Tensor, interface: str = "tensor") -> Model:
    name = "pixel_values" if interface == "image" else "x"
    return Model(module.eval(), interface, {name: x}, Source("factory", "tiny", "0"))


def quantize(model: Model, path: str, bits: int = 8, group: int = 0) -> IntegerPlanes:
    weight = model.module.get_submodule(path).weight.detach()
    planes = rtn.fit(weight.reshape(len(weight), -1), Scheme(bits, group, True))
    planes = replace(planes, shape=tuple(weight.shape))
    perform(model, Edit("quantize", f"{path}.weight", planes, ""))
    return planes


def fix(model: Model, path: str, low: float, high: float) -> ActivationRange:
    scale = (high - low) / 255
    found = ActivationRange(scale, round(-low / scale))
    perform(model, Edit("activation", path, found, ""))
    return found


def on_grid(x: torch.Tensor, found: ActivationRange) -> torch.Tensor:
    codes = torch.clamp(torch.round(x / found.scale) + found.zero_point, 0, 255)
    return (codes.double() - found.zero_point) * found.scale


def ran(model: Model, folder: Path) -> np.ndarray:
    writer.write(model, folder / "model.pte")
    session = runtime.open(folder / "model.pte", threads=1)
    return session.run({name: x.numpy() for name, x in model.example.items()})


def error(got: np.ndarray, want: torch.Tensor) -> float:
    return float(np.linalg.norm(got - want.numpy()) / np.linalg.norm(want.numpy()))


def test_floats_of_any_batch_and_length(tmp_path: Path) -> None:
    model = bert(layers=1)
    assert export(model, tmp_path, ["executorch"])["executorch"] < 1e-4
    session = runtime.open(tmp_path / "model.pte", threads=1)
    assert session.inputs == {"input_ids": (None, None), "attention_mask": (None, None)}
    for length in (2, 5, 32):
        ids = torch.randint(1, 60, (3, length))
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            want = model.run(batch)
        got = session.run({name: x.numpy() for name, x in batch.items()})
        np.testing.assert_allclose(got, want.numpy(), atol=1e-4)


def test_fixed_ranges_are_kept_where_outputs_stay_in_floats(tmp_path: Path) -> None:
    """An input beyond the range is cut at its end, as in float64 by hand."""
    torch.manual_seed(0)
    model = model_of(nn.Sequential(nn.Linear(24, 40)), 2 * torch.randn(3, 5, 24))
    planes = quantize(model, "0")
    found = fix(model, "0", -1.5, 2.5)
    want = on_grid(model.example["x"], found) @ planes.dequantize().double().T
    want = want + model.module[0].bias.detach()
    assert error(ran(model, tmp_path), want) < 1e-3
    # The range found at run time is another: the test can tell.
    clipped = model.example["x"].double() @ planes.dequantize().double().T
    assert error(ran(model, tmp_path), clipped + model.module[0].bias.detach()) > 0.05


def test_eight_bit_weights_are_stored_in_eight(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of(nn.Sequential(nn.Linear(256, 512, bias=False)), torch.randn(2, 256))
    writer.write(model, tmp_path / "plain.pte")
    quantize(model, "0")
    fix(model, "0", -4, 4)
    writer.write(model, tmp_path / "small.pte")
    plain, small = ((tmp_path / n).stat().st_size for n in ("plain.pte", "small.pte"))
    assert plain > 4 * 256 * 512
    assert 256 * 512 < small < 256 * 512 + 4 * 512 + 2 * 512 + 8192


class Mobile(nn.Module):
    """A depthwise convolution between two of 1 x 1."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.each = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.narrow, self.head = nn.Conv2d(16, 8, 1), nn.Linear(8, 5)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        x = functional.relu6(self.wide(pixel_values))
        x = self.narrow(functional.relu6(self.each(x)))
        return self.head(x.mean((2, 3)))


def mobile() -> Model:
    torch.manual_seed(1)
    return model_of(Mobile(), torch.randn(2, 3, 12, 12), "image")


def test_convolutions_between_roundings_and_before_floats(tmp_path: Path) -> None:
    model = mobile()
    ranges = {"wide": (-2, 2), "each": (0, 1.5), "narrow": (0, 1), "head": (-1, 1)}
    planes, found = {}, {}
    for path, (low, high) in ranges.items():
        planes[path] = quantize(model, path)
        found[path] = fix(model, path, low, high)
    assert writer.closed(model) == {"wide", "each"}
    x = model.example["pixel_values"]
    for path in ("wide", "each", "narrow"):
        layer = model.module.get_submodule(path)
        x = functional.conv2d(
            on_grid(x, found[path]), planes[path].dequantize().double(), layer.bias.double(),
            layer.stride, layer.padding, 1, layer.groups,
        )  # fmt: skip
        x = (x if path == "narrow" else functional.relu6(x)).detach()
    weight = planes["head"].dequantize().double()
    want = on_grid(x.mean((2, 3)), found["head"]) @ weight.T + model.module.head.bias.detach()
    # A value on the edge between two codes may fall either way.
    assert error(ran(model, tmp_path), want) < 0.02
    assert export(model, tmp_path, ["executorch"])["executorch"] < 0.05


def test_all_products_are_in_xnnpack_and_its_constants_are_bytes(tmp_path: Path) -> None:
    from executorch.exir._serialize import _deserialize_pte_binary

    model = mobile()
    for path in ("wide", "each", "narrow", "head"):
        quantize(model, path)
        fix(model, path, -1, 1)
    writer.write(model, tmp_path / "model.pte")
    found = _deserialize_pte_binary((tmp_path / "model.pte").read_bytes())
    plan = next(p for p in found.program.execution_plan if p.name == "forward")
    assert {d.id for d in plan.delegates} == {"XnnpackBackend"}
    others = {f"{op.name}.{op.overload}" for op in plan.operators}
    assert not [name for name in others if "conv" in name or "linear" in name or "mm" in name]


def test_weights_alone_and_ranges_at_run_time_round_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for found in (None, ActivationRange(0.0, 0)):
        model = model_of(nn.Sequential(nn.Linear(64, 32)), torch.randn(4, 64))
        planes = quantize(model, "0")
        if found is not None:
            perform(model, Edit("activation", "0", found, ""))
        x = model.example["x"].double()
        low, high = x.amin(1, True).clamp(max=0), x.amax(1, True).clamp(min=0)
        step = (high - low) / 255
        zero = torch.round(-low / step)
        rounded = (torch.clamp(torch.round(x / step) + zero, 0, 255) - zero) * step
        want = rounded @ planes.dequantize().double().T + model.module[0].bias.detach()
        assert error(ran(model, tmp_path), want) < 1e-3


def test_divided_channels(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of(nn.Sequential(nn.Linear(16, 8, bias=False)), torch.randn(6, 16))
    planes = quantize(model, "0")
    channels = torch.rand(16) + 0.5
    found = ActivationRange(4 / 255, 128, channels)
    perform(model, Edit("activation", "0", found, ""))
    want = on_grid(model.example["x"] / channels, found) @ planes.dequantize().double().T
    assert error(ran(model, tmp_path), want) < 5e-3


@pytest.mark.parametrize("group", [32, 0])
def test_blocks_of_four_bits(group: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of(nn.Sequential(nn.Linear(128, 64, bias=False)), torch.randn(5, 128))
    planes = quantize(model, "0", bits=4, group=group)
    want = model.example["x"].double() @ planes.dequantize().double().T
    # Inputs rounded to 8 bits, scales to bfloat16.
    assert error(ran(model, tmp_path), want) < 0.01
    assert (tmp_path / "model.pte").stat().st_size < 128 * 64 / 2 + 64 * 4 * 4 + 8192


@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 8), (3, 0)])
def test_tables_in_few_bits(bits: int, group: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = model_of(nn.Sequential(nn.Embedding(40, 24)), torch.arange(40).reshape(5, 8))
    planes = rtn.fit(model.module[0].weight.detach(), Scheme(bits, group))
    perform(model, Edit("quantize", "0.weight", planes, ""))
    want = planes.dequantize().reshape(5, 8, 24)
    assert error(ran(model, tmp_path), want) < 1e-6


def refused(model: Model, folder: Path, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        writer.write(model, folder / "model.pte")
    assert not list(folder.iterdir())


def test_what_has_no_kernel_is_refused_by_its_name(tmp_path: Path) -> None:
    model = model_of(nn.Sequential(nn.Linear(24, 8)), torch.randn(2, 24))
    quantize(model, "0", bits=5)
    refused(model, tmp_path, r"0\.weight: 1 plane of 5 bits")
    refused(llama(layers=1), tmp_path, "decoder")
    model = mobile()
    quantize(model, "each")
    refused(model, tmp_path, r"each\.weight: a grouped Conv2d with inputs in floats")
    fix(model, "each", 0, 6)  # what follows reads its output in floats
    refused(model, tmp_path, r"each\.weight: .*not rounded")


def test_an_export_says_nothing_of_its_own(tmp_path: Path) -> None:
    """In a fresh process: the runtime looks at the processor once, and tells of each look."""
    code = """
import pathlib, sys, torch
from penjing.export import export
from penjing.model import Model, Source
model = Model(torch.nn.Linear(3, 2), "tensor", {"x": torch.ones(2, 3)}, Source("factory", "", ""))
export(model, pathlib.Path(sys.argv[1]), ["executorch"])
"""
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "model.pte").is_file()


def test_without_executorch_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.pte").write_bytes(b"0")
    for name in [n for n in sys.modules if n.split(".")[0] == "executorch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "executorch", None)
    for call in (writer.require, lambda: runtime.open(tmp_path / "model.pte", threads=1)):
        with pytest.raises(UsageError) as caught:
            call()
        assert "pip install 'penjing[edge]'" in str(caught.value)
