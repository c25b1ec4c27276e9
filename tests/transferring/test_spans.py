"""Tokens of two tokenizers side by side, by hand; distances against a sum over strings."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from tests.networks import llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from penjing.errors import InputError
from penjing.model import Model
from penjing.transferring.spans import OTHER, SPANS, Bridge, differ, spans_of

TEXTS = [
    "the cat sat on the mat", "a cat and a hat", "the mat is on the cat",
    "caf\u00e9 cats \u2603 hat",
]  # fmt: skip


def bytes_bpe(size: int, begin: bool = True) -> PreTrainedTokenizerFast:
    """Byte-level BPE of so many tokens, trained on the texts."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXTS * 4,
        trainers.BpeTrainer(vocab_size=size, special_tokens=["<s>"], initial_alphabet=alphabet),
    )
    if begin:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")


def model(tokenizer: PreTrainedTokenizerFast, layers: int = 1) -> Model:
    made = llama(layers, vocab_size=len(tokenizer), max_position_embeddings=64)
    made.tokenizer = tokenizer
    return made


def test_spans_by_hand() -> None:
    #       <s> the  _cat _s  at          <s> th e   _c  at _sat
    student, teacher = [0, 3, 7, 9, 11], [0, 2, 3, 5, 7, 11]
    assert spans_of(student, teacher) == [(1, 1, 1, 2), (2, 2, 3, 4), (3, 4, 5, 5)]
    # Three bytes of one character end at one place; a special token closes the text.
    assert spans_of([0, 1, 4, 4, 4, 0], [0, 1, 4, 0]) == [(1, 1, 1, 1), (2, 4, 2, 2)]
    assert spans_of([0, 3], [0, 2]) == []


def test_every_span_is_the_same_text_to_both() -> None:
    student, teacher = model(bytes_bpe(262)), model(bytes_bpe(290))
    assert differ(student, teacher)
    assert not differ(student, model(bytes_bpe(262)))
    count = 0
    for batch in Bridge(student, teacher).encode(TEXTS, 32, 2):
        for sample, a, b, c, d in batch[SPANS].tolist():
            own = student.tokenizer.decode(batch["input_ids"][sample, a : b + 1])
            other = teacher.tokenizer.decode(batch[f"{OTHER}input_ids"][sample, c : d + 1])
            assert own == other
            count += 1
        for name, one in (("", student), (OTHER, teacher)):
            there = batch[f"{name}attention_mask"].bool()
            assert int(batch[f"{name}input_ids"].max()) < len(one.tokenizer)
            assert bool(there[:, 0].all())
    assert count > 20


def test_long_texts_are_cut_and_nothing_is_lost() -> None:
    student, teacher = model(bytes_bpe(262, begin=False)), model(bytes_bpe(290, begin=False))
    text = " ".join(TEXTS[:3])
    pieces = list(Bridge(student, teacher)._pieces(text, 8))
    assert "".join(pieces) == text
    assert len(pieces) == math.ceil(len(student.tokenizer(text)["input_ids"]) / 8)


def test_the_distance_is_zero_for_the_teacher_itself_and_as_by_hand() -> None:
    student, teacher = model(bytes_bpe(262)), model(bytes_bpe(290))
    same = Bridge(teacher, teacher)
    (batch,) = same.encode(TEXTS, 32, 8)
    logits = teacher.run(batch).detach()
    assert float(same.distance(logits, logits, batch)) == pytest.approx(0, abs=1e-6)

    bridge = Bridge(student, teacher)
    (batch,) = bridge.encode(TEXTS, 32, 8)
    s = student.run(batch).detach()
    t = teacher.run({n: batch[f"{OTHER}{n}"] for n in teacher.example}).detach()
    found = float(bridge.distance(s, t, batch))
    # Both are bytes: tokens of one name are one text.
    names = [m.tokenizer.get_vocab() for m in (student, teacher)]
    shared = [n for n in names[0] if n in names[1] and n != "<s>"]
    values, kinds = [], set()
    for sample, a, b, c, d in batch[SPANS].tolist():
        rows = []
        for logits, ids, first, last, names_of in (
            (t, batch[f"{OTHER}input_ids"], c, d, names[1]),
            (s, batch["input_ids"], a, b, names[0]),
        ):  # fmt: skip
            p = logits[sample].double().softmax(-1).numpy()
            tokens = ids[sample].tolist()
            chance = np.prod([p[n - 1, tokens[n]] for n in range(first, last + 1)])
            each = [p[first - 1, names_of[n]] for n in shared]
            spelled = {i: n for n, i in names_of.items()}[tokens[first]] if first == last else ""
            rows.append((chance, each, spelled))
        (p, each, spelled), (q, own, other) = rows
        kinds.add(spelled == other != "")
        one, two = ([*each, 1 - sum(each)], [*own, 1 - sum(own)]) if spelled == other != "" else (
            [p, 1 - p], [q, 1 - q])  # fmt: skip
        values.append(sum(x * math.log(x / y) for x, y in zip(one, two, strict=True)))
    assert kinds == {True, False}
    assert found == pytest.approx(np.mean(values), rel=1e-4)


def test_probabilities_of_spans_add_up_over_all_strings() -> None:
    """All texts of two letters, whichever tokens spell them: each model's chances sum to 1."""
    from penjing.transferring.spans import _of_spans

    logits = torch.randn(1, 3, 2, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    sums = 0.0
    for word in itertools.product(range(2), repeat=2):
        ids = torch.tensor([[0, *word]])
        place = torch.tensor([0]), torch.tensor([1]), torch.tensor([2])
        sums += float(_of_spans(logits, ids, *place).exp())
    assert sums == pytest.approx(1, rel=1e-5)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False
        all_special_tokens: tuple[str, ...] = ()

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    student, teacher = model(bytes_bpe(262)), model(bytes_bpe(290))
    bridge = Bridge(student, teacher)
    slow: Any = Slow()
    teacher.tokenizer = slow
    with pytest.raises(InputError, match="where its tokens stand"):
        list(bridge.encode(TEXTS, 32, 8))
