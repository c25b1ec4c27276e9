"""Blocks out of a network of one's own, chosen and mended in three ways, compared.

python examples/cut_blocks.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import penjing


class Block(nn.Module):
    """Adds to what comes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Network(nn.Module):
    """Eight blocks between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(8))
        self.last = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def network() -> nn.Module:
    """For `penjing.load`; yours would read its trained weights."""
    torch.manual_seed(0)
    return Network()


def example() -> Tensor:
    """For `penjing.load`: a small batch [n, 10, 6]."""
    return torch.zeros(2, 10, 6)


def main() -> None:
    """Cut two of eight blocks."""
    ways: tuple[dict[str, Any], ...] = (
        {"patch": "none"}, {"patch": "fused"}, {"criterion": "greedy", "refit": True},
    )  # fmt: skip
    rows = np.random.default_rng(0).normal(size=(96, 10, 6)).astype("float32")
    judging = torch.from_numpy(rows[64:])
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        data = Path(place) / "rows.npz"
        np.savez(data, x0=rows[:64])
        model = penjing.load(f"{__file__}:network", weights="own")
        wanted = model.module(judging)
        for options in ways:
            small = penjing.cut(model, 2, data=data, **options)
            off = float((small.module(judging) - wanted).norm() / wanted.norm())
            print(f"{options}: {small.parameter_count} parameters, off by {off:.3f}")


if __name__ == "__main__":
    main()
