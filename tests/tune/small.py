"""A network of two layers and its data, for searches by the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner

import penjing
from penjing.cli import group

__all__ = ["make", "tune"]

NET = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64, bias=False), nn.ReLU(), nn.Linear(64, 4, bias=False))

def example():
    return {"x": torch.zeros(2, 16)}

def cost(recipe):
    return abs(recipe.steps[0].sparsity - 0.25)
"""
RECIPE = """
seed = 0
[[step]]
do = "prune"
sparsity = 0.0
criterion = "magnitude"
ranking = "layer"
[[step]]
do = "quantize"
bits = 8
method = "rtn"
"""
COMMAND = ["--search", "prune.sparsity=0..0.9:0.3 quantize.bits=4|8", "--search",
           "quantize.group=0|5", "--weights", "own", "--threads", "1"]  # fmt: skip


def make(folder: Path) -> Path:
    """Write them."""
    (folder / "net.py").write_text(NET)
    (folder / "recipe.toml").write_text(RECIPE)
    x = np.random.default_rng(0).normal(size=(240, 16)).astype(np.float32)
    model = penjing.load(f"{folder / 'net.py'}:net", weights="own")
    with torch.no_grad():  # the network is always right
        label = model.module(torch.from_numpy(x)).argmax(1).numpy()
    np.savez(folder / "data.npz", x=x, label=label)
    return folder


def tune(place: Path, output: Path, *more: str) -> Any:
    words = ["tune", f"{place / 'net.py'}:net", str(place / "recipe.toml"), *COMMAND, *more]
    return CliRunner().invoke(group, [*words, "-o", str(output)])
