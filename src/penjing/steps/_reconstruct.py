"""Block reconstruction: gradient descent on what a quantized block gives.

    argmin over scales, shifts, codes and norms of  sum over tokens of  |B'(x') - B(x)|^2 / |B(x)|

B is the block before the step on its own inputs x, B' the quantized block on what the quantized
blocks before it give: it makes up for what was lost before it and for what its own layers lose
together (BRECQ, Li et al., arXiv 2102.05426; whole blocks with their codes: EfficientQAT, Chen et
al., arXiv 2407.11062). A token weighs by the root of its energy: by all of it, the few tokens of
very large hidden states would be all that counts; by none of it, they would not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from penjing.calibrate import Stream, Unit
from penjing.calls import Call
from penjing.errors import InputError
from penjing.recipe import Edit
from penjing.steps._grid import Grid, attach

__all__ = ["reconstruct"]

# Peak learning rates of Adam: of norms and biases, of scales, and of codes in units of a scale.
_FLOATS, _SCALES, _CODES = 1e-3, 2e-3, 2e-2
_BETAS = 0.9, 0.95
# Samples of a step, and of how many parts one is held out.
_SAMPLES, _HELD = 4, 8


@dataclass(frozen=True)
class _Part:
    """Some samples on their way through the block."""

    call: Call
    goal: Tensor  # what the block gave before the step
    weight: Tensor  # of each token or place, [..., 1]

    def loss(self, block: nn.Module) -> Tensor:
        error = self.call.forward(block, self.call.hidden) - self.goal
        return (error.square() * self.weight).mean()


def reconstruct(unit: Unit, names: list[str], steps: int) -> Iterator[Edit]:
    """New planes, norms and biases of a block, if samples not trained on say they are better.

    Args:
        unit: an entered block with its reference.
        names: of its quantized weights. One that another block has too stays.
        steps: of gradient descent.

    Raises:
        InputError: the loss is not finite.
    """
    if unit.stream is None or unit.reference is None:
        return
    inside = f"{unit.name}."
    shared = {n for group in unit.model.tied() for n in group
              if not all(one.startswith(inside) for one in group)}  # fmt: skip
    names = [n for n in names if n not in shared]
    twin = unit.model.copy(shared=True)
    before = unit.reference.model.module
    grids = attach(twin, names, {n: before.get_parameter(n).detach() for n in names})
    block = twin.module.get_submodule(unit.name)
    floats = {}
    for parameter in twin.module.parameters():
        parameter.requires_grad_(False)
    for name, parameter in unit.model.module.named_parameters():
        if name.startswith(inside) and parameter.ndim == 1 and name not in {*shared, *names}:
            floats[name] = twin.module.get_parameter(name)
            floats[name].data = parameter.detach().clone()
    parts = list(_parts(unit.stream, unit.reference, before.get_submodule(unit.name)))
    held = parts[::_HELD] if len(parts) > 1 else []
    train = [part for place, part in enumerate(parts) if place % _HELD] if held else parts
    was = _mean(held, block)
    _descend(train, block, list(grids.values()), list(floats.values()), steps)
    now = _mean(held, block)
    if held and not now < was:
        return
    why = f"{steps} steps on the block's output"
    if held:
        why += f"; held-out error {was:.4g} to {now:.4g}"
    for name, grid in grids.items():
        yield Edit("quantize", name, grid.result(), why, {"loss": now})
    for name, parameter in floats.items():
        yield Edit("weight", name, parameter.detach().clone(), why, {"loss": now})


def _parts(stream: Stream, reference: Stream, before: nn.Module) -> Iterator[_Part]:
    calls, goals = list(stream.calls()), reference.outputs or list(reference.run(before))
    mean = sum(float(g.square().mean()) for g in goals) / len(goals)
    few = max(1, min(_SAMPLES, sum(len(g) for g in goals) // 2))
    for number, (call, goal) in enumerate(zip(calls, goals, strict=True)):
        axis = 1 if goal.ndim == 4 else -1  # channels
        size = goal.square().mean(axis, keepdim=True)
        weight = (size.clamp_min(1e-6 * mean) * mean).rsqrt()
        mask = stream.batches[number].get("attention_mask")
        if mask is not None and mask.shape == goal.shape[:2]:
            weight = weight * mask.unsqueeze(-1)
        for first in range(0, len(goal), few):
            rows = slice(first, first + few)
            yield _Part(call.samples(rows), goal[rows], weight[rows])


def _mean(parts: list[_Part], block: nn.Module) -> float:
    with torch.no_grad():
        return sum(float(part.loss(block)) for part in parts) / max(1, len(parts))


def _descend(
    parts: list[_Part], block: nn.Module, grids: list[Grid], floats: list[nn.Parameter], steps: int
) -> None:
    kinds: list[tuple[list[nn.Parameter], float]] = [
        (floats, _FLOATS),
        ([p for grid in grids for p in grid.scales()], _SCALES),
        ([grid.v for grid in grids if grid.v is not None], _CODES),
    ]
    kinds = [(own, rate) for own, rate in kinds if own]
    for own, _ in kinds:
        for parameter in own:
            parameter.requires_grad_(True)
    optimizer = torch.optim.Adam([{"params": own} for own, _ in kinds], betas=_BETAS)
    order: list[int] = []
    for step in range(steps):
        order = order or torch.randperm(len(parts)).tolist()
        rising = min(1.0, (step + 1) / (0.05 * steps + 1))
        falling = 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * step / steps)))
        for group, (_, rate) in zip(optimizer.param_groups, kinds, strict=True):
            group["lr"] = rate * rising * falling
        loss = parts[order.pop()].loss(block)
        if not torch.isfinite(loss):
            raise InputError(
                "the error of a block is not finite", got=float(loss), next="leave --refine out"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
