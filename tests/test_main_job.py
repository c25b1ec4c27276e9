"""The whole way on a tiny encoder: fit, prove, load, replay, and a budget out of reach."""

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import penjing
from penjing.errors import InputError, UsageError

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, `shallow` of fewer layers, and `data.jsonl`: two topics of different words."""
    folder = tmp_path_factory.mktemp("job")
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    for name, layers in (("model", 4), ("shallow", 2)):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=62, hidden_size=32, num_hidden_layers=layers, num_attention_heads=4,
            intermediate_size=64, max_position_embeddings=64,
        )  # fmt: skip
        BertModel(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    random = np.random.default_rng(0)
    rows = []
    for i in range(160):
        words = random.choice(WORDS[:30] if i % 2 else WORDS[30:], 12)
        rows.append({"text": " ".join(words), "label": f"topic {i % 2}"})
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture(scope="module")
def fitted(place: Path) -> Path:
    output = place / "fitted"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENJING_CACHE", str(place / "cache"))
        result = penjing.fit(
            place / "model", place / "data.jsonl", output, max_drop=0.3, runtime="onnxruntime",
            recover=1.0, length=16,
        )  # fmt: skip
    assert result.met
    return output


def test_the_result_has_its_fixed_names(fitted: Path) -> None:
    table = json.loads((fitted / "results.json").read_text())
    for name in ("task", "metric", "runtime", "threads", "budget", "met", "why", "front", "units"):
        assert name in table
    assert table["format"] == 1
    assert table["budget"] == {"max_drop": 0.3}
    for side in ("before", "after"):
        assert {"size_bytes", "parameters", "stored_bits_per_weight", "latency_ms",
                "peak_memory_bytes", "quality"} <= set(table[side])  # fmt: skip
    assert table["drop"]["low"] <= table["drop"]["value"] <= table["drop"]["high"]
    assert table["after"]["size_bytes"] == (fitted / "model.onnx").stat().st_size
    assert all(point["measured"] for point in table["front"])
    assert table["front"]
    assert "<script" not in (fitted / "report.html").read_text()


def test_nothing_is_left_beside_the_artifact(place: Path, fitted: Path) -> None:
    assert not [p.name for p in place.iterdir() if p.name.startswith(".")]


def test_the_artifact_verifies_and_loads(fitted: Path) -> None:
    assert all(check.ok for check in penjing.verify(fitted))
    model = penjing.load(str(fitted))
    ids = torch.randint(2, 62, (3, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        mine = model.run(batch).numpy()
    session = onnxruntime.InferenceSession(str(fitted / "model.onnx"))
    theirs = session.run(None, {k: v.numpy() for k, v in batch.items()})[0]
    cosine = (mine * theirs).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosine.min() > 0.98


def test_the_recipe_replays(place: Path, fitted: Path) -> None:
    again = penjing.apply(place / "model", fitted / "recipe.toml", place / "data.jsonl", length=16)
    loaded = penjing.load(str(fitted))
    shapes = {n: tuple(p.shape) for n, p in again.parameters()}
    assert shapes == {n: tuple(p.shape) for n, p in loaded.parameters()}


def test_a_budget_out_of_reach_is_said(place: Path) -> None:
    result = penjing.fit(
        place / "shallow", place / "data.jsonl", place / "tiny", max_size=1000,
        runtime="onnxruntime", recover=0.0, length=16,
    )  # fmt: skip
    assert not result.met
    assert result.why is not None
    assert "size" in result.why
    assert (place / "tiny" / "model.onnx").exists()


def test_every_technique_from_python(place: Path) -> None:
    model = penjing.load(str(place / "model"))
    data = place / "data.jsonl"
    before = sum(p.numel() for _, p in model.parameters())
    pruned = penjing.prune(model, 0.5, data=data, length=16)
    masks = [mask.float().flatten() for mask in pruned.masks.values()]
    assert torch.cat(masks).mean() == pytest.approx(0.5, abs=0.001)
    assert all(0.39 < mask.mean() < 0.61 for mask in masks)
    small = penjing.shrink(model, 0.5, data=data, length=16)
    assert small.module.encoder.layer[0].intermediate.dense.weight.shape == (32, 32)
    assert small.module.encoder.layer[0].attention.self.query.weight.shape == (16, 32)
    cut = penjing.cut(model, 0.5, data=data, length=16)
    assert len(cut.module.encoder.layer) == 2
    assert cut.module.config.num_hidden_layers == 2
    eight = penjing.quantize(model, 8, activations=8, embeddings=8, data=data, length=16)
    assert eight.stored_bits() < 16
    plain = penjing.cut(model, 0.75, data=data, length=16, patch="none")
    better = penjing.recover(plain, data, seconds=4.0, lr=1e-3, length=16)
    texts = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    ids = model.tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    batch = {name: ids[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        goal, was, now = (m.run(batch) for m in (model, plain, better))
    error_before, error_after = (
        1 - torch.nn.functional.cosine_similarity(v, goal).mean() for v in (was, now)
    )
    assert error_after < 0.9 * error_before
    assert sum(p.numel() for _, p in model.parameters()) == before


def test_refusals(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="exists"):
        penjing.fit(place / "model", place / "data.jsonl", place / "model", max_drop=0.1)
    with pytest.raises(UsageError, match="needs data"):
        penjing.cut(place / "model", 1)
    with pytest.raises(UsageError, match="not edited"):
        penjing.recover(place / "model", place / "data.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match=r"empty|no samples"):
        penjing.fit(place / "model", tmp_path / "empty.jsonl", tmp_path / "out", max_drop=0.1)
    assert [p.name for p in tmp_path.iterdir()] == ["empty.jsonl"]
