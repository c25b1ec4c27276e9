"""Halves: an attention or an MLP goes alone, and a decoder writes the same with its cache."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import Applied, apply
from penjing.edits import replay
from penjing.errors import InputError, UsageError
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps.cut import Cut

TEXTS = [net.text_batch(seed) for seed in range(6)]


def gpt2(layers: int = 4) -> Model:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=layers,
        n_head=4,
        n_embd=32,
        vocab_size=60,
        n_positions=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    module = net.sharpen(GPT2LMHeadModel(config))
    for path, layer in list(module.named_modules()):
        if isinstance(layer, Conv1D):  # as readers do
            linear = nn.Linear(layer.nx, layer.nf)
            linear.weight.data, linear.bias.data = layer.weight.data.T.clone(), layer.bias.data
            holder, _, last = path.rpartition(".")
            setattr(module.get_submodule(holder), last, linear)
    return net.wrap(module, "causal", net.text_batch(samples=2))


def qwen3(layers: int = 4) -> Model:
    torch.manual_seed(0)
    config = Qwen3Config(
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        **net.TEXT,
    )  # fmt: skip
    return net.wrap(net.sharpen(Qwen3ForCausalLM(config)), "causal", net.text_batch(samples=2))


def gemma3(layers: int = 4) -> Model:
    """Its layers look at four tokens, but every second one at all."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * (layers // 2)
    config = Gemma3TextConfig(
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        sliding_window=4, layer_types=kinds, **net.TEXT,
    )  # fmt: skip
    return net.wrap(
        net.sharpen(Gemma3ForCausalLM(config), 3.0), "causal", net.text_batch(samples=2)
    )


DECODERS = {"llama": net.llama, "qwen3": qwen3, "gemma3": gemma3, "gpt2": gpt2}


def made(model: Model, *blocks: int, **options: object) -> Applied:
    step = Cut(blocks=tuple(model.blocks[b] for b in blocks), **options)  # type: ignore[arg-type]
    return apply(model, Recipe((step,)), TEXTS)


def writes_the_same_with_its_cache(small: Model) -> None:
    ids = torch.tensor([[5, 9, 20, 3, 7, 31, 2]])
    with torch.no_grad():
        full = small.module(ids, use_cache=False).logits
        cached = small.module(ids[:, :3], use_cache=True)
        past, parts = cached.past_key_values, [cached.logits]
        for place in range(3, 7):
            step = small.module(ids[:, place : place + 1], past_key_values=past, use_cache=True)
            parts.append(step.logits)
        torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)
        written = small.module.generate(
            ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
        for length in range(7, 13):
            logits = small.module(written[:, :length], use_cache=False).logits
            assert int(logits[0, -1].argmax()) == int(written[0, length])


@pytest.mark.parametrize("name", DECODERS)
def test_blocks_go_and_the_cache_still_agrees(name: str) -> None:
    small = made(DECODERS[name](4), 0, 2, patch="linear").model
    config = small.module.config
    assert config.num_hidden_layers == 2
    if name == "gemma3":
        assert config.layer_types == ["full_attention"] * 2
    writes_the_same_with_its_cache(small)


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("name", DECODERS)
def test_halves_go_and_the_cache_still_agrees(name: str, part: str) -> None:
    model = DECODERS[name](4)
    if (name, part) == ("gemma3", "attention"):
        with pytest.raises(InputError, match="caches of several kinds"):
            made(model, 0, 2, part=part, patch="none")
        return
    small = made(model, 0, 2, part=part, patch="none").model
    assert small.parameter_count < model.parameter_count
    writes_the_same_with_its_cache(small)
    # The same as a whole network whose layers that end the halves give zeros.
    ends = {
        "llama": ("self_attn.o_proj", "mlp.down_proj"),
        "gpt2": ("attn.c_proj", "mlp.c_proj"),
    }.get("gpt2" if name == "gpt2" else "llama", ())
    end = ends[part == "mlp"]
    zeroed = model.copy()
    for index in (0, 2):
        layer = zeroed.module.get_submodule(f"{zeroed.blocks[index]}.{end}")
        layer.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
    torch.testing.assert_close(small.run(TEXTS[0]), zeroed.run(TEXTS[0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_of_an_encoder_that_normalises_behind(part: str) -> None:
    model = net.bert(3)
    small = made(model, 1, part=part, patch="none").model
    block = small.module.get_submodule(small.blocks[1])
    left = {n.split(".")[0] for n, _ in block.named_parameters()}
    # The norm behind the attention stays, and so does that behind the MLP.
    gone = "query" if part == "attention" else "intermediate"
    assert not any(gone in n for n, _ in block.named_parameters())
    assert "attention" in left
    with torch.no_grad():
        h = torch.randn(2, 5, 32)
        whole = model.module.get_submodule(model.blocks[1])

        def ffn(x: Tensor) -> Tensor:
            return whole.output(whole.intermediate(x), x)

        def attend(x: Tensor) -> Tensor:
            return whole.attention(x)[0]

        if part == "attention":
            wanted = ffn(whole.attention.output.LayerNorm(h))
        else:
            wanted = whole.output.LayerNorm(attend(h))
        found = block(h)
        found = found[0] if isinstance(found, tuple) else found
        torch.testing.assert_close(found, wanted)


def test_structure_is_made_again() -> None:
    model = net.llama(4)
    small = made(model, 1, 2, part="attention", patch="none").model
    again = model.copy()
    replay(again, small.structure)
    again.module.load_state_dict(small.module.state_dict())
    torch.testing.assert_close(again.run(TEXTS[0]), small.run(TEXTS[0]))
    assert [a.layer_idx for a in again.module.modules() if hasattr(a, "layer_idx")] == [0, 1]


@pytest.mark.parametrize("criterion", ["influence", "greedy", "evolution", "random"])
def test_halves_are_chosen(criterion: str) -> None:
    model = net.llama(4)
    with torch.no_grad():  # this one does nothing
        model.module.model.layers[2].mlp.down_proj.weight.zero_()
    done = apply(model, Recipe((Cut(1, part="mlp", criterion=criterion),)), TEXTS).done
    paths = {d.path for d in done if d.kind == "drop"}
    assert len(paths) == 2
    if criterion != "random":  # the norm in front of it has nothing else to do
        assert paths == {f"model.layers.2.{n}" for n in ("mlp", "post_attention_layernorm")}


def test_what_is_left_takes_it_up() -> None:
    model = net.llama(4)
    batches = [net.text_batch(seed, samples=16) for seed in range(12)]
    off = {}
    for refit in (False, True):
        step = Cut(blocks=(model.blocks[1],), part="attention", refit=refit)
        small = apply(model, Recipe((step,)), batches[:-1]).model
        with torch.no_grad():
            off[refit] = float((small.run(batches[-1]) - model.run(batches[-1])).norm())
    assert off[True] < 0.95 * off[False]


def test_refusals() -> None:
    with pytest.raises(UsageError, match="unknown part"):
        Cut(1, part="norm")
    with pytest.raises(UsageError, match="a patch of part mlp; got low-rank"):
        Cut(1, part="mlp", patch="low-rank")
    with pytest.raises(UsageError, match="criterion angular of part mlp"):
        Cut(1, part="mlp", criterion="angular")
    with pytest.raises(InputError, match="no attention found"):
        apply(net.stack(3), Recipe((Cut(1, part="attention"),)), net.arrays(2))
