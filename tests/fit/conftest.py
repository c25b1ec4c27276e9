"""Small random networks made by transformers itself, and batches for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from penjing.graph import find_blocks
from penjing.model import Batch, Model, Source

SIZES = {"num_attention_heads": 4, "max_position_embeddings": 64}


def tokens(count: int, length: int, vocabulary: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary, (count, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def bert_of(layers: int = 3, hidden: int = 32, vocabulary: int = 600, **options: Any) -> Model:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers,
        **({"intermediate_size": 2 * hidden} | SIZES | options),
    )  # fmt: skip
    module = transformers.BertModel(config, add_pooling_layer=False).eval()
    # Random networks of transformers are nearly linear; larger weights give blocks something to do.
    with torch.no_grad():
        for name, parameter in module.encoder.named_parameters():
            if name.endswith("dense.weight") or ("self" in name and name.endswith("weight")):
                parameter.mul_(4)
    example = tokens(2, 9, vocabulary)
    blocks = find_blocks(module)
    return Model(module, "embedding", example, Source("test", "bert", f"{layers}"), blocks)


def llama_of(tied: bool = True, layers: int = 2, hidden: int = 32, vocabulary: int = 600) -> Model:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers,
        num_key_value_heads=2, intermediate_size=2 * hidden, tie_word_embeddings=tied, **SIZES,
    )  # fmt: skip
    module = transformers.LlamaForCausalLM(config).eval()
    example = tokens(2, 9, vocabulary)
    return Model(module, "causal", example, Source("test", "llama", ""), find_blocks(module))


@pytest.fixture
def bert() -> Callable[..., Model]:
    return bert_of


@pytest.fixture
def llama() -> Callable[..., Model]:
    return llama_of


@pytest.fixture
def batches() -> Callable[..., list[Batch]]:
    """`count` batches of 8 texts of 12 tokens."""
    return lambda count=2, vocabulary=600, seed=1: [
        tokens(8, 12, vocabulary, seed + i) for i in range(count)
    ]
