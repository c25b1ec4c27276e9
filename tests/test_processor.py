"""What the processor is asked, against what its arithmetic really does."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from penjing import processor
from penjing.calibrate import LayerStats
from penjing.quantizers import gptq, rtn
from penjing.scheme import Scheme


def product(tmp_path: Path, weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x [n, in] uint8 times weight [in, out] int8 as onnxruntime computes it."""
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [len(x), weight.shape[1]])],
        [onnx.numpy_helper.from_array(weight, "w")],
    )
    path = tmp_path / "product.onnx"
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), path)
    return onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0]


def test_products_of_the_bits_that_are_named_are_exact(tmp_path: Path) -> None:
    """The largest codes of all, whose sums are the first to saturate."""
    largest = 2 ** (processor.weight_bits() - 1) - 1
    x = np.full((4, 64), 255, np.uint8)
    for code in (largest, -largest - 1):
        weight = np.full((64, 32), code, np.int8)
        got = product(tmp_path, weight, x)
        assert np.array_equal(got, x.astype(np.int64) @ weight.astype(np.int64))


@pytest.mark.parametrize("method", [rtn, gptq])
def test_products_of_paired_codes_are_exact_everywhere(tmp_path: Path, method: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator) ** 3
    x = torch.randn(500, 64, generator=generator)
    stats = LayerStats(gram=(x.T @ x).double() / 500, count=500)
    codes = method.fit(weight, Scheme(8, symmetric=True, paired=True), stats).signed
    assert codes is not None
    assert int(codes.abs().max()) > 64
    inputs = np.random.default_rng(0).choice([0, 255], (200, 64)).astype(np.uint8)
    got = product(tmp_path, np.ascontiguousarray(codes.numpy().T), inputs)
    assert np.array_equal(got, inputs.astype(np.int64) @ codes.numpy().T.astype(np.int64))


@pytest.mark.skipif(processor.weight_bits() == 8, reason="this processor adds bytes exactly")
def test_eight_bits_would_not_be_exact_here(tmp_path: Path) -> None:
    x, weight = np.full((4, 64), 255, np.uint8), np.full((64, 32), 127, np.int8)
    got = product(tmp_path, weight, x)
    assert not np.array_equal(got, x.astype(np.int64) @ weight.astype(np.int64))


@pytest.mark.parametrize(
    ("able", "bits"),
    [
        ({"architecture": "x86_64", "avx2": True}, 7),
        ({"architecture": "x86_64", "avx2": True, "avx512_vnni": True}, 8),
        ({"architecture": "x86_64", "avx_vnni": True}, 8),
        ({"architecture": "arm64"}, 8),
        ({}, 8),
    ],
)
def test_which_processors_saturate(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, object], bits: int
) -> None:
    monkeypatch.setattr(processor, "_capabilities", lambda: able)
    assert processor.weight_bits() == bits


@pytest.mark.parametrize("able", [{}, {"avx512_bf16": True}])
def test_bfloat16_only_where_it_is_fast(
    monkeypatch: pytest.MonkeyPatch, able: dict[str, object]
) -> None:
    monkeypatch.setattr(processor, "_capabilities", lambda: able)
    with processor.autocast("cpu"):
        made = torch.ones(2, 2) @ torch.ones(2, 2)
    assert made.dtype == (torch.bfloat16 if able else torch.float32)
    with processor.autocast("cpu", enabled=False):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
