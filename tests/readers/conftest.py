"""Tiny folders in the Hugging Face layout, random weights, made by transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"intermediate_size": 24, "vocab_size": 50, "max_position_embeddings": 32}


def make(folder: Path, class_name: str, **options: Any) -> Path:
    torch.manual_seed(0)
    cls = getattr(transformers, class_name)
    config = cls.config_class(**(SIZES | options))
    cls(config).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return make(tmp_path / "bert", "BertModel", **TEXT)


@pytest.fixture
def maker(tmp_path: Path) -> Callable[..., Path]:
    return lambda name, **options: make(tmp_path / name, name, **options)
