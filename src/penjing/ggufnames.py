"""Names and row orders of llama's tensors in GGUF.

llama.cpp rotates pairs (2i, 2i + 1) where transformers rotates (i, i + d/2), so the rows of
the query and key matrices are interleaved:

    stored[head, i, half] = W[head, half, i]
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

__all__ = ["interleaved", "name_of", "parameter_of"]

_LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
_LAYER_BACK = {gguf: name for name, gguf in _LAYER.items()}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_TOP_BACK = {gguf: name for name, gguf in _TOP.items()}


def name_of(name: str) -> str:
    """A parameter's name in GGUF, empty for none."""
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem):
        return f"blk.{match[1]}.{_LAYER[match[2]]}.{kind}" if match[2] in _LAYER else ""
    return f"{_TOP[stem]}.{kind}" if stem in _TOP else ""


def parameter_of(name: str) -> str:
    """The parameter of a name in GGUF, empty for none; the inverse of `name_of`."""
    stem, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem):
        own = _LAYER_BACK.get(match[2])
        return f"model.layers.{int(match[1])}.{own}.{kind}" if own else ""
    return f"{_TOP_BACK[stem]}.{kind}" if stem in _TOP_BACK else ""


def interleaved(name: str, count: int, width: int) -> Tensor | None:
    """Order of the rows of a query or key matrix [count, in] of heads of `width`, else None."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return None
    return torch.arange(count).reshape(-1, 2, width // 2).transpose(1, 2).flatten()
