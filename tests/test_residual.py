"""Residual streams of tiny networks whose structure is known."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import networks as net
from penjing.residual import Norm, residual_streams


def test_the_stream_of_a_llama() -> None:
    [found] = residual_streams(net.llama(layers=2))
    names = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.o_proj", "mlp.down_proj")]
    assert found.writers == ("model.embed_tokens", *names)
    assert (found.width, found.readers, found.reason) == (32, (), "")
    by_path = {norm.path: norm.readers for norm in found.norms}
    attention = tuple(f"model.layers.1.self_attn.{n}_proj" for n in "qkv")
    assert by_path["model.layers.1.input_layernorm"] == attention
    assert by_path["model.norm"] == ("lm_head",)
    assert len(by_path) == 5


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (net.bert, "normalises after the addition"),
        (net.vit, r"an operation \(cat\)"),
        (lambda: net.llama(embedding=True), "what norm gives stays"),
    ],
)
def test_streams_that_are_not_free_say_why(make: net.Any, reason: str) -> None:
    found = residual_streams(make())
    assert found
    for stream in found:
        assert stream.reason
    with pytest.raises(AssertionError, match=reason):
        assert not found[0].reason, found[0].reason


class Odd(nn.Module):
    """A stream that something besides norms and layers looks at."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inp, self.out = nn.Linear(6, 8), nn.Linear(8, 4)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.offset = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        if self.kind == "number":
            x = x * 0.5
        if self.kind == "parameter":
            x = x + self.offset
        if self.kind == "activation":
            x = torch.relu(x)
        y = self.norm(x)
        if self.kind == "gate":
            y = y * torch.sigmoid(y)
        x = x + self.down(torch.relu(self.up(y)))
        if self.kind == "twice":
            x = x + self.down(torch.relu(self.up(self.norm(x))))
        return self.out(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("", ""), ("number", ""), ("parameter", "add"), ("activation", "relu"), ("gate", "sigmoid"),
     ("twice", "more than once")],
)  # fmt: skip
def test_what_is_not_understood_is_left(kind: str, reason: str) -> None:
    torch.manual_seed(0)
    model = net.wrap(Odd(kind), "tensor", {"x": torch.randn(2, 3, 6)})
    [found] = residual_streams(model)
    assert (reason in found.reason) if reason else not found.reason
    if not reason:
        assert found.writers == ("inp", "down")
        assert found.readers == ("out",)
        assert found.norms == (Norm("norm", ("up",)),)
