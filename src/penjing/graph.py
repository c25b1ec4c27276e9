"""The structure of a network: its repeated blocks, and which neurons go together in a block.

Coupling is found by running the block, never by names: noise on one output channel of a
linear layer either stays within a few input channels of one later layer, or it does not, and
then the axis is left alone. Runs in float64, so a change is a change and not rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Group", "Transposed", "coupled_groups", "find_blocks", "given", "is_weighted"]

# Batched float64 kernels may round differently from single ones; a real change is larger.
_CHANGE = 1e-9
# Channels disturbed in one run.
_FEW, _MANY = 8, 256

Runner = Callable[[nn.Module, Tensor], Tensor]


class Transposed(nn.Linear):
    """A linear layer whose checkpoint has its matrix as [in, out] (GPT-2's `Conv1D`)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, device="meta")


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a layer, by place or by name."""
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def is_weighted(module: nn.Module) -> bool:
    """Whether a module is a layer whose weight matrix can be compressed."""
    return isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding)


def _signature(module: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(p.shape)) for name, p in module.named_parameters())


def _repeated(root: nn.Module) -> list[tuple[str, nn.Module]]:
    """Containers at the outermost level whose children are the same kind of composite module."""
    found: list[tuple[str, nn.Module]] = []
    for name, child in root.named_children():
        units = list(child.children())
        composite = [u for u in units if next(u.children(), None) is not None]
        if (
            isinstance(child, nn.ModuleList | nn.Sequential)
            and len(units) >= 2
            and len(composite) == len(units)
            and len({type(u) for u in units}) == 1
        ):
            found.append((name, child))
        else:
            found += [(f"{name}.{inner}", c) for inner, c in _repeated(child)]
    return found


def find_blocks(module: nn.Module, stages: bool = True) -> tuple[str, ...]:
    """Paths of the repeated units, in order.

    A list of modules of one class is a list of blocks; where its members differ in shape and
    hold such lists themselves they are stages (one level of them), and their members are the
    blocks.
    """
    blocks: list[str] = []
    for path, container in _repeated(module):
        units = [(f"{path}.{name}", unit) for name, unit in container.named_children()]
        inner = [(name, find_blocks(unit, stages=False)) for name, unit in units]
        differ = len({_signature(unit) for _, unit in units}) > 1
        if stages and differ and all(found for _, found in inner):
            blocks += [f"{name}.{b}" for name, found in inner for b in found]
        else:
            blocks += [name for name, _ in units]
    return tuple(blocks)


@dataclass(frozen=True)
class Group:
    """Neurons of one layer's input that come and go in units.

    Attributes:
        consumer: linear layer, path relative to the block, whose input channels these are.
        units: input channels of the consumer by unit, e.g. the channels of one head.
        producers: by producer path, the output channels of each unit.
    """

    consumer: str
    units: tuple[tuple[int, ...], ...]
    producers: dict[str, tuple[tuple[int, ...], ...]]

    @property
    def is_heads(self) -> bool:
        """Whether a unit is more than one neuron wide: heads or key-value groups."""
        return len(self.units[0]) > 1


def coupled_groups(block: nn.Module, hidden: Tensor, run: Runner) -> list[Group]:
    """The groups of a block whose producers feed one consumer and nothing else.

    Args:
        block: a transformer block; only `nn.Linear` layers take part.
        hidden: [1, length, width] a sample input.
        run: `run(block, hidden [n, length, width])` -> output; other inputs must broadcast.
    """
    block = copy.deepcopy(block).double()
    hidden = hidden.double()
    layers = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    base_inputs, base_outputs, order = _record(block, layers, hidden, run)
    groups = []
    for position, consumer in enumerate(order):
        maps: dict[str, Tensor] = {}
        for producer in order[:position]:
            reach = _reach(
                block, layers, hidden, run, producer, consumer, base_inputs, base_outputs
            )
            if reach is not None:
                maps[producer] = reach
        if maps and (group := _partition(consumer, maps)):
            groups.append(group)
    return groups


def _record(
    block: nn.Module, layers: dict[str, nn.Linear], hidden: Tensor, run: Runner
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[str]]:
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    handles = []
    for name, layer in layers.items():

        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            inputs[name], outputs[name] = args[0], output

        handles.append(layer.register_forward_hook(keep))
    with torch.no_grad():
        outputs[""] = run(block, hidden)
    for handle in handles:
        handle.remove()
    return inputs, outputs, list(inputs)


def _reach(
    block: nn.Module,
    layers: dict[str, nn.Linear],
    hidden: Tensor,
    run: Runner,
    producer: str,
    consumer: str,
    base_inputs: dict[str, Tensor],
    base_outputs: dict[str, Tensor],
) -> Tensor | None:
    """Bool [producer out, consumer in], or None where the noise goes anywhere else."""
    channels = layers[producer].out_features
    width = base_inputs[consumer].shape[-1]
    length = base_outputs[producer].shape[1]
    generator = torch.Generator().manual_seed(0)
    reach = torch.zeros(channels, width, dtype=torch.bool)
    # Most pairs fail at the first channel already; few are asked before the many.
    starts = [0, *range(_FEW, channels, _MANY)]
    for start, end in zip(starts, [*starts[1:], channels], strict=True):
        chosen = torch.arange(start, end)
        # [chosen, length, channels], row c disturbed in its own channel only
        noise = torch.zeros(len(chosen), *base_outputs[producer].shape[1:], dtype=torch.float64)
        draw = torch.rand(len(chosen), length, generator=generator, dtype=torch.float64)
        # Up and down, and past zero from wherever the channel is: a ReLU must not hide it.
        draw = (1 + draw) * (1 - 2 * (torch.arange(length) % 2))
        size = base_outputs[producer].abs().max().cpu() + 1.0
        noise[torch.arange(len(chosen)), :, chosen] = draw * size
        noise = noise.to(hidden.device)
        seen: dict[str, Tensor] = {}
        handles = []
        for name, layer in layers.items():
            look = _disturb(name, producer, consumer, noise, base_outputs, seen)
            handles.append(layer.register_forward_hook(look))
        try:
            with torch.no_grad():
                final = run(block, hidden.expand(len(chosen), *hidden.shape[1:]))
        finally:
            for handle in handles:
                handle.remove()
        others = [n for n in seen if n not in (consumer, producer)]
        leaks = [(final - base_outputs[""]).abs().max()]
        leaks += [(seen[n] - base_inputs[n]).abs().max() for n in others]
        if not all(leak <= _CHANGE for leak in leaks):  # NaN is a leak
            return None
        difference = (seen[consumer] - base_inputs[consumer]).abs()  # [chosen, length, width]
        reach[chosen] = (difference.amax(1) > _CHANGE).cpu()
    # Where every channel touches everything no unit could be removed on its own.
    return None if not reach.any() or reach.all() else reach


def _disturb(
    name: str,
    producer: str,
    consumer: str,
    noise: Tensor,
    base_outputs: dict[str, Tensor],
    seen: dict[str, Tensor],
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A hook that notes a layer's input, adds noise behind the producer, freezes the consumer."""

    def look(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen[name] = args[0]
        if name == consumer:  # whatever still changes behind it went around it
            return base_outputs[name].expand_as(output)
        return output + noise if name == producer else output

    return look


def _partition(consumer: str, maps: dict[str, Tensor]) -> Group | None:
    width = next(iter(maps.values())).shape[1]
    label = list(range(width))

    def find(i: int) -> int:
        while label[i] != i:
            label[i] = label[label[i]]
            i = label[i]
        return i

    for reach in maps.values():
        for row in torch.unique(reach, dim=0):
            touched = row.nonzero().flatten().tolist()
            for other in touched[1:]:
                label[find(other)] = find(touched[0])
    members: dict[int, list[int]] = {}
    for i in range(width):
        members.setdefault(find(i), []).append(i)
    units = sorted(members.values())
    producers: dict[str, tuple[tuple[int, ...], ...]] = {}
    for name, reach in maps.items():
        owner = {i: u for u, unit in enumerate(units) for i in unit}
        channels: list[list[int]] = [[] for _ in units]
        for c, row in enumerate(reach):
            touched = row.nonzero().flatten()
            if not len(touched):
                return None
            channels[owner[int(touched[0])]].append(c)
        if len({len(c) for c in channels}) != 1 or not channels[0]:
            return None
        producers[name] = tuple(tuple(c) for c in channels)
    if len(units) < 2 or len({len(u) for u in units}) != 1:
        return None
    return Group(consumer, tuple(tuple(u) for u in units), producers)
