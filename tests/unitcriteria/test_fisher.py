"""Fisher's score of a unit is the divergence of the network without it, to second order."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import networks as net
from penjing.channelmap import channel_map
from penjing.gradients import gradients
from penjing.layerstats import LayerStats
from penjing.steps._importance import importance
from penjing.steps._neurons import consumers_of


class TwoReaders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.out, self.gate = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(self.up(x))
        hidden = hidden if scale is None else hidden * scale
        return self.out(hidden) * torch.sigmoid(self.gate(hidden))


def test_fisher_and_taylor_are_what_a_units_gate_does() -> None:
    torch.manual_seed(0)
    module = TwoReaders()
    x = torch.randn(1, 6)
    model = net.wrap(module, "image", {"pixel_values": x})
    [free] = [f for f in channel_map(model).free if f.group.name == "up.weight"]
    consumers = consumers_of(module, free.group)
    assert sorted(c.path for c in consumers) == ["gate", "out"]
    found = gradients(model, [{"pixel_values": x.expand(2000, -1)}])
    stats = {c.path: LayerStats(gradient=found[c.path]) for c in consumers}
    scores, used = importance("fisher", module, free.group, consumers, stats)
    assert used == "fisher"
    with torch.no_grad():
        before = module.double()(x.double()).log_softmax(-1)
        for unit in range(5):
            scale = torch.ones(5, dtype=torch.float64)
            scale[unit] -= 1e-3
            now = module(x.double(), scale).log_softmax(-1)
            divergence = float((before.exp() * (before - now)).sum()) / 1e-6
            assert float(scores[unit]) == pytest.approx(divergence, rel=0.1)
