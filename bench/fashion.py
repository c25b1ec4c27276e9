"""A residual network for Fashion-MNIST, trained once and kept: ResNet-20 of He et al. (2016), 4.2.

    python bench/fashion.py [--epochs 6]

The images are Debian's package `dataset-fashion-mnist`. Training: SGD with momentum, one cycle,
batches of 128, mirrored and moved by up to two pixels; bfloat16 where the processor has it. The
weights go to the cache as safetensors, with the accuracy on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import gzip
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from fits import CACHE
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS = CACHE / "fashion-resnet20-1.safetensors"
SIDE = 28


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.around = nn.Sequential()
        if stride > 1 or before != width:
            self.around = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.around(x))


class ResNet(nn.Module):
    """Three stages of `depth` blocks; [n, 1, 28, 28] to [n, 10]."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        blocks, before = [], width
        for stage in range(3):
            for place in range(depth):
                now = width << stage
                blocks.append(Block(before, now, 2 if stage and not place else 1))
                before = now
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def network() -> nn.Module:
    """For `penjing.load`."""
    return ResNet()


def example() -> Tensor:
    """For `penjing.load`."""
    return images("t10k")[0][:4]


def images(part: str) -> tuple[Tensor, Tensor]:
    """`train` or `t10k`: float32 [n, 1, 28, 28] with mean 0 and deviation 1, int64 [n]."""
    folder = CACHE / "fashion-mnist"
    if not folder.exists():
        subprocess.run(["apt-get", "download", "-qq", "dataset-fashion-mnist"], cwd=CACHE,
                       check=True)  # fmt: skip
        deb = next(CACHE.glob("dataset-fashion-mnist_*.deb"))
        subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
    pixels, labels = (_idx(next(folder.rglob(f"{part}-{what}*"))) for what in ("images", "labels"))
    x = torch.from_numpy(pixels.reshape(-1, 1, SIDE, SIDE).astype(np.float32) / 255)
    return (x - 0.2860) / 0.3530, torch.from_numpy(labels.astype(np.int64))


def _idx(path: Path) -> np.ndarray:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    head = 4 + 4 * data[3]
    return np.frombuffer(data, np.uint8, offset=head)


def accuracy(module: nn.Module) -> float:
    """Share of the 10,000 test images."""
    x, y = images("t10k")
    module.eval()
    with torch.no_grad():
        found = torch.cat([module(part).argmax(1) for part in x.split(250)])
    return float((found == y).double().mean())


def train(
    module: nn.Module, epochs: int, lr: float, seed: int = 0, teacher: nn.Module | None = None
) -> None:
    """In place, on the 60,000 training images.

    With a teacher half of the loss is the divergence from its logits at a temperature of 4 (Hinton
    et al., arXiv 1503.02531), and the learning rate falls linearly after a twentieth of the steps.
    """
    x, y = images("train")
    generator = torch.Generator().manual_seed(seed)
    decayed = [p for p in module.parameters() if p.ndim > 1]
    others = [p for p in module.parameters() if p.ndim <= 1]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": 5e-4}, {"params": others}], lr, 0.9, nesterov=True
    )
    size = 128
    total = epochs * (len(x) // size)
    shape: dict[str, Any] = {"pct_start": 0.2}
    if teacher is not None:
        teacher.to(memory_format=torch.channels_last)
        shape = {"pct_start": 0.05, "anneal_strategy": "linear", "cycle_momentum": False}
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total, **shape)
    fast = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    module.train()
    for epoch in range(epochs):
        start, loss = time.monotonic(), torch.zeros(())
        order = torch.randperm(len(x), generator=generator)
        for index in order[: len(x) // size * size].view(-1, size):
            batch = _moved(x[index], generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=fast):
                logits = module(batch).float()
                loss = functional.cross_entropy(logits, y[index])
                if teacher is not None:
                    with torch.no_grad():
                        wanted = teacher(batch).float()
                    loss = (loss + distance(logits, wanted)) / 2
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch}: loss {float(loss):.3f}, {time.monotonic() - start:.0f} s",
              flush=True)  # fmt: skip
    module.eval()


def distance(logits: Tensor, wanted: Tensor, temperature: float = 4.0) -> Tensor:
    """Mean divergence [batch, classes] of softened logits, times the square of the temperature."""
    own, other = ((x / temperature).log_softmax(1) for x in (logits, wanted))
    found = functional.kl_div(own, other, reduction="batchmean", log_target=True)
    return temperature**2 * found


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Some mirrored, all moved by the same up to two pixels."""
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    x = torch.where(mirrored, x.flip(3), x)
    down, right = torch.randint(0, 5, (2,), generator=generator).tolist()
    return functional.pad(x, (2, 2, 2, 2))[:, :, down : down + SIDE, right : right + SIDE]


def trained(epochs: int = 6) -> nn.Module:
    """The network with its weights; trained first where they are not there."""
    module = network()
    if not WEIGHTS.exists():
        torch.manual_seed(0)
        module = network().to(memory_format=torch.channels_last)
        train(module, epochs, 0.2)
        safetensors.torch.save_file({n: t.contiguous() for n, t in module.state_dict().items()},
                                    WEIGHTS)  # fmt: skip
    module.load_state_dict(safetensors.torch.load_file(WEIGHTS))
    return module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    print(f"{accuracy(trained(parser.parse_args().epochs)):.4f} of 10,000 test images")


if __name__ == "__main__":
    main()
