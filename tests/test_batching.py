"""Batches of our own making: the same whatever way the samples came."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing.apply import apply
from penjing.batching import by_length, rebatched
from penjing.model import Batch, Model, Source
from penjing.recipe import Recipe
from penjing.steps.quantize import Quantize

WIDE = {"hidden_size": 64, "vocab_size": 600, "max_position_embeddings": 64}


def texts(lengths: list[int]) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(1, 600, (n,), generator=random) for n in lengths]


def padded(samples: list[torch.Tensor], size: int, spare: int = 0) -> list[Batch]:
    """`size` texts a batch, padded to the longest and `spare` more."""
    made = []
    for start in range(0, len(samples), size):
        own = samples[start : start + size]
        longest = max(map(len, own)) + spare
        ids = torch.zeros(len(own), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sample in enumerate(own):
            ids[row, : len(sample)], mask[row, : len(sample)] = sample, 1
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def test_every_sample_is_there_once_and_in_order() -> None:
    samples = texts([3, 9, 5, 1, 7, 12, 2] * 5)
    found = rebatched(net.bert(1, **WIDE), padded(samples, 4, spare=2))
    again = [ids[mask.bool()] for b in found for ids, mask in zip(*b.values(), strict=True)]
    assert len(again) == len(samples)
    assert all(torch.equal(a, b) for a, b in zip(again, samples, strict=True))
    assert max(len(b["input_ids"]) for b in found) == 16
    # No batch is wider than its longest text.
    assert all(bool(b["attention_mask"].any(0).all()) for b in found)


def test_long_texts_make_small_batches() -> None:
    found = rebatched(net.bert(1, **WIDE), padded(texts([1500] * 3 + [100] * 30), 8))
    assert [len(b["input_ids"]) for b in found] == [1, 1, 1, 16, 14]


def test_what_is_not_alike_stays() -> None:
    batches: list[Batch] = [{"x": torch.ones(2, 3)}, {"x": torch.ones(2, 4)}]
    assert all(
        a is b for a, b in zip(rebatched(net.bert(1, **WIDE), batches), batches, strict=True)
    )
    model = Model(nn.Linear(3, 3), "tensor", {"x": torch.ones(1, 3)}, Source("t", "t", ""))
    rows = torch.arange(60.0).reshape(20, 3)
    whole = rebatched(model, [{"x": rows[:7]}, {"x": rows[7:]}])
    assert [len(b["x"]) for b in whole] == [16, 4]
    assert torch.equal(torch.cat([b["x"] for b in whole]), rows)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_same_bytes_with_any_threads_and_any_batches(bits: int) -> None:
    model = net.bert(2, **WIDE)
    samples = texts([5, 40, 17, 33, 8, 21, 60, 3, 12, 50] * 4)

    def digest(size: int, threads: int) -> str:
        was = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            recipe = Recipe((Quantize(bits, 32, method="gptq", scale_bits=16),))
            made = apply(model, recipe, padded(samples, size, spare=size % 3)).model
        finally:
            torch.set_num_threads(was)
        found = hashlib.sha256()
        for name, planes in sorted(made.planes.items()):
            found.update(name.encode() + planes.codes.numpy().tobytes())
            found.update(planes.scale.numpy().tobytes())
        return found.hexdigest()

    assert len({digest(*way) for way in ((8, 1), (8, 2), (40, 2), (3, 1), (1, 2))}) == 1


def test_texts_of_about_one_length_go_together() -> None:
    lengths = [3, 9, 5, 1, 7, 12, 2] * 5
    model, came = net.bert(1, **WIDE), padded(samples := texts(lengths), 4, spare=2)
    found = by_length(model, came, seed=0)
    again = [
        ids[mask.bool()].tolist() for b in found for ids, mask in zip(*b.values(), strict=True)
    ]
    assert sorted(again) == sorted(sample.tolist() for sample in samples)
    # The least padding that batches of four can have: those of the lengths in their order.
    order = sorted(lengths)
    least = [order[n : n + 4] for n in range(0, len(order), 4)]
    assert sum(b["input_ids"].numel() for b in found) == sum(len(o) * max(o) for o in least)
    widths = [b["input_ids"].shape[1] for b in found]
    assert widths != sorted(widths)
    other = by_length(model, came, seed=1)
    assert [b["input_ids"].shape[1] for b in other] != widths


def test_what_has_no_length_stays_as_it_came() -> None:
    model = net.stack()
    came = net.arrays(3)
    assert all(a is b for a, b in zip(by_length(model, came, seed=0), came, strict=True))
