"""AWQ: divisors folded into the weights, exactly; then rounding to nearest."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.apply import Applied, apply
from penjing.channels import Channels
from penjing.edits import perform
from penjing.errors import UsageError
from penjing.model import Batch, Model
from penjing.planes import Scheme
from penjing.recipe import Recipe
from penjing.steps._awq import Divide
from penjing.steps._divide import division
from penjing.steps.fold import Fold
from penjing.steps.quantize import Quantize


def text() -> list[Batch]:
    return [net.text_batch(seed) for seed in range(3)]


def pictures(count: int = 3) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, 3, 8, 8, generator=generator)} for _ in range(count)]


def output(model: Model, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model.run(batch)


def folded(model: Model, data: list[Batch], **options: Any) -> Applied:
    return apply(model, Recipe((Divide(Scheme(3, 8), **options),)), data)


def heads(name: str) -> set[str]:
    return {f"model.layers.{i}.{name}" for i in range(2)}


BERT = {f"encoder.layer.{i}.attention.output.dense" for i in range(2)}
LLAMA = {"lm_head"}.union(
    *(heads(f"self_attn.{n}_proj") for n in "qkvo"),
    *(heads(f"mlp.{n}_proj") for n in ("gate", "up", "down")),
)
CNN = {"layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.down.0", "fc"}


@pytest.mark.parametrize(
    ("make", "data", "readers"),
    [
        (lambda: net.bert(2), text(), BERT),  # of a post-norm encoder the values alone
        (lambda: net.llama(2), text(), LLAMA),  # grouped queries, and a head of its own
        (lambda: apply(net.resnet(), Recipe((Fold(),))).model, pictures(), CNN),
    ],
    ids=["bert", "llama", "cnn"],
)
def test_the_network_gives_what_it_gave(make: Any, data: list[Batch], readers: set[str]) -> None:
    model = make()
    made = folded(model, data)
    changed = {d.path for d in made.done if d.kind == "weight" and "multiplied" in d.why}
    assert changed >= {f"{name}.weight" for name in readers}
    if readers is not CNN:
        assert changed == {f"{name}.weight" for name in readers}
    for batch in (data[0], data[-1]):
        was = output(model, batch)
        assert (output(made.model, batch) - was).abs().max() < 1e-5 * was.abs().max()
    for name in readers:
        own, other = (m.module.get_submodule(name).weight for m in (model, made.model))
        assert (own - other).abs().max() > 0.01 * own.abs().max()
    # Layers that are left are all others, with the reason.
    layers = {n for n, m in model.module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    left = {d.path: d.why for d in made.done if d.kind == "left"}
    assert set(left) == {n for n in layers if f"{n}.weight" not in changed}
    assert all("without awq's divisors" in why for why in left.values())


def test_a_norm_that_stores_its_gain_less_one() -> None:
    module = nn.Sequential(GemmaRMSNorm(6), nn.Linear(6, 4))
    with torch.no_grad():
        module[0].weight.normal_()
    model = net.wrap(module, "tensor", {"x": torch.randn(3, 5, 6)})
    was, s = output(model, model.example), torch.tensor([4.0, 0.5, 3.0, 0.7, 1.0, 9.0])
    for edit in division(model, [(Channels(6, ("0",), ("1",)), s)]):
        perform(model, edit)
    torch.testing.assert_close(output(model, model.example), was, rtol=1e-4, atol=1e-5)


def uneven(layers: int = 1) -> Model:
    """A llama some of whose channels are large behind the norms, and small in what reads them."""
    model = net.llama(layers)
    s = torch.ones(32)
    s[[3, 17]] = 40.0
    with torch.no_grad():
        for name, module in model.module.named_modules():
            if name.endswith("layernorm"):
                module.weight.mul_(s)
            if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
                module.weight.div_(s)
    return model


@pytest.mark.parametrize("bits", [3, 4])
def test_less_error_than_the_best_grid_alone(bits: int) -> None:
    model, data = uneven(), text()
    test = net.text_batch(9)
    errors = {}
    for method in ("rtn", "clip", "awq"):
        step = Quantize(bits=bits, group=16, method=method, alpha=0.0)
        made = apply(model, Recipe((step,)), data)
        errors[method] = float((output(made.model, test) - output(model, test)).norm())
    assert errors["awq"] < 0.8 * errors["clip"]
    assert errors["awq"] < 0.8 * errors["rtn"]


def test_nothing_is_left_to_compute() -> None:
    made = apply(uneven(), Recipe((Quantize(bits=4, method="awq"),)), text())
    model = made.model
    linear = {n for n, m in model.module.named_modules() if isinstance(m, nn.Linear)}
    assert {n.removesuffix(".weight") for n in model.planes} == linear
    assert all(p.is_integer and p.rotation is None for p in model.planes.values())
    assert not model.activations
    assert not model.structure
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.module.modules())
    assert next(d.step for d in made.done) == "awq"
    assert {d.step for d in made.done} == {"awq", "quantize"}


def test_layers_of_which_a_reader_stays_are_left() -> None:
    model = net.llama(2)
    made = folded(model, text(), skip=("*.k_proj",), targets=("model.layers.*",))
    multiplied = {d.path for d in made.done if "multiplied" in d.why}
    assert not any(n.endswith(("q_proj.weight", "v_proj.weight")) for n in multiplied)
    assert {f"{n}.weight" for n in heads("self_attn.o_proj") | heads("mlp.down_proj")} <= multiplied
    assert "lm_head.weight" not in multiplied
    assert not any("k_proj" in d.path for d in made.done)


def test_a_tied_head_is_left() -> None:
    model = net.llama(1, tie_word_embeddings=True)
    made = folded(model, text())
    [why] = [d.why for d in made.done if d.kind == "left" and d.path == "lm_head"]
    assert "another reader" in why
    assert not any(d.path == "model.norm.weight" for d in made.done)


def test_a_journal_goes_on(tmp_path: Path) -> None:
    recipe = Recipe((Quantize(bits=4, method="awq"),))
    whole = apply(uneven(), recipe, text()).model
    first = apply(uneven(), recipe, text(), journal=tmp_path).model
    lines = (tmp_path / "journal.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) > 3
    (tmp_path / "journal.jsonl").write_text("".join(lines[:3]))  # killed behind its second unit
    again = apply(uneven(), recipe, text(), journal=tmp_path).model
    assert net.same(whole, first)
    assert net.same(whole, again)


def test_what_it_is_not_for() -> None:
    with pytest.raises(UsageError, match="without data"):
        apply(net.llama(2), Recipe((Quantize(bits=4, method="awq"),)))
    for more in ({"rotate": True}, {"activations": 8, "bits": 8, "symmetric": True}):
        with pytest.raises(UsageError, match="awq"):
            Quantize(method="awq", **({"bits": 4} | more))
    with pytest.raises(UsageError, match="gptq, rtn"):
        Quantize(bits=2, codes="binary", method="awq")


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    """Its experts' products have no float64; what is found is as good as the network was."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=200, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = net.wrap(transformers.MixtralForCausalLM(config).eval(), "causal", net.text_batch(1))
    batches = [net.text_batch(seed) for seed in (1, 2)]
    made = apply(model, Recipe((Quantize(8, method="awq"),)), batches).model
    assert made.planes
    with torch.no_grad():
        wanted, got = model.run(batches[1]), made.run(batches[1])
    assert float((got - wanted).norm() / wanted.norm()) < 0.02
