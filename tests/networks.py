"""Tiny networks with random weights, as Models, for the tests of what edits them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    ViTConfig,
    ViTForImageClassification,
)

from penjing.graph import find_blocks
from penjing.model import Batch, Interface, Model, Source

SOURCE = Source("factory", "tiny", "0")
TEXT = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 32}


def wrap(module: nn.Module, interface: Interface, example: Batch) -> Model:
    return Model(module.eval(), interface, example, SOURCE, find_blocks(module))


def text_batch(seed: int = 0, samples: int = 4, length: int = 12, padded: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 60, (samples, length), generator=generator)
    mask = torch.ones(samples, length, dtype=torch.long)
    if padded:
        for row in range(1, samples):
            mask[row, length - row :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def sharpen(module: nn.Module, factor: float = 8.0) -> nn.Module:
    """Larger weights: with the usual 0.02 a tiny transformer hardly depends on its input."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(factor)
    return module


def bert(layers: int = 3, **options: Any) -> Model:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4}
    config = BertConfig(num_hidden_layers=layers, **(TEXT | heads | options))
    module = BertModel(config, add_pooling_layer=False)
    return wrap(sharpen(module), "embedding", text_batch(samples=2))


def llama(layers: int = 3, embedding: bool = False, **options: Any) -> Model:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
    config = LlamaConfig(num_hidden_layers=layers, **(TEXT | heads | options))
    kind = LlamaModel if embedding else LlamaForCausalLM
    interface: Interface = "embedding" if embedding else "causal"
    return wrap(sharpen(kind(config)), interface, text_batch(samples=2))


def vit(layers: int = 3) -> Model:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
        image_size=16, patch_size=4, num_labels=5,
    )  # fmt: skip
    example = {"pixel_values": torch.randn(2, 3, 16, 16)}
    return wrap(sharpen(ViTForImageClassification(config)), "image", example)


class Basic(nn.Module):
    """A residual block; `stride` 2 halves the picture on both ways."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = None
        if stride > 1 or inputs != outputs:
            self.down = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + (x if self.down is None else self.down(x)))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Sequential(Basic(8, 8), Basic(8, 8))
        self.layer2 = nn.Sequential(Basic(8, 16, 2), Basic(16, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3)))


def randomize_norms(module: nn.Module) -> nn.Module:
    """Batch norms as after training: no statistic is 0 or 1."""
    generator = torch.Generator().manual_seed(5)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for name, low in (("running_mean", -0.5), ("running_var", 0.5)):
                buffer = getattr(norm, name)
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + low)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
                nn.init.uniform_(norm.bias, -0.5, 0.5, generator=generator)
    return module


def resnet() -> Model:
    torch.manual_seed(0)
    module = randomize_norms(ResNet())
    return wrap(module, "tensor", {"x": torch.randn(2, 3, 8, 8)})


class Residual(nn.Module):
    """Two layers write one stream, through a norm and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.b = nn.Conv2d(8, 8, 1, bias=False)
        self.head = nn.Linear(8 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.a(x)))
        x = self.b(self.deep(x)) + x
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


class MlpBlock(nn.Module):
    def __init__(self, width: int, hidden: int, scale: float = 1.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    """Blocks in a list, run one after the other, between two linear layers."""

    def __init__(self, blocks: list[nn.Module], width: int = 8) -> None:
        super().__init__()
        self.inp = nn.Linear(6, width)
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def stack(layers: int = 3, width: int = 8, hidden: int = 24) -> Model:
    torch.manual_seed(0)
    module = Stack([MlpBlock(width, hidden) for _ in range(layers)], width)
    # find_blocks wants composite units; MlpBlock holds two layers.
    return wrap(module, "tensor", {"x": torch.randn(2, 5, 6)})


def arrays(count: int = 6, samples: int = 4, length: int = 16) -> list[Batch]:
    """Batches for `stack`, of one low-rank source, so that neurons are redundant."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(4, 6, generator=generator)
    return [{"x": torch.randn(samples, length, 4, generator=generator) @ mix} for _ in range(count)]


def state(model: Model) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def same(first: Model, second: Model) -> bool:
    """Bit for bit: weights, planes, masks, ranges, structure."""
    one, two = state(first), state(second)
    return (
        one.keys() == two.keys()
        and all(torch.equal(one[n], two[n]) for n in one)
        and first.planes.keys() == second.planes.keys()
        and all(
            torch.equal(first.planes[n].codes, p.codes)
            and torch.equal(first.planes[n].scale, p.scale)
            and torch.equal(first.planes[n].shift, p.shift)
            for n, p in second.planes.items()
        )
        and first.masks.keys() == second.masks.keys()
        and all(torch.equal(first.masks[n], m) for n, m in second.masks.items())
        and {n: r.key for n, r in first.activations.items()}
        == {n: r.key for n, r in second.activations.items()}
        and first.structure == second.structure
    )


def masked_columns(original: Model, small: Model) -> Model:
    """The original with the removed inputs of each consumer at zero, from the slices made."""
    masked = original.copy()
    for entry in small.structure:
        assert entry["kind"] == "slice"
        for path, dim, kept in entry["slices"]:
            if dim == 1:
                weight = masked.module.get_parameter(path)
                gone = [i for i in range(weight.shape[1]) if i not in set(kept)]
                with torch.no_grad():
                    weight[:, gone] = 0
    return masked
