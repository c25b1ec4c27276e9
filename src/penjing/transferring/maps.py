"""Scores of every block's attention while a network runs, whatever computes it.

A fused attention (`scaled_dot_product_attention`) keeps no probabilities: its queries and keys are
seen as it is called, turned by their positions already, and the scores computed again,

    a = q k^T scale + mask

one product more than the attention itself has. Where an attention is written out, what its softmax
gets is taken as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from penjing.errors import UsageError
from penjing.model import Model
from penjing.transferring.taps import States

__all__ = ["check_maps", "mapped"]

_FUSED = nn.functional.scaled_dot_product_attention
_SOFTMAX = (nn.functional.softmax, torch.softmax, Tensor.softmax)
# What stands for a place that is not seen: 0 times infinity would be no number.
_NEVER = -1e4


@contextmanager
def mapped(model: Model, blocks: Sequence[str]) -> Iterator[States]:
    """Notes the first attention of each block in a run.

    Args:
        blocks: paths, any of them more than once.

    Yields:
        Filled by a run: by block scores [batch, places, heads, places looked at], none where it
        has no attention.
    """
    states: States = [() for _ in blocks]
    running: list[int] = []

    def enter(_: nn.Module, args: Any, numbers: list[int]) -> None:
        running[:] = numbers
        for number in numbers:
            states[number] = ()

    with ExitStack() as stack:
        for path in dict.fromkeys(blocks):
            block = model.module.get_submodule(path)
            own = partial(enter, numbers=[n for n, other in enumerate(blocks) if other == path])
            stack.callback(block.register_forward_pre_hook(own).remove)
            stack.callback(block.register_forward_hook(lambda *_: running.clear()).remove)
        stack.enter_context(_Watch(states, running))
        yield states


def check_maps(model: Model) -> None:
    """That every block has an attention.

    Raises:
        UsageError: one has none that is seen.
    """
    with torch.no_grad(), mapped(model, model.blocks) as states:
        model.run(model.example)
    for block, seen in zip(model.blocks, states, strict=True):
        if not seen:
            raise UsageError(
                "attention maps", got=f"none in {block}", allowed="attention in every block",
                next="take the feature hidden",
            )  # fmt: skip


class _Watch(TorchFunctionMode):
    def __init__(self, states: States, running: list[int]) -> None:
        super().__init__()
        self._states, self._running = states, running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if self._running and not self._states[self._running[0]]:  # the first in this block
            scores = None
            if func is _FUSED:
                scores = _scores(*args, **given)
            elif func in _SOFTMAX and args[0].ndim == 4:  # [batch, heads, places, places]
                scores = args[0]
            if scores is not None and scores.ndim == 4:
                for number in self._running:
                    self._states[number] = (scores.clamp_min(_NEVER).transpose(1, 2),)
        return func(*args, **given)


def _scores(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """[..., heads, places, places looked at], of arguments as the fused attention has them."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-2, -1)
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, _NEVER)
    return scores + attn_mask
