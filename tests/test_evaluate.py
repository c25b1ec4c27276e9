"""Whole evaluations of tiny networks against figures computed without this package."""

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from penjing import processor
from penjing.data import Dataset
from penjing.errors import InputError, UsageError
from penjing.evaluate import Evaluation, compare, evaluate, torch_predictor
from penjing.model import Model, Source
from penjing.tasks import find

SOURCE = Source("factory", "here", "0")


def linear(seed: int = 0, interface: Any = "tensor") -> Model:
    torch.manual_seed(seed)
    return Model(nn.Linear(4, 3), interface, {"x": torch.zeros(2, 4)}, SOURCE)


def points(n: int = 50) -> Dataset:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 4)).astype(np.float32)
    return Dataset("arrays", tuple({"x": row} for row in x), rng.integers(0, 3, n))


def test_classification_of_a_linear_model() -> None:
    model, data = linear(), points()
    result = evaluate(torch_predictor(model), model, data, find(None, data, model), batch=7)
    x = np.stack([sample["x"] for sample in data.samples])
    weight, bias = (p.detach().numpy() for p in model.module.parameters())
    assert result.value == ((x @ weight.T + bias).argmax(1) == data.labels).mean()
    assert result.samples == len(result.rows) == 50


def causal() -> Model:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=64,
    )
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    example = {n: torch.ones(1, 4, dtype=torch.int64) for n in ("input_ids", "attention_mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    return Model(LlamaForCausalLM(config).eval(), "causal", example, SOURCE, tokenizer=tokenizer)


def test_perplexity_is_that_of_transformers() -> None:
    model = causal()
    ids = np.random.default_rng(0).integers(0, 50, 20 + 20 + 17)
    data = Dataset("text", (" ".join(f"w{i}" for i in ids),))
    loss = tokens = 0.0
    for window in (ids[:20], ids[20:40], ids[40:]):
        row = torch.from_numpy(window)[None]
        with torch.no_grad():
            loss += float(model.module(input_ids=row, labels=row).loss) * (len(window) - 1)
        tokens += len(window) - 1
    task = find(None, data, model)
    result = evaluate(torch_predictor(model), model, data, task, length=20, batch=2)
    assert result.samples == 3
    assert result.value == pytest.approx(np.exp(loss / tokens), rel=1e-5)


def test_fidelity_of_the_original_is_one_and_less_after_an_edit() -> None:
    model, data = linear(), points()
    task = find("fidelity", data, model)
    reference = torch_predictor(model)
    before = evaluate(reference, model, data, task, reference=reference)
    edited = model.copy()
    with torch.no_grad():
        edited.module.weight[0].zero_()  # type: ignore[union-attr, operator, index]
    after = evaluate(torch_predictor(edited), model, data, task, reference=reference)
    assert before.value == 1
    drop = compare(before, after, task)
    assert drop.value == pytest.approx(1 - after.value)
    assert 0 < drop.low < drop.value < drop.high
    assert (drop.samples, drop.confidence, drop.relative) == (50, 0.95, False)
    with pytest.raises(UsageError, match="needs the original"):
        evaluate(reference, model, data, task)


def test_infinite_perplexity_is_refused() -> None:
    model = causal()
    data = Dataset("text", ("w1 w2 w3",))

    def hopeless(batch: dict[str, torch.Tensor]) -> np.ndarray:
        logits = np.zeros((*batch["input_ids"].shape, 50), np.float32)
        logits[..., 0] = 1e6
        return logits

    with pytest.raises(InputError, match="perplexity is not finite; got inf"):
        evaluate(hopeless, model, data, find("perplexity", data, model))


def test_relative_drop_of_perplexity() -> None:
    task = find("perplexity", Dataset("text", ("a",)), causal())
    rows = np.array([[10.0, 10.0], [10.0, 10.0]])
    before, after = Evaluation(np.e, rows, 2), Evaluation(0, rows * [[1.1, 1.0]], 2)
    # exp(1.1) / exp(1) - 1.
    assert compare(before, after, task).value == pytest.approx(np.exp(0.1) - 1)


@pytest.mark.parametrize("able", [True, False])
def test_bfloat16_is_near(monkeypatch: pytest.MonkeyPatch, able: bool) -> None:
    """Where the processor has it; elsewhere `fast` is float32, which is faster."""
    monkeypatch.setattr(processor, "_capabilities", lambda: {"avx512_bf16": able})
    model, data = linear(), points()
    batch = {"x": torch.from_numpy(np.stack([s["x"] for s in data.samples]))}
    exact, fast = torch_predictor(model)(batch), torch_predictor(model, fast=True)(batch)
    assert exact.dtype == fast.dtype == np.float32
    assert bool(np.abs(exact - fast).max() > 0) is able
    assert np.abs(exact - fast).max() < 0.05


def test_outputs_that_are_no_numbers_are_refused() -> None:
    model, data = linear(), points()
    task = find("classification", data, model)

    def broken(batch: dict[str, torch.Tensor]) -> np.ndarray:
        output = torch_predictor(model)(batch)
        output[batch["x"][:, 0].numpy() == data.samples[40]["x"][0]] = np.nan
        return output

    with pytest.raises(InputError, match=r"NaN.*samples 33 to 50"):
        evaluate(broken, model, data, task)
    with pytest.raises(InputError, match="first dimension of the output; got 1; allowed: 32"):
        evaluate(lambda batch: np.zeros((1, 3)), model, data, task)


def test_bad_labels_are_refused_before_any_work() -> None:
    model = linear()
    data = Dataset("arrays", points(3).samples, np.array([0, 1, 7]))
    calls = []
    with pytest.raises(InputError, match="label 7 on 1 samples"):
        evaluate(lambda b: calls.append(b), model, data, find("classification", data, model))  # type: ignore[arg-type, return-value, func-returns-value]
    assert not calls
