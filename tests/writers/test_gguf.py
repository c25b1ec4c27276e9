from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf as package
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

import penjing
from penjing import edits
from penjing.errors import ExportError
from penjing.model import Model
from penjing.planes import IntegerPlanes, Scheme
from penjing.quantizers import rtn
from penjing.recipe import ActivationRange, Edit
from penjing.writers import gguf
from penjing.writers._gguf_blocks import blocks, kind_of, problem

TOKENS = [*(chr(33 + k) for k in range(60)), "<s>", "</s>", "AB", "ABC"]


def source(path: Path, *, tied: bool = False, heads: int = 4, kv_heads: int = 2) -> Path:
    """A tiny llama of random weights with a byte-pair tokenizer, written by hand."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=96, vocab_size=len(TOKENS),
        max_position_embeddings=64, tie_word_embeddings=tied,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config)
    writer = package.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(64)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 60 + [3, 3, 1, 1])
    writer.add_token_merges(["A B", "AB C"])
    writer.add_bos_token_id(60)
    writer.add_eos_token_id(61)
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, value in module.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem == "lm_head" and tied:
            continue
        array = value.numpy()
        if stem.endswith(("q_proj", "k_proj")):
            count = heads if stem.endswith("q_proj") else kv_heads
            halves = array.reshape(count, 2, -1, 64)
            array = np.stack([halves[:, 0], halves[:, 1]], 2).reshape(array.shape)
        if stem.startswith("model.layers."):
            number, _, rest = stem.removeprefix("model.layers.").partition(".")
            stem = f"blk.{number}.{parts[rest]}"
        else:
            stem = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}.get(
                stem, "output"
            )
        writer.add_tensor(f"{stem}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantize(model: Model, scheme: Scheme, *, tables: bool = True) -> None:
    for name, value in list(model.parameters()):
        if value.ndim == 2 and (tables or "proj" in name):
            planes = rtn.fit(value.detach(), scheme, None)
            edits.perform(model, Edit("quantize", name, planes, "test"))


def matrix(bits: int, group: int, *, symmetric: bool, shift: bool = False) -> IntegerPlanes:
    random = torch.Generator().manual_seed(bits + group)
    planes = rtn.fit(
        torch.randn(6, 128, generator=random), Scheme(bits, group, symmetric, scale_bits=16), None
    )
    if not shift:
        return planes
    # A minimum in float16, as Q4_1 stores it.
    low = torch.randn(planes.shift.shape, generator=random).half().float()
    return IntegerPlanes(planes.codes, planes.bits, planes.scale, low, planes.group, scale_bits=16)


@pytest.mark.parametrize("group", [32, 64, 0])
@pytest.mark.parametrize(
    ("bits", "symmetric", "name"),
    [(4, True, "Q4_0"), (4, False, "Q4_1"), (5, True, "Q5_0"), (5, False, "Q5_1"),
     (8, True, "Q8_0")],
)  # fmt: skip
def test_blocks_dequantize_to_the_planes_exactly(
    bits: int, symmetric: bool, name: str, group: int
) -> None:
    planes = matrix(bits, group, symmetric=symmetric, shift=not symmetric)
    assert not problem(planes)
    assert kind_of(planes).name == name
    found = package.quants.dequantize(blocks(planes), kind_of(planes))
    np.testing.assert_array_equal(found, planes.dequantize().numpy())
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    found = package.quants.dequantize(blocks(planes, order), kind_of(planes))
    np.testing.assert_array_equal(found, planes.dequantize()[order].numpy())


def test_whole_zero_points_and_wide_scales_are_rounded_to_float16() -> None:
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    for scheme in (Scheme(4, 32, False), Scheme(4, 32, True), Scheme(8, 32, True, scale_bits=8)):
        planes = rtn.fit(weight, scheme, None)
        assert not problem(planes)
        found = package.quants.dequantize(blocks(planes), kind_of(planes))
        most = planes.scale[0].amax() * 2 ** planes.bits[0]
        error = np.abs(found - planes.dequantize().numpy()).max()
        assert 0 < error < 2**-10 * float(most)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "scheme",
    [Scheme(8, 32, True, scale_bits=16), Scheme(4, 32, True, scale_bits=16), Scheme(4, 32)],
)
def test_a_model_is_read_back_with_its_logits_and_tokenizer(
    tmp_path: Path, scheme: Scheme, tied: bool
) -> None:
    model = penjing.load(source(tmp_path / "source.gguf", tied=tied))
    quantize(model, scheme)
    gguf.write(model, tmp_path / "out.gguf")
    again = penjing.load(tmp_path / "out.gguf")
    assert again.tied() == model.tied()
    with torch.no_grad():
        wanted, found = model.run(model.example), again.run(model.example)
    exact = scheme.scale_bits == 16
    limit = 0 if exact else 2e-3 * float(wanted.abs().max())
    torch.testing.assert_close(found, wanted, rtol=0, atol=limit)
    assert again.tokenizer("ABCAB!")["input_ids"] == model.tokenizer("ABCAB!")["input_ids"]
    reader = package.GGUFReader(tmp_path / "out.gguf")
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    wanted_kind = {(8, True): "Q8_0", (4, True): "Q4_0"}.get(
        (int(scheme.bits), scheme.symmetric), "Q4_1"
    )
    assert {k for n, k in kinds.items() if "norm" not in n} == {wanted_kind}
    assert {k for n, k in kinds.items() if "norm" in n} == {"F32"}
    assert ("output.weight" in kinds) is not tied
    before = package.GGUFReader(tmp_path / "source.gguf")
    for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.pre",
                 "tokenizer.ggml.token_type", "tokenizer.ggml.eos_token_id", "general.name",
                 "llama.rope.freq_base"):  # fmt: skip
        assert reader.fields[name].contents() == before.fields[name].contents()
    assert (
        reader.fields["general.file_type"].contents()
        == {"Q8_0": 7, "Q4_0": 2, "Q4_1": 3}[wanted_kind]
    )


def test_an_edited_shape_and_unquantized_matrices(tmp_path: Path) -> None:
    model = penjing.load(source(tmp_path / "source.gguf"))
    half = model.module.get_parameter("model.layers.0.mlp.up_proj.weight")
    with torch.no_grad():
        half.copy_(half.half())
    edits.perform(model, Edit("drop", "model.layers.1", None, "test"))
    gguf.write(model, tmp_path / "out.gguf")
    reader = package.GGUFReader(tmp_path / "out.gguf")
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert reader.fields["llama.block_count"].contents() == 1
    assert kinds["blk.0.ffn_up.weight"] == "F16"
    assert kinds["blk.0.ffn_down.weight"] == "F32"
    again = penjing.load(tmp_path / "out.gguf")
    with torch.no_grad():
        torch.testing.assert_close(
            again.run(model.example), model.run(model.example), rtol=0, atol=0
        )


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [(Scheme(3, 32, True), "3 bits"), (Scheme(8, 32), "8 bits, asymmetric"),
     (Scheme(4, 16, True), "groups of 16"), (Scheme(2, codes="binary"), "planes"),
     (Scheme(4, 32), "rotated")],
)  # fmt: skip
def test_what_gguf_cannot_express_is_refused_and_nothing_is_left(
    tmp_path: Path, scheme: Scheme, reason: str
) -> None:
    model = penjing.load(source(tmp_path / "source.gguf"))
    name = "model.layers.0.mlp.up_proj.weight"
    weight = model.module.get_parameter(name).detach()
    if scheme.codes == "binary":
        codes = torch.zeros(2, *weight.shape, dtype=torch.uint8)
        scale = torch.ones(2, len(weight), 1)
        planes = IntegerPlanes(codes, (1, 1), scale, -scale.sum(0) / 2, weight.shape[1])
    else:
        planes = rtn.fit(weight, scheme, None)
    if reason == "rotated":
        planes = replace(planes, rotation=0)
    edits.perform(model, Edit("quantize", name, planes, "test"))
    with pytest.raises(ExportError, match=f"{name}: .*{reason}.*allowed: .*next: "):
        gguf.write(model, tmp_path / "out.gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["source.gguf"]


def test_scales_below_float16_and_other_sources_are_refused(tmp_path: Path) -> None:
    path = source(tmp_path / "source.gguf")
    model = penjing.load(path)
    name = "model.layers.0.mlp.up_proj.weight"
    small = rtn.fit(model.module.get_parameter(name).detach() * 1e-5, Scheme(4, 32, True), None)
    assert problem(small) == "scales that float16 does not hold"
    layer = "model.layers.0.mlp.up_proj"
    edits.perform(model, Edit("activation", layer, ActivationRange(0.0, 0), "test"))
    assert gguf.check(model) == [f"{layer}: 8-bit inputs"]
    with open(path, "ab") as file:
        file.write(b"\0" * 32)
    assert "as it was" in gguf.check(model)[0]
    path.unlink()
    assert "as it was" in gguf.check(model)[0]


def test_layers_of_several_shapes_are_refused(tmp_path: Path) -> None:
    model = penjing.load(source(tmp_path / "source.gguf"))
    mlp = model.module.model.layers[1].mlp  # type: ignore[union-attr,index]
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, torch.nn.Linear(64, 32, bias=False))
    mlp.down_proj = torch.nn.Linear(32, 64, bias=False)  # type: ignore[union-attr,assignment]
    assert gguf.check(model) == ["layers of several shapes"]


def test_an_artifact_is_exported_and_verified(tmp_path: Path) -> None:
    model = penjing.load(source(tmp_path / "source.gguf", tied=True))
    quantize(model, Scheme(4, 32, True, scale_bits=16))
    penjing.save(model, tmp_path / "artifact")
    found = penjing.export(tmp_path / "artifact", ["gguf", "compressed-tensors"])
    assert max(found.values()) < 1e-5
    checks = {check.name: check for check in penjing.verify(tmp_path / "artifact")}
    assert all(check.ok for check in checks.values())
    assert {"parity gguf", "parity compressed-tensors", "model.gguf"} <= set(checks)
    config = json.loads((tmp_path / "artifact/compressed-tensors/config.json").read_text())
    assert config["tie_word_embeddings"] is True
    tensors = load_file(tmp_path / "artifact/compressed-tensors/model.safetensors")
    assert "lm_head.weight" not in tensors
