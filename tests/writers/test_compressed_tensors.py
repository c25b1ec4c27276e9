from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import penjing
from penjing import edits
from penjing.errors import ExportError, InputError
from penjing.model import Model
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import rtn
from penjing.recipe import ActivationRange, Edit
from penjing.writers import compressed_tensors

NAME = "model.layers.0.mlp.down_proj"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, vocab_size=50, max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path / "source"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({chr(33 + k): k for k in range(50)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    return penjing.load(folder)


def put(model: Model, name: str, scheme: Scheme, *, inputs: bool = False) -> None:
    planes = rtn.fit(model.module.get_parameter(f"{name}.weight").detach(), scheme, None)
    edits.perform(model, Edit("quantize", f"{name}.weight", planes, "test"))
    if inputs:
        edits.perform(model, Edit("activation", name, ActivationRange(0.0, 0), "test"))


def quantize(model: Model, scheme: Scheme, *, inputs: bool = False) -> None:
    for name, module in list(model.module.named_modules()):
        if isinstance(module, torch.nn.Linear) and "proj" in name:
            put(model, name, scheme, inputs=inputs)


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of each row: code i is bits i * bits and on of the row's int32 words."""
    found = np.zeros((len(words), count), np.int64)
    for row, line in enumerate(words.astype(np.int64) & 0xFFFFFFFF):
        whole = sum(int(word) << (32 * k) for k, word in enumerate(line))
        found[row] = [(whole >> (bits * i)) & (2**bits - 1) for i in range(count)]
    return found


def by_hand(tensors: dict[str, np.ndarray], name: str, bits: int, *, symmetric: bool) -> Any:
    scale = tensors[f"{name}.weight_scale"].astype(np.float32)
    if f"{name}.weight" in tensors:
        return tensors[f"{name}.weight"].astype(np.float32) * scale
    out, inputs = tensors[f"{name}.weight_shape"]
    codes = unpack(tensors[f"{name}.weight_packed"], bits, inputs)
    zero = np.full(scale.shape, 2 ** (bits - 1))
    if not symmetric:
        zero = unpack(tensors[f"{name}.weight_zero_point"].T, bits, out).T
    each = inputs // scale.shape[1]
    q = (codes - zero.repeat(each, 1)).astype(np.float32)
    return q * scale.repeat(each, 1)


SCHEMES = [
    *(Scheme(bits, 32, symmetric, scale_bits=16)
      for bits in (2, 3, 4, 5, 8) for symmetric in (True, False)),
    Scheme(4, 0, False, scale_bits=16), Scheme(8, 0, True, scale_bits=16), Scheme(4, 32),
    Scheme(4, 16, True, scale_bits=8), Scheme(6, 32),
]  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_unpacked_by_hand_it_is_what_the_planes_are(
    model: Model, tmp_path: Path, scheme: Scheme
) -> None:
    quantize(model, scheme)
    compressed_tensors.write(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    read = compressed_tensors.tensors(tmp_path / "out")
    # code * scale and shift are rounded on their own in float32, not so from float16 scales.
    limit = 0 if scheme.scale_bits == 16 else 2**-21
    for name, planes in model.planes.items():
        wanted = planes.dequantize().numpy()
        module = name.removesuffix(".weight")
        found = by_hand(tensors, module, int(scheme.bits), symmetric=scheme.symmetric)
        most = limit * float(np.abs(wanted).max())
        np.testing.assert_allclose(found, wanted, rtol=0, atol=most)
        np.testing.assert_array_equal(read[name].numpy(), found)
    rest = {n for n, _ in model.parameters()} - set(model.planes)
    for name in rest:
        np.testing.assert_array_equal(tensors[name], model.module.get_parameter(name).detach())


def test_the_folder_has_what_readers_look_for(model: Model, tmp_path: Path) -> None:
    quantize(model, Scheme(4, 32, True, scale_bits=16))
    put(model, NAME, Scheme(8, 0, True, scale_bits=16), inputs=True)
    put(model, "model.embed_tokens", Scheme(3, 32))
    compressed_tensors.write(model, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", "model.safetensors", "vocab.json", "tokenizer_config.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    groups = config["quantization_config"]
    assert (groups["format"], groups["ignore"]) == ("mixed-precision", ["lm_head"])
    packed, integers = groups["config_groups"].values()
    assert len(packed["targets"]) == 13
    assert (packed["format"], packed["input_activations"]) == ("pack-quantized", None)
    assert packed["weights"]["group_size"] == 32
    assert integers["targets"] == [NAME]
    assert integers["format"] == "int-quantized"
    assert integers["weights"]["strategy"] == "channel"
    assert integers["input_activations"]["dynamic"] is True
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors[f"{NAME}.weight"].dtype == np.int8
    table = model.planes["model.embed_tokens.weight"].dequantize().numpy()
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"], table)


@pytest.mark.parametrize("scheme", [*SCHEMES[:8], *SCHEMES[-5:]], ids=str)
def test_transformers_reads_it(model: Model, tmp_path: Path, scheme: Scheme) -> None:
    pytest.importorskip("compressed_tensors")
    quantize(model, scheme)
    compressed_tensors.write(model, tmp_path / "out")
    # compressed-tensors 0.20 leaves packed zero points no room unless weights become floats.
    options = (
        {}
        if scheme.symmetric
        else {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    )
    again, missing = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, **options
    )
    assert not any(missing[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found, wanted = again(**model.example).logits, model.run(model.example)
    # That way it also multiplies in the type of the scales.
    half = options and scheme.scale_bits == 16
    limit = 1e-2 * float(wanted.abs().max()) if half else 2e-6
    torch.testing.assert_close(found, wanted, rtol=0, atol=limit)
    for name, planes in model.planes.items():
        torch.testing.assert_close(
            again.get_parameter(name).detach(), planes.dequantize(),
            rtol=2**-11 if half else 0, atol=1e-7,
        )  # fmt: skip


def test_transformers_reads_8_bit_inputs(model: Model, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    quantize(model, Scheme(8, 0, True, scale_bits=16), inputs=True)
    compressed_tensors.write(model, tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        # Decompressed by the first call.
        found = again(**model.example).logits
        wanted = model.run(model.example)
        floats = penjing.load(tmp_path / "source").run(model.example)
    for name, planes in model.planes.items():
        torch.testing.assert_close(
            again.get_parameter(name).detach(), planes.dequantize(), rtol=0, atol=0
        )
    # Ranges of a token there, of all tokens here: another rounding of about the same size.
    assert 0 < float((found - wanted).norm()) < 2 * float((wanted - floats).norm())


def planes_of(weight: torch.Tensor, zero: float, bits: int = 4) -> IntegerPlanes:
    codes = torch.zeros(1, *weight.shape, dtype=torch.uint8)
    scale = torch.ones(1, len(weight), 1)
    return IntegerPlanes(codes, (bits,), scale, -zero * scale[0], weight.shape[1])


def test_what_the_layout_cannot_express_is_refused(model: Model, tmp_path: Path) -> None:
    weight = model.module.get_parameter(f"{NAME}.weight").detach()
    with pytest.raises(ExportError, match="no linear layer is quantized"):
        compressed_tensors.write(model, tmp_path / "out")
    pruned = model.copy()
    edits.perform(pruned, Edit("mask", f"{NAME}.weight", weight > 0, "test"))
    with pytest.raises(ExportError, match="no layout that is still read"):
        compressed_tensors.write(pruned, tmp_path / "out")
    two = torch.zeros(2, *weight.shape, dtype=torch.uint8)
    scale = torch.ones(2, len(weight), 1)
    cases = {
        "zero points that are no whole numbers": planes_of(weight, 7.5),
        "zero points beyond the codes": planes_of(weight, 16.0),
        "2 planes of 1": IntegerPlanes(two, (1, 1), scale, -scale.sum(0) / 2, weight.shape[1]),
        "groups of 64 in rows of 96": rtn.fit(weight, Scheme(4, 64), None),
        "1 plane of 4 bits, rotated": replace(rtn.fit(weight, Scheme(4), None), rotation=0),
    }
    for reason, planes in cases.items():
        edits.perform(model, Edit("quantize", f"{NAME}.weight", planes, "test"))
        with pytest.raises(ExportError, match=f"{NAME}.*{reason}.*allowed: .*next: "):
            compressed_tensors.write(model, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_inputs_that_the_layout_cannot_express_are_refused(model: Model) -> None:
    put(model, NAME, Scheme(8, 32, True), inputs=True)
    assert "not symmetric, 8 or 7 bits" in compressed_tensors.check(model)[0]
    put(model, NAME, Scheme(8, 0, True), inputs=True)
    assert compressed_tensors.check(model) == []
    for bad in (ActivationRange(0.1, 128), ActivationRange(0.0, 0, torch.ones(96))):
        edits.perform(model, Edit("activation", NAME, bad, "test"))
        assert "a fixed range" in compressed_tensors.check(model)[0]
    other = "model.layers.1.mlp.up_proj"
    edits.perform(model, Edit("activation", other, ActivationRange(0.0, 0), "test"))
    assert f"{other}: 8-bit inputs" in compressed_tensors.check(model)[1]


def test_a_shape_that_no_configuration_has_and_one_that_it_has(
    model: Model, tmp_path: Path
) -> None:
    edits.perform(model, Edit("drop", "model.layers.1", None, "test"))
    put(model, NAME, Scheme(4, 32, True))
    compressed_tensors.write(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    mlp = model.module.model.layers[0].mlp  # type: ignore[union-attr,index]
    mlp.up_proj = torch.nn.Linear(64, 32, bias=False)  # type: ignore[union-attr,assignment]
    assert "config.json has no word" in compressed_tensors.check(model)[0]


def test_a_folder_that_exists_is_left_alone(model: Model, tmp_path: Path) -> None:
    put(model, NAME, Scheme(4, 32, True))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists"):
        compressed_tensors.write(model, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
