"""Norms known by what they compute."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from penjing.norms import gain_of


def test_gains_by_what_norms_compute() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 12)
    unit = x / x.square().mean(-1, keepdim=True).sqrt()
    for norm in (LlamaRMSNorm(12), GemmaRMSNorm(12), nn.RMSNorm(12)):
        norm.weight.data = torch.randn(12)
        found = gain_of(norm)
        assert found is not None
        assert found.bias is None
        assert not found.centred
        torch.testing.assert_close(norm(x), unit * found.gain, rtol=1e-3, atol=1e-3)
        norm.weight.data = found.neutral
        torch.testing.assert_close(norm(x), unit, rtol=1e-3, atol=1e-3)
    layer = nn.LayerNorm(12)
    layer.weight.data, layer.bias.data = torch.randn(12), torch.randn(12)
    found = gain_of(layer)
    assert found is not None
    assert found.centred
    assert found.bias is not None
    middle = x - x.mean(-1, keepdim=True)
    middle = middle / middle.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(layer(x), middle * found.gain + found.bias, rtol=1e-3, atol=1e-3)
    for other in (nn.Linear(12, 12), nn.PReLU(12), nn.BatchNorm1d(12), nn.Identity(),
                  nn.LayerNorm((5, 12)), nn.LayerNorm(12, elementwise_affine=False)):  # fmt: skip
        assert gain_of(other) is None
