"""Batches against the tokenizer's own padding, against windows cut by hand, and refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from penjing.data import Dataset, align, encode, prepare, windows
from penjing.errors import InputError, UsageError
from penjing.model import Model, Source

SOURCE = Source("factory", "here", "0")
WORDS = 60


def tokenizer(special: bool, pad: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    vocabulary |= {f"w{i}": 4 + i for i in range(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
    names: dict[str, Any] = {"eos_token": "[SEP]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, **names | ({"pad_token": "[PAD]"} if pad else {})
    )


SMALL: dict[str, Any] = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 64,
}


def bert(interface: Any = "embedding", types: bool = False, **config: Any) -> Model:
    configuration = BertConfig(vocab_size=4 + WORDS, **SMALL, **config)
    kind = BertModel if interface == "embedding" else BertForSequenceClassification
    names = ["input_ids", "attention_mask"] + ["token_type_ids"] * types
    example = {name: torch.ones(2, 4, dtype=torch.int64) for name in names}
    return Model(kind(configuration).eval(), interface, example, SOURCE, tokenizer=tokenizer(True))


def llama(pad: bool = True) -> Model:
    module = LlamaForCausalLM(LlamaConfig(vocab_size=4 + WORDS, **SMALL)).eval()
    example = {n: torch.ones(1, 4, dtype=torch.int64) for n in ("input_ids", "attention_mask")}
    return Model(module, "causal", example, SOURCE, tokenizer=tokenizer(False, pad))


def words(*numbers: int) -> str:
    return " ".join(f"w{i}" for i in numbers)


def test_text_is_padded_to_the_longest_of_its_batch() -> None:
    model = bert()
    texts = (words(1, 2), words(*range(20)), words(3), words(4, 5))
    first, second = encode(Dataset("text", texts), model, length=10, batch=2)
    for batch, part in ((first, texts[:2]), (second, texts[2:])):
        expected = model.tokenizer(
            list(part), truncation=True, max_length=10, padding=True, return_tensors="pt"
        )
        assert list(batch) == ["input_ids", "attention_mask"]
        for name in batch:
            assert torch.equal(batch[name], expected[name])
    assert first["input_ids"].shape == (2, 10)
    assert second["input_ids"].shape == (2, 4)


def test_pairs_alternate_for_embeddings_and_join_for_classifiers() -> None:
    data = Dataset("pairs", ((words(1), words(2)), (words(3), words(4, 5))), np.array([0.1, 0.9]))
    (batch,) = encode(data, bert())
    assert batch["input_ids"][:, 1].tolist() == [5, 6, 7, 8]
    (joined,) = encode(data, bert("classifier", types=True))
    assert joined["input_ids"][1].tolist() == [1, 7, 2, 8, 9, 2]
    assert joined["token_type_ids"][1].tolist() == [0, 0, 0, 1, 1, 1]
    assert joined["attention_mask"][0].tolist() == [1, 1, 1, 1, 1, 0]


def test_windows_lose_only_short_tails() -> None:
    model = llama()
    lengths = (20 + 20 + 16, 20 + 15, 3, 1)
    ids = [[4 + i % WORDS for i in range(n)] for n in lengths]
    texts = tuple(words(*(i - 4 for i in row)) for row in ids)
    data = windows(Dataset("text", texts, np.arange(4)), model, 20)
    got = [sample["input_ids"].tolist() for sample in data.samples]
    assert got == [ids[0][:20], ids[0][20:40], ids[0][40:], ids[1][:20], ids[2]]
    assert data.labels is None
    assert prepare(data, model, 20) is data
    (batch,) = encode(Dataset("text", texts), model, length=20)
    assert batch["input_ids"].shape == (5, 20)
    assert batch["attention_mask"].sum(1).tolist() == [20, 20, 16, 20, 3]
    # Right padding: what is kept comes first.
    assert batch["attention_mask"][4].tolist() == [1] * 3 + [0] * 17
    assert batch["input_ids"][4, :3].tolist() == ids[2]


def test_padding_is_the_end_token_where_there_is_no_pad_token() -> None:
    model = llama(pad=False)
    (batch,) = encode(Dataset("text", (words(1, 2, 3), words(1, 2))), model)
    assert batch["input_ids"][1].tolist() == [5, 6, 2]
    assert model.tokenizer.pad_token is None


def test_padding_does_not_change_the_output() -> None:
    model = bert()
    short, long = words(1, 2), words(*range(15))
    (both,) = encode(Dataset("text", (short, long)), model)
    (alone,) = encode(Dataset("text", (short,)), model)
    with torch.no_grad():
        torch.testing.assert_close(model.run(both)[:1], model.run(alone))


def tensor_model(example: dict[str, torch.Tensor], interface: Any = "tensor") -> Model:
    return Model(nn.Linear(2, 2), interface, example, SOURCE)


def test_arrays_by_name_and_by_order() -> None:
    example = {"a": torch.zeros(1, 2), "b": torch.zeros(1, dtype=torch.int64)}
    model = tensor_model(example)
    named = {"b": np.int32(7), "a": np.array([1, 2], np.uint8)}
    ordered = {"x": np.array([1.0, 2.0]), "z": np.int16(7)}
    for sample in (named, ordered):
        (batch,) = encode(Dataset("arrays", (sample,)), model)
        assert {k: (v.dtype, v.tolist()) for k, v in batch.items()} == {
            "a": (torch.float32, [[1.0, 2.0]]),
            "b": (torch.int64, [7]),
        }
    image = tensor_model({"pixel_values": torch.zeros(1, 3, 2, 2)}, "image")
    (batch,) = encode(Dataset("arrays", ({"x": np.ones((3, 2, 2))},)), image)
    assert batch["pixel_values"].shape == (1, 3, 2, 2)


def test_bad_arrays() -> None:
    model = tensor_model({"a": torch.zeros(1, 2), "b": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(InputError, match="names of the arrays; got x; allowed: a, b"):
        list(encode(Dataset("arrays", ({"x": np.zeros(2)},)), model))
    with pytest.raises(InputError, match=r"shape of a; got \[3\]; allowed: \[2\]"):
        list(encode(Dataset("arrays", ({"a": np.zeros(3), "b": np.int64(0)},)), model))
    with pytest.raises(InputError, match=r"array b; got float64; allowed: torch\.int64"):
        list(encode(Dataset("arrays", ({"a": np.zeros(2), "b": np.float64(0)},)), model))


def test_images_go_through_preprocess() -> None:
    def preprocess(image: Image.Image) -> np.ndarray:
        return np.asarray(image.resize((2, 2)), np.float32).transpose(2, 0, 1) / 255

    model = tensor_model({"pixel_values": torch.zeros(1, 3, 2, 2)}, "image")
    data = Dataset("images", (Image.new("RGB", (9, 5), (255, 0, 51)),))
    with pytest.raises(InputError, match="no preprocessing"):
        list(encode(data, model))
    model.preprocess = preprocess
    (batch,) = encode(data, model)
    assert batch["pixel_values"][0, :, 1, 1].tolist() == pytest.approx([1.0, 0.0, 0.2])


def test_tokens_outside_the_vocabulary_are_refused() -> None:
    ok, bad = np.array([4, 5]), np.array([4, 4 + WORDS])
    samples = tuple({"input_ids": i, "attention_mask": np.ones(2, int)} for i in (ok, ok, bad))
    with pytest.raises(InputError, match=r"got 64 in encoded sample 3; allowed: 0 to 63"):
        list(encode(Dataset("arrays", samples), bert(), batch=2))


def test_other_refusals() -> None:
    long = Dataset("text", (words(*range(50)) + " " + words(*range(50)),))
    with pytest.raises(InputError, match="longer than the model takes; got 100 tokens"):
        list(encode(long, bert(), length=100))
    bare = bert()
    bare.tokenizer = None
    with pytest.raises(InputError, match="without a tokenizer"):
        list(encode(long, bare))
    with pytest.raises(InputError, match="no text has two tokens"):
        list(encode(Dataset("text", ("w1",)), llama()))
    for length, batch in ((0, 1), (1, 0)):
        with pytest.raises(UsageError, match="length and batch"):
            list(encode(long, bert(), length=length, batch=batch))


def test_named_classes_are_numbered_as_the_model_does() -> None:
    names = {0: "sport", 1: "Arts", 2: "war"}
    model = bert("classifier", id2label=names, label2id={v: k for k, v in names.items()})
    data = Dataset("text", ("a", "b", "c"), np.array([0, 1, 0]), ("arts", "sport"))
    aligned = align(data, model)
    assert aligned.labels is not None
    assert aligned.labels.tolist() == [1, 0, 1]
    again = align(aligned, model)
    assert again.labels is not None
    assert again.labels.tolist() == [1, 0, 1]
    other = Dataset("text", ("a", "b"), np.array([0, 1]), ("arts", "tech"))
    with pytest.raises(InputError, match="does not know; got tech; allowed: sport, Arts, war"):
        align(other, model)
    assert prepare(other, model) is other
    assert align(data, bert("classifier", num_labels=3)) is data
