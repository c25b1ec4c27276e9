"""A small residual network for Fashion-MNIST, small enough that every recipe of it can be made.

    python bench/tiny.py

Images are halved to 14 x 14; a linear stem, three blocks x + down(gelu(up(norm(x)))) of 32 and 64
units, a linear head: 19,000 weights. Trained once for eight epochs on the first 50,000 training
images (AdamW, one cycle) and kept in the cache as safetensors. The other 10,000 training images
were never seen: searches calibrate on them, and methods are developed on them.
"""

from __future__ import annotations

import fashion
import numpy as np
import safetensors.torch
import torch
from fits import CACHE
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS = CACHE / "fashion-tiny-1.safetensors"
TRAINED = 50_000


class Block(nn.Module):
    """[n, width] to the same."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Tiny(nn.Module):
    """[n, 1, 28, 28] to [n, 10]."""

    def __init__(self, width: int = 32, hidden: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(2)
        self.stem = nn.Linear(fashion.SIDE**2 // 4, width)
        self.blocks = nn.Sequential(*(Block(width, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(self.stem(self.pool(x).flatten(1)))  # [n, width]
        return self.head(self.norm(h))  # type: ignore[no-any-return]


def network() -> nn.Module:
    """For `penjing.load`."""
    return Tiny()


def example() -> dict[str, Tensor]:
    """For `penjing.load`."""
    return {"pixel_values": torch.zeros(2, 1, fashion.SIDE, fashion.SIDE)}


def preprocess(image: object) -> np.ndarray:
    """For `penjing.load`: one channel [1, 28, 28]."""
    pixels = np.asarray(image.convert("L").resize((fashion.SIDE, fashion.SIDE)), np.float32)
    return (pixels[None] / 255 - 0.2860) / 0.3530


def unseen() -> tuple[Tensor, Tensor]:
    """Images and labels that were not trained on, besides the test images."""
    x, y = fashion.images("train")
    return x[TRAINED:], y[TRAINED:]


def trained(epochs: int = 8) -> nn.Module:
    """The network with its weights; trained first where they are not there."""
    if not WEIGHTS.exists():
        torch.manual_seed(0)
        module = network()
        x, y = (part[:TRAINED] for part in fashion.images("train"))
        steps = epochs * (TRAINED // 128)
        optimizer = torch.optim.AdamW(module.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
        for step in range(steps):
            if step % (TRAINED // 128) == 0:
                order = torch.randperm(TRAINED).split(128)
            picked = order[step % (TRAINED // 128)]
            loss = functional.cross_entropy(module(x[picked]), y[picked])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        safetensors.torch.save_file(module.state_dict(), WEIGHTS)
    module = network()
    module.load_state_dict(safetensors.torch.load_file(WEIGHTS))
    return module.eval()


def main() -> None:
    print(f"{fashion.accuracy(trained()):.4f} of 10,000 test images")


if __name__ == "__main__":
    main()
