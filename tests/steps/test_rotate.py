"""Rotate: the network says the same, its weights are turned, and what is left says why."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import Applied, apply
from penjing.errors import InputError, UsageError
from penjing.load import load
from penjing.model import Model
from penjing.recipe import Recipe
from penjing.steps.quantize import Quantize
from penjing.steps.rotate import Rotate
from penjing.writers.artifact import save


def trained(model: Model) -> Model:
    """Norms as after training: no gain is 1, no bias 0."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.module.named_parameters():
        if parameter.ndim == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.3 * noise)
            assert "norm" in name.lower() or name.endswith("bias")
    return model


def llama(heads: int) -> Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=heads, head_dim=4,
        **net.TEXT,
    )  # fmt: skip
    module = net.sharpen(LlamaForCausalLM(config))
    return net.wrap(module, "causal", net.text_batch(samples=2))


def neox() -> Model:
    """A decoder with layer norms before attention and MLP, side by side, and untied tables."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(num_hidden_layers=2, num_attention_heads=4, **net.TEXT)
    return net.wrap(net.sharpen(GPTNeoXForCausalLM(config)), "causal", net.text_batch(samples=2))


def far(one: Model, other: Model) -> float:
    """Largest change of an output on other texts than the example, over the largest output."""
    worst = 0.0
    for seed in (5, 6):
        batch = {n: x for n, x in net.text_batch(seed).items() if n in one.example}
        with torch.no_grad():
            was, now = one.run(batch), other.run(batch)
        kept = batch["attention_mask"].bool() if was.ndim == 3 else slice(None)
        worst = max(worst, float((was - now)[kept].abs().max() / was[kept].abs().max()))
    return worst


def left(done: Applied) -> dict[str, str]:
    return {d.path: d.why for d in done.done if d.kind == "left"}


@pytest.mark.parametrize("heads", [8, 4, 2])
def test_a_llama_says_the_same(heads: int) -> None:
    """All query heads with values of their own, and two or four that share one."""
    model = trained(llama(heads))
    done = apply(model, Recipe((Rotate(),)))
    assert far(model, done.model) < 1e-5
    assert left(done) == {}
    before, after = model.module.state_dict(), done.model.module.state_dict()
    for name, value in after.items():
        if "norm" in name:
            assert torch.equal(value, torch.ones_like(value)), name
    # An orthogonal matrix leaves inner products of rows of the table, by numpy.
    table, turned = (s["model.embed_tokens.weight"].double().numpy() for s in (before, after))
    np.testing.assert_allclose(turned @ turned.T, table @ table.T, atol=1e-3)
    assert np.abs(turned - table).max() > 0.1 * np.abs(table).max()
    # What reads it has its norm's gain: W diag(g) by its inner products.
    name = "model.layers.1.mlp.up_proj.weight"
    gain = before["model.layers.1.post_attention_layernorm.weight"].double().numpy()
    up = before[name].double().numpy() * gain
    np.testing.assert_allclose(after[name].double().numpy() @ after[name].double().numpy().T,
                               up @ up.T, rtol=1e-4, atol=1e-4)  # fmt: skip
    # Products of values and outputs of each head are what they were, W_o W_v diag(g).
    o, v = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "ov")
    assert not torch.allclose(after[v], before[v], atol=0.1)
    assert not torch.allclose(after[o], before[o], atol=0.1)


def test_layer_norms_keep_their_mean() -> None:
    model = trained(neox())
    model.module.gpt_neox.final_layer_norm.bias.data.zero_()
    done = apply(model, Recipe((Rotate(heads=False),)))
    assert far(model, done.model) < 1e-5
    assert left(done) == {}
    state = done.model.module.state_dict()
    norm = "gpt_neox.layers.1.input_layernorm"
    assert torch.equal(state[f"{norm}.weight"], torch.ones(32))
    assert torch.equal(state[f"{norm}.bias"], torch.zeros(32))
    # Q 1 = 1: the mean of every row of the table is what it was, and the rows are not.
    name = "gpt_neox.embed_in.weight"
    before = model.module.state_dict()[name]
    torch.testing.assert_close(state[name].mean(1), before.mean(1), rtol=1e-4, atol=1e-5)
    assert float((state[name] - before).abs().max()) > 0.1


def test_a_bias_that_nothing_can_hold() -> None:
    """The output layer has no bias: that of the last norm would be lost."""
    with pytest.raises(InputError, match="has no bias that could hold that of the norm"):
        apply(trained(neox()), Recipe((Rotate(heads=False),)))


def test_bert_turns_its_heads_alone_and_says_so() -> None:
    model = trained(net.bert())
    done = apply(model, Recipe((Rotate(),)))
    assert far(model, done.model) < 1e-5
    changed = {d.path for d in done.done if d.kind == "weight"}
    assert changed == {
        f"encoder.layer.{i}.attention.{part}"
        for i in range(3)
        for part in ("self.value.weight", "self.value.bias", "output.dense.weight")
    }
    assert "normalises after the addition" in left(done)["embeddings.LayerNorm"]
    with pytest.raises(InputError, match=r"nothing in this network can be rotated.*next:"):
        apply(model, Recipe((Rotate(heads=False),)))


def test_a_tied_table_is_left_or_stored_twice(tmp_path: Path) -> None:
    model = trained(net.llama(tie_word_embeddings=True))
    done = apply(model, Recipe((Rotate(),)))
    assert "untie = true stores it twice, 1,920 numbers more" in next(iter(left(done).values()))
    assert far(model, done.model) < 1e-5
    assert done.model.parameter_count == model.parameter_count
    done = apply(model, Recipe((Rotate(untie=True),)), journal=tmp_path / "journal")
    assert left(done) == {}
    assert far(model, done.model) < 1e-5
    assert done.model.parameter_count == model.parameter_count + 1920
    assert not done.model.module.config.tie_word_embeddings
    assert model.module.config.tie_word_embeddings


def test_an_untied_artifact_is_loaded(tmp_path: Path) -> None:
    source = tmp_path / "source"
    trained(net.llama(layers=2, tie_word_embeddings=True)).module.save_pretrained(source)
    model = load(source)
    done = apply(model, Recipe((Rotate(untie=True),))).model
    save(done, tmp_path / "out")
    again = load(tmp_path / "out")
    assert again.tied() == []
    for name, value in done.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[name], value), name
    assert far(model, again) < 1e-5


def test_outliers_of_single_channels_go() -> None:
    """Channels of the stream that are thirty times as large as the others."""
    model = net.llama()
    with torch.no_grad():
        model.module.model.embed_tokens.weight[:, 3] *= 30
        for name, parameter in model.module.named_parameters():
            if "norm" in name and "layers" in name:
                parameter[3] *= 10
    done = apply(model, Recipe((Rotate(),))).model
    name = "model.layers.0.mlp.up_proj.weight"
    gain = model.module.model.layers[0].post_attention_layernorm.weight
    before = (model.module.get_parameter(name) * gain).detach()
    after = done.module.get_parameter(name).detach()
    sizes = [float(w.abs().amax() / w.square().mean().sqrt()) for w in (before, after)]
    assert sizes[1] < 0.7 * sizes[0]
    step = Quantize(3, method="rtn", targets=("model.layers.*",))
    plain, turned = (apply(m, Recipe((step,))).model for m in (model, done))
    assert far(done, turned) < far(model, plain)


def test_targets_masks_and_integers_hold_a_layer() -> None:
    model = net.llama(layers=2)
    only = apply(model, Recipe((Rotate(targets=("*.v_proj", "*.o_proj")),)))
    assert "is not among the targets" in left(only)["model.layers.0.input_layernorm"]
    assert {d.path for d in only.done if d.kind == "weight"} == {
        f"model.layers.{i}.self_attn.{n}_proj.weight" for i in (0, 1) for n in "vo"
    }
    small = apply(model, Recipe((Quantize(4, method="rtn", targets=("*.down_proj",)),))).model
    done = apply(small, Recipe((Rotate(),)))
    assert "down_proj is quantized already" in next(iter(left(done).values()))
    assert far(small, done.model) < 1e-5


class Gated(nn.Module):
    """A reader of the stream that no operation shows."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.norm, self.out = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        return self.out(self.norm(x)) + float(x.detach().numpy()[0, 0, 0])


def test_what_the_proof_finds_is_left() -> None:
    torch.manual_seed(0)
    model = net.wrap(Gated(), "tensor", {"x": torch.randn(2, 3, 6)})
    with pytest.raises(InputError, match="the rotated network gives other outputs"):
        apply(model, Recipe((Rotate(heads=False),)))


def test_refusals() -> None:
    with pytest.raises(UsageError, match="stream, heads or both"):
        Rotate(stream=False, heads=False)
    with pytest.raises(UsageError, match="seed"):
        Rotate(seed=-1)
    recipe = Recipe((Rotate(untie=True, seed=3, targets=("a.*",)),))
    assert Recipe.from_toml(recipe.to_toml(), {"rotate": Rotate}) == recipe


def test_values_that_are_made_together_with_queries_are_left() -> None:
    model = neox()
    done = apply(model, Recipe((Rotate(),)))
    assert far(model, done.model) < 1e-5
    assert set(left(done)) == {f"gpt_neox.layers.{i}.attention.dense" for i in (0, 1)}
    assert all("passes through none" in why for why in left(done).values())


@pytest.mark.slow
def test_a_real_decoder_says_the_same(smollm2_path: Path) -> None:
    """Nine query heads, three of values, a tied table."""
    model = load(str(smollm2_path))
    done = apply(model, Recipe((Rotate(untie=True),)))
    assert left(done) == {}
    batch = {n: x[:1, :24] for n, x in model.example.items()}
    with torch.no_grad():
        was, now = model.run(batch), done.model.run(batch)
    assert float((was - now).abs().max() / was.abs().max()) < 1e-4


@pytest.mark.slow
def test_a_real_encoder_says_the_same() -> None:
    from penjing.demo import minilm

    model = load(str(minilm()))
    done = apply(model, Recipe((Rotate(),)))
    assert sum(d.kind == "weight" for d in done.done) == 18
    with torch.no_grad():
        was, now = model.run(model.example), done.model.run(model.example)
    assert float((was - now).abs().max() / was.abs().max()) < 1e-4
