"""Integer KV caches: the exported file keeps what torch says, and answers as torch does."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import apply
from penjing.cache import attention_layers, rounding_cache
from penjing.errors import ExportError
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.runtimes import onnxruntime as runtime
from penjing.steps.cache import Cache
from penjing.writers import onnx as writer

SMALL: dict[str, Any] = {"vocab_size": 64, "max_position_embeddings": 32}


def grouped(kind: Any, network: Any, width: int, layers: int = 2) -> Model:
    """Two queries to a head of keys, rotated positions."""
    torch.manual_seed(0)
    config = kind(
        hidden_size=32, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=width, **SMALL,
    )  # fmt: skip
    return net.wrap(net.sharpen(network(config)), "causal", net.text_batch(samples=2))


def llama() -> Model:
    return grouped(LlamaConfig, LlamaForCausalLM, 8)


def qwen3() -> Model:
    """Norms between the projections and the rotation."""
    return grouped(Qwen3Config, Qwen3ForCausalLM, 16)


def gpt2() -> Model:
    """No rotation, as many keys as queries, one projection for all three."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return net.wrap(net.sharpen(GPT2LMHeadModel(config)), "causal", net.text_batch(samples=2))


def rounded(make: Any, bits: int) -> Model:
    data = [net.text_batch(seed, samples=4) for seed in range(3)]
    return apply(make(), Recipe((Cache(bits),)), data).model


def exported(model: Model, folder: Path) -> runtime.Session:
    writer.write(model, folder / "model.onnx")
    return runtime.open(folder / "model.onnx", threads=1)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", [llama, gpt2, qwen3])
def test_whole_texts(make: Any, bits: int, tmp_path: Path) -> None:
    model = rounded(make, bits)
    session, batch = exported(model, tmp_path), net.text_batch(9, samples=3)
    with torch.no_grad():
        want, floats = model.run(batch).numpy(), make().run(batch).numpy()
    kept = batch["attention_mask"].bool().numpy()
    got = session.run({name: x.numpy() for name, x in batch.items()})
    assert np.abs(want - got)[kept].max() < 1e-3 * np.abs(want).max()
    # It is not the float network that was exported.
    assert np.abs(floats - got)[kept].max() > 20 * np.abs(want - got)[kept].max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("make", [llama, gpt2, qwen3])
def test_token_by_token(make: Any, bits: int, tmp_path: Path) -> None:
    model = rounded(make, bits)
    session, ids = exported(model, tmp_path), net.text_batch(9, samples=2)["input_ids"]
    cache, past = rounding_cache(model.module, model.cache, store=True), None
    for end in range(1, ids.shape[1] + 1):
        new, mask = ids[:, end - 1 : end], torch.ones(len(ids), end, dtype=torch.long)
        with torch.no_grad():
            want = model.module(
                input_ids=new, attention_mask=mask, past_key_values=cache, use_cache=True
            ).logits.numpy()
        given = {"input_ids": new.numpy(), "attention_mask": mask.numpy()}
        got, past = session.step(given, past)
        assert np.abs(want - got).max() < 1e-3 * np.abs(want).max()
    # What the file holds are the codes that numpy finds, two to a byte where they have 4 bits.
    assert past is not None
    for index, path in attention_layers(model.module).items():
        grid, half = model.cache[path], 2 ** (bits - 1)
        for part, scale, offset, floats in (
            ("key", grid.key_scale, grid.key_offset, cache.layers[index].keys),
            ("value", grid.value_scale, grid.value_offset, cache.layers[index].values),
        ):
            codes = (floats.numpy() - offset.numpy()[:, None]) / scale.numpy()[:, None]
            codes = np.clip(np.rint(codes), -half, half - 1).astype(int)
            held = past[f"past_key_values.{index}.{part}"].astype(int)
            if bits == 4:
                held = np.stack([held & 15, held >> 4], -1).reshape(codes.shape) - 8
            # A key between two codes may fall to either side of float32's rounding.
            assert np.abs(held - codes).max() <= 1
            assert (held != codes).mean() < 0.01


def test_a_text_in_two_parts(tmp_path: Path) -> None:
    model = rounded(llama, 8)
    session = exported(model, tmp_path)
    ids = net.text_batch(9, samples=1, padded=False)["input_ids"].numpy()
    ones = np.ones_like(ids)
    whole = session.run({"input_ids": ids, "attention_mask": ones})
    _, past = session.step({"input_ids": ids[:, :5], "attention_mask": ones[:, :5]})
    rest, _ = session.step({"input_ids": ids[:, 5:], "attention_mask": ones}, past)
    assert np.abs(rest - whole[:, 5:]).max() < 1e-4 * np.abs(whole).max()


def test_padding_on_the_left_is_not_seen(tmp_path: Path) -> None:
    """Positions apart (GPT-2 counts the padding), what the mask hides changes nothing."""
    session = exported(rounded(llama, 8), tmp_path)
    ids = net.text_batch(9, samples=1, padded=False)["input_ids"].numpy()
    mask = np.ones_like(ids)
    mask[:, :3] = 0
    other = ids.copy()
    other[:, :3] = (other[:, :3] + 7) % 64
    one = session.run({"input_ids": ids, "attention_mask": mask})[:, 3:]
    two = session.run({"input_ids": other, "attention_mask": mask})[:, 3:]
    assert np.abs(one - two).max() < 1e-5 * np.abs(one).max()


def test_narrow_heads_are_said_before_the_work() -> None:
    data = [net.text_batch(samples=4)]
    model = apply(net.llama(1), Recipe((Cache(8),)), data).model  # heads of 4
    assert "no multiple of 8" in writer.check(model)[0]


def test_an_attention_of_another_kind_is_refused() -> None:
    model = rounded(lambda: grouped(LlamaConfig, LlamaForCausalLM, 8, layers=1), 8)
    model.module.config._attn_implementation = "eager"
    with pytest.raises(ExportError, match="not read by one attention"):
        writer.quantized_graph(model)
