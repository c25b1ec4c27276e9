"""A network of one's own, 40 % of its multiplications taken out, and what that did.

python examples/own_network.py

Nothing here tells Penjing which channels go together: the two branches that are concatenated, the
shuffle and the residual sum are found by following the channels through one run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import penjing


class Network(nn.Module):
    """Two branches, shuffled together, and a residual sum; [n, 3, 32, 32] to [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(48, 32, 1), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(48, 32, 3, 1, 1), nn.ReLU())
        self.join = nn.Conv2d(64, 48, 3, 1, 1)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        both = torch.cat([self.left(x), self.right(x)], 1)
        x = torch.relu(self.join(nn.functional.channel_shuffle(both, 2)) + x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def network() -> nn.Module:
    """For `penjing.load`; yours would read its trained weights."""
    torch.manual_seed(0)
    return Network()


def example() -> Tensor:
    """For `penjing.load`: a small batch."""
    return torch.zeros(2, 3, 32, 32)


def main() -> None:
    """Shrink, prove, export, load again."""
    with tempfile.TemporaryDirectory() as place:
        data = Path(place) / "images.npz"
        np.savez(data, x0=np.random.default_rng(0).normal(size=(64, 3, 32, 32)).astype("float32"))
        model = penjing.load(f"{__file__}:network", weights="own")
        small = penjing.shrink(model, 0.4, of="macs", data=data)
        penjing.save(small, Path(place) / "small", to=["onnx"])
        again = penjing.load(Path(place) / "small")
        for name, one in (("before", model), ("after", again)):
            print(f"{name}: {one.parameter_count} parameters")
        for layer in ("stem.0", "left.0", "right.0", "join"):
            print(layer, again.module.get_submodule(layer))


if __name__ == "__main__":
    main()
