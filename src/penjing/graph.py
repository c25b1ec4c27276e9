"""The structure of a network: its repeated blocks, and which layers can be compressed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Transposed", "find_blocks", "given", "is_weighted"]


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
