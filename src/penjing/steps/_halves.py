"""The attention and the MLP of a block: what a half is made of, found by running the block.

A half ends in a writer, a linear layer whose output is added to the hidden state. It mixes tokens
(attention) or does not (MLP). With it goes every part of the block that only feeds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from penjing.calls import Call
from penjing.recipe import Nothing
from penjing.steps._gaps import Writer, writers_of

__all__ = ["Half", "halves_of"]

_SHORT = (1, 6)


@dataclass(frozen=True)
class Half:
    """One half of a block.

    Attributes:
        writer: what ends it.
        parts: paths inside the block of what goes, and what is left in their places.
    """

    writer: Writer
    parts: tuple[tuple[str, Nothing], ...]


def halves_of(block: nn.Module, call: Call) -> dict[Literal["attention", "mlp"], Half]:
    """The halves of a block, by kind; a kind that has none or several writers is left out."""
    call = call.first(*_SHORT) if call.hidden.ndim == 3 else call
    kinds: dict[bool, list[Writer]] = {}
    writers = writers_of(block, call)
    for writer in writers:
        others = [w.path for w in writers if w != writer]
        kinds.setdefault(_mixes(block, call, writer.path, others), []).append(writer)
    names: dict[bool, Literal["attention", "mlp"]] = {True: "attention", False: "mlp"}
    return {
        names[mixes]: Half(own[0], tuple(_parts(block, call, own[0].path)))
        for mixes, own in kinds.items() if len(own) == 1
    }  # fmt: skip


def _mixes(block: nn.Module, call: Call, path: str, others: list[str]) -> bool:
    """Whether what a layer gives at the last place depends on the one before, by itself."""
    moved = call.hidden.clone()
    moved[:, -2] += torch.randn(moved.shape[2], generator=torch.Generator().manual_seed(0))
    found = []
    for hidden in (call.hidden, moved):
        seen, _ = _outputs(block, call, [path], hidden, silent=others)
        found.append(seen[path][:, -1])
    a, b = found
    return not torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))


def _outputs(
    block: nn.Module, call: Call, paths: list[str], hidden: Tensor,
    change: tuple[str, Any] | None = None, silent: Sequence[str] = (),
) -> tuple[dict[str, Any], Tensor]:  # fmt: skip
    """What modules give, and the block; one may give something else, others zeros."""
    seen: dict[str, Any] = {}

    def hook(_: nn.Module, args: Any, output: Any, path: str) -> Any:
        first, more = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        if path in silent:
            first = torch.zeros_like(first)
        if change is not None and path == change[0]:
            first = change[1](first)
        seen[path] = first
        return first if more is None else (first, *more)

    handles = [
        block.get_submodule(p).register_forward_hook(lambda m, a, o, p=p: hook(m, a, o, p))
        for p in dict.fromkeys([*paths, *silent,
                                *([change[0]] if change else ())])
    ]  # fmt: skip
    try:
        return seen, call.run(block, hidden)
    finally:
        for handle in handles:
            handle.remove()


def _parts(block: nn.Module, call: Call, writer: str) -> Iterator[tuple[str, Nothing]]:
    """The outermost modules that give what the writer gives, or feed it alone."""
    names = [n for n, _ in block.named_modules() if n]
    seen, _ = _outputs(block, call, names, call.hidden)
    silent, whole = _outputs(block, call, names, call.hidden, silent=[writer])
    taken: list[str] = []
    for name in names:
        if name not in seen or any(name.startswith(f"{t}.") for t in taken):
            continue
        if not (isinstance(seen[name], Tensor) and seen[name].ndim == 3):
            continue
        holds = name == writer or writer.startswith(f"{name}.")
        if holds:
            goes = torch.equal(seen[name], seen[writer]) and not bool(silent[name].any())
        else:
            _, moved = _outputs(
                block, call, [], call.hidden, (name, lambda x: x + 1 + x.abs()), [writer]
            )
            goes = torch.equal(moved, whole) and any(True for _ in _weights(block, name))
        if goes:
            taken.append(name)
            yield name, Nothing(seen[name].shape[-1], _more(block, call, name))


def _weights(block: nn.Module, name: str) -> Iterator[nn.Parameter]:
    return block.get_submodule(name).parameters()


def _more(block: nn.Module, call: Call, name: str) -> int | None:
    found: list[int | None] = []

    def note(_: nn.Module, args: Any, output: Any) -> None:
        found.append(len(output) - 1 if isinstance(output, tuple) else None)

    handle = block.get_submodule(name).register_forward_hook(note)
    try:
        call.run(block, call.hidden)
    finally:
        handle.remove()
    return found[0]
