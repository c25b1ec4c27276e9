"""Real files, run in real processes."""

import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from penjing.errors import ExportError, InputError, UsageError
from penjing.measure import (
    Candidate,
    Measured,
    inputs_of,
    measure_files,
    median_ratio,
    physical_cores,
    stored_size,
)
from penjing.model import Model, Source
from penjing.result import Latency, Measurement
from penjing.runtimes._remote import Remote


def chain(path: Path, width: int, layers: int, external: bool = False) -> np.ndarray:
    """`layers` matrix products, written by hand; returns their product."""
    random = np.random.default_rng(0)
    weights = [
        random.standard_normal((width, width), np.float32) / width**0.5 for _ in range(layers)
    ]
    nodes = [
        helper.make_node("MatMul", [f"h{i}" if i else "x", f"w{i}"], [f"h{i + 1}"])
        for i in range(layers)
    ]
    nodes.append(helper.make_node("Identity", [f"h{layers}"], ["output"]))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data")
    product = np.eye(width, dtype=np.float32)
    for w in weights:
        product = product @ w
    return product


def example(width: int) -> Model:
    return Model(
        torch.nn.Identity(), "tensor", {"x": torch.zeros(1, width)}, Source("factory", "", "")
    )


def test_a_remote_computes_and_holds_no_torch(tmp_path: Path) -> None:
    product = chain(tmp_path / "a.onnx", 16, 3)
    x = np.random.default_rng(1).standard_normal((5, 16), np.float32)
    with Remote(tmp_path / "a.onnx", "onnxruntime", threads=1) as remote:
        np.testing.assert_allclose(remote.run({"x": x}), x @ product, atol=1e-4)
        modules = remote.modules()
        assert 10_000_000 < remote.peak_memory() < 300_000_000
        process = remote._process
    assert process.poll() is not None
    assert "onnxruntime" in modules
    assert not {"torch", "transformers"} & set(modules)


def test_errors_cross_the_pipe_and_the_session_goes_on(tmp_path: Path) -> None:
    product = chain(tmp_path / "a.onnx", 4, 1)
    with pytest.raises(InputError, match="no such ONNX file"):
        Remote(tmp_path / "missing.onnx", "onnxruntime", threads=1)
    with Remote(tmp_path / "a.onnx", "onnxruntime", threads=1) as remote:
        with pytest.raises(InputError, match="refuses"):
            remote.run({"x": np.zeros((1, 5), np.float32)})
        np.testing.assert_allclose(
            remote.run({"x": np.eye(4, dtype=np.float32)}), product, atol=1e-5
        )


def test_a_killed_process_is_an_error(tmp_path: Path) -> None:
    chain(tmp_path / "a.onnx", 4, 1)
    with Remote(tmp_path / "a.onnx", "onnxruntime", threads=1) as remote:
        remote._process.kill()
        with pytest.raises(ExportError, match="signal 9"):
            remote.run({"x": np.zeros((1, 4), np.float32)})


def test_a_larger_network_measures_larger(tmp_path: Path) -> None:
    chain(tmp_path / "small.onnx", 256, 1)
    chain(tmp_path / "large.onnx", 256, 12)
    files = [
        Candidate(tmp_path / "large.onnx", "onnxruntime", 12 * 256 * 256),
        Candidate(tmp_path / "small.onnx", "onnxruntime", 256 * 256),
    ]
    start = time.monotonic()
    large, small = measure_files(
        files, example(256), batch=64, user_batch=128, threads=1, runs=20, seconds=2
    )
    assert time.monotonic() - start < 20
    assert 4 < median_ratio(large, small) < 40
    for measured, file in ((large, files[0]), (small, files[1])):
        m = measured.measurement
        assert m.size_bytes == file.path.stat().st_size
        assert m.stored_bits_per_weight == pytest.approx(32, rel=0.02)
        assert m.latency_ms.batch == 64
        assert m.latency_ms.length is None
        assert m.latency_ms.median <= m.latency_ms.p95
        assert m.latency_batch_ms is not None
        assert m.throughput_per_second == pytest.approx(128e3 / m.latency_batch_ms.median)
        assert len(measured.rounds_ms) >= 3


def test_a_decoder_is_timed_on_one_token_after_the_prompt(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from penjing.writers.onnx import write

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ids = torch.randint(0, 50, (2, 8))
    model = Model(
        LlamaForCausalLM(config).eval(),
        "causal",
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        Source("factory", "", ""),
    )
    write(model, tmp_path / "model.onnx")
    file = Candidate(tmp_path / "model.onnx", "onnxruntime", 1)
    (found,) = measure_files([file], model, length=512, threads=1, runs=12, seconds=3)
    assert found.prefill_ms is not None
    assert found.measurement.latency_ms.length == found.prefill_ms.length == 512
    # 512 tokens cost far more than one, and the cache of 512 was really there.
    assert found.measurement.latency_ms.median < found.prefill_ms.median / 5


def test_the_ratio_is_of_rounds_not_of_medians() -> None:
    latency = Latency(1, 1, 1, None)

    def measured(*rounds: float) -> Measured:
        return Measured(Measurement(1, 1, 1, latency, 1), rounds)

    # Noise that falls on both leaves each round's ratio: 2, 2, 3.
    assert median_ratio(measured(2, 20, 30), measured(1, 10, 10)) == 2
    with pytest.raises(ValueError, match="zip"):
        median_ratio(measured(1), measured(1, 2))


def test_size_counts_every_file(tmp_path: Path) -> None:
    chain(tmp_path / "a.onnx", 64, 2, external=True)
    (tmp_path / "unrelated.txt").write_text("x" * 1000)
    data = tmp_path / "a.onnx.data"
    assert data.stat().st_size >= 2 * 64 * 64 * 4
    assert (
        stored_size(tmp_path / "a.onnx")
        == (tmp_path / "a.onnx").stat().st_size + data.stat().st_size
    )
    data.unlink()
    with pytest.raises(InputError, match=r"a\.onnx\.data"):
        stored_size(tmp_path / "a.onnx")
    ir = tmp_path / "ir"
    ir.mkdir()
    (ir / "model.xml").write_bytes(b"12345")
    (ir / "model.bin").write_bytes(b"123")
    assert stored_size(ir) == stored_size(ir / "model.xml") == 8


def test_inputs_have_the_asked_shape() -> None:
    text = {k: torch.ones(2, 9, dtype=torch.int64) for k in ("input_ids", "attention_mask")}
    model = Model(torch.nn.Identity(), "embedding", text, Source("factory", "", ""))
    model.module.config = type("C", (), {"vocab_size": 77})()
    made = inputs_of(model, batch=3, length=50)
    assert {k: v.shape for k, v in made.items()} == {
        "input_ids": (3, 50),
        "attention_mask": (3, 50),
    }
    assert 70 < made["input_ids"].max() < 77
    assert (made["attention_mask"] == 1).all()
    images = Model(
        torch.nn.Identity(), "image", {"pixel_values": torch.zeros(1, 3, 8, 8)}, model.source
    )
    assert inputs_of(images, batch=4)["pixel_values"].shape == (4, 3, 8, 8)


def test_sizes_below_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="batch"):
        measure_files([], example(4), batch=0)
    assert physical_cores() >= 1


@pytest.mark.parametrize("value", ["1", "0", "no", ""])
def test_threads_follow_the_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    free = physical_cores()
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert physical_cores() == (1 if value == "1" else free)
