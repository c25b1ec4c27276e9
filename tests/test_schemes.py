"""Every scheme in every runtime that takes it: what comes out is what the stored bytes say.

The artifact's file is decoded here by docs/artifact.md with numpy alone; a layer is then run on
one-hot inputs, which 8-bit rounding of inputs leaves exact, through onnxruntime, OpenVINO and the
packed torch layers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn

from penjing import codebooks
from penjing.edits import perform
from penjing.model import Model, Source
from penjing.packedlayers import pack_model
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import additive, binary, e8, power2, residual, rtn, ternary, trellis
from penjing.recipe import Edit
from penjing.rotation import Rotation
from penjing.runtimes import onnxruntime, openvino
from penjing.runtimes.torch import Session
from penjing.writers import onnx as onnx_writer
from penjing.writers import openvino as openvino_writer
from penjing.writers.artifact import save

OUT, IN = 24, 128
SOURCE = Source("factory", "here", "0")  # one object: layers of one source are traced once
FITS = {
    "integer": rtn.fit, "binary": binary.fit, "residual": residual.fit, "ternary": ternary.fit,
    "power2": power2.fit, "additive": additive.fit, "e8": e8.fit, "trellis": trellis.fit,
}  # fmt: skip
SCHEMES = [
    *(Scheme(b, g, s, "integer", w)
      for b in range(2, 9) for g, s, w in [(0, False, 32), (64, True, 16), (32, False, 8)]),
    *(Scheme(b, 64, True, "binary", w) for b, w in [(1, 32), (2, 16), (3, 8), (4, 8)]),
    *(Scheme(b, 0, False, "residual", 16) for b in (4, 6, 8)),
    *(Scheme(b, 64, True, "ternary", 16) for b in (1.6, 3.2)),
    *(Scheme(b, 32, True, "power2", 8) for b in (2, 3, 4)),
    *(Scheme(b, 0, True, "additive", 16) for b in (1, 1.5)),
    *(Scheme(b, 0, True, "e8", 8) for b in (1.5, 2, 2.5)),
    *(Scheme(b, 0, True, "trellis", 8) for b in (1, 2, 3)),
]  # fmt: skip
VECTORS = ("additive", "e8", "trellis")


def decoded(folder: Path) -> np.ndarray:
    """The weight [out, in] of the one layer, of the artifact's bytes alone."""
    table = json.loads((folder / "structure.json").read_text())["planes"]["weight"]
    stored = {}
    for file in (folder / "weights").iterdir():
        stored |= {k.removeprefix("weight::"): v for k, v in load_file(file).items()}
    group = np.arange(IN) // table["group"]

    def scales(name: str) -> np.ndarray:
        value = stored[name]
        if f"{name}_step" in stored:  # uint8 steps, a bfloat16 for every 64 scales of a plane
            step = torch.from_numpy(stored[f"{name}_step"].view(np.int16).copy())
            steps = step.view(torch.bfloat16).float().numpy().reshape(len(value), -1)
            flat = value.reshape(len(value), -1).astype(np.float32)
            value = (flat * steps.repeat(64, 1)[:, : flat.shape[1]]).reshape(value.shape)
        return np.asarray(value, np.float64)

    scale = scales("scale")
    codes = [unpacked(stored[f"codes{k}"], bits, table) for k, bits in enumerate(table["bits"])]
    integers = []
    for k, code in enumerate(codes):
        if "window" in table:  # a column's codes together, the newest lowest
            above = np.vstack([np.zeros((table["window"] - 1, IN), np.int64), code])
            bits = int(table["bits"][k])
            code = sum(
                above[table["window"] - 1 - late :][:OUT] << bits * late
                for late in range(table["window"])
            )
        if "tables" in table:
            place = table["tables"][k]
            named = isinstance(place, str)
            entries = codebooks.table(place).numpy() if named else stored[f"table{place}"]
            code = np.asarray(entries, np.int64)[code].reshape(OUT, -1)
        integers.append(code)
    weight = np.zeros((OUT, IN))
    for k, z in enumerate(integers):
        weight += scale[min(k, len(scale) - 1)][:, group] * z
    offset = table.get("offset", "float")
    if offset == "zero":
        groups = -(-IN // table["group"])
        zero = numbers(stored["zero"], table["bits"][0], OUT * groups).reshape(OUT, groups)
        weight -= (scale[0] * zero)[:, group]
    elif offset == "centre":
        for k, centre in enumerate(table["centre"]):
            weight -= centre * scale[min(k, len(scale) - 1)][:, group]
    else:
        weight += scales("shift").reshape(OUT, -1)[:, group]
    return weight


def unpacked(rows: np.ndarray, bits: float, table: dict[str, Any]) -> np.ndarray:
    return np.stack([numbers(row, bits, IN // table.get("dim", 1)) for row in rows])


def numbers(row: np.ndarray, bits: float, count: int) -> np.ndarray:
    """Codes of one row of bytes: least significant bits first; 1.6 bits are five to a byte."""
    row = row.reshape(-1)
    if bits == 1.6:
        digits = row[:, None].astype(int) // 3 ** np.arange(5) % 3
        return digits.reshape(-1)[:count]
    flat = np.unpackbits(row, bitorder="little")[: count * int(bits)].reshape(count, int(bits))
    return flat.astype(np.int64) @ (1 << np.arange(int(bits)))


def layer(planes: IntegerPlanes) -> Model:
    module = nn.Linear(IN, OUT, bias=False).eval()
    model = Model(module, "tensor", {"x": torch.eye(IN)}, SOURCE)
    perform(model, Edit("quantize", "weight", planes, "test"))
    return model


def planes_of(scheme: Scheme) -> IntegerPlanes:
    made = torch.Generator().manual_seed(int(8 * scheme.bits))
    weight = torch.randn(OUT, IN, generator=made) * torch.rand(OUT, 1, generator=made)
    return FITS[scheme.codes](weight, scheme, None)


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_bytes_are_what_runs(scheme: Scheme, rotated: bool, tmp_path: Path) -> None:
    planes = replace(planes_of(scheme), rotation=3 if rotated else None)
    model = layer(planes)
    save(model, tmp_path / "artifact")
    want = decoded(tmp_path / "artifact")
    if rotated:
        want = Rotation(IN, 3).inverse(torch.from_numpy(want)).numpy()
    most = np.abs(want).max()
    assert np.abs(model.module.weight.detach().numpy() - want).max() <= 2e-6 * most
    eye = {"x": np.eye(IN, dtype=np.float32)}
    # A rotated one-hot input is none any more, and onnxruntime rounds it to 8 bits.
    rounding = 2e-2 if rotated else 2e-6
    got = Session(pack_model(model), 1).run(eye).T
    assert np.abs(got - want).max() <= 4e-6 * most
    if scheme.codes in VECTORS:
        assert onnx_writer.check(model)
        assert openvino_writer.check(model)
        return
    onnx_writer.write(model, tmp_path / "model.onnx")
    got = onnxruntime.open(tmp_path / "model.onnx", threads=1).run(eye).T
    assert np.abs(got - want).max() <= rounding * most
    if scheme.codes == "power2":
        assert openvino_writer.check(model)
        return
    openvino_writer.write(model, tmp_path / "ir")
    got = openvino.open(tmp_path / "ir", threads=1).run(eye).T
    assert np.abs(got - want).max() <= 1e-5 * most
