"""Attention fused with its integer product: the same numbers, and only where the mask allows it."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.model import Batch, Model
from penjing.recipe import Recipe
from penjing.steps.quantize import Quantize
from penjing.writers import onnx as writer


def _integers(model: Model, batches: list[Batch]) -> Model:
    step = Quantize(8, symmetric=True, activations=8, paired=True, method="rtn")
    return apply(model, Recipe((step,)), batches).model


def _run(proto: onnx.ModelProto, batch: Batch) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    wanted = {i.name for i in session.get_inputs()}
    found = session.run(None, {n: v.numpy() for n, v in batch.items() if n in wanted})[0]
    return np.asarray(found)


def _kinds(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in proto.graph.node)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_the_fused_operator_gives_what_the_parts_give(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In onnxruntime, with padding on either side and holes, at other sizes than the tracer's."""
    model = net.bert(2) if kind == "text" else net.vit(2)
    batches: list[Batch]
    if kind == "text":
        batches = [net.text_batch(seed) for seed in (1, 2)]
        ids = torch.randint(1, 20, (3, 9), generator=torch.Generator().manual_seed(3))
        mask = torch.tensor([[1] * 5 + [0] * 4, [0] * 2 + [1] * 7, [1, 0] * 4 + [1]])
        batches.append({"input_ids": ids, "attention_mask": mask})
    else:
        batches = [{"pixel_values": torch.randn(n, 3, 16, 16)} for n in (2, 1, 3)]
    made = _integers(model, batches)
    # Channels of what attention gives are divided before they are rounded.
    paths = [p for p in made.activations if p.endswith(("attention.output.dense", "o_proj"))]
    for path in paths:
        width: Any = made.module.get_submodule(path).in_features
        channels = torch.linspace(0.5, 2, width)
        made.activations[path] = replace(made.activations[path], channels=channels)
    fused = writer.quantized_graph(made)
    assert _kinds(fused)["QAttention"] == 2
    assert not _kinds(fused)["Attention"] + _kinds(fused)["Split"]
    monkeypatch.setattr(writer, "fuse_attention", lambda graph: None)
    parts = writer.quantized_graph(made)
    assert _kinds(parts)["Attention"] == 2
    assert _kinds(parts)["Mul"] == _kinds(fused)["Mul"] + len(paths)
    for batch in batches:
        np.testing.assert_allclose(_run(fused, batch), _run(parts, batch), atol=1e-6)


def test_a_decoder_s_mask_is_not_padding() -> None:
    """Causal, and fewer heads of keys: left as it is, and still right."""
    model = net.llama(2, embedding=True)
    batches = [net.text_batch(seed) for seed in (1, 2)]
    made = _integers(model, batches)
    proto = writer.quantized_graph(made)
    assert not _kinds(proto)["QAttention"]
    with torch.no_grad():
        wanted = made.run(batches[0]).numpy()
    np.testing.assert_allclose(_run(proto, batches[0]), wanted, atol=1e-4)
