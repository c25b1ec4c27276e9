"""Hidden states of a student beside those of the network that it comes from.

    distance = mean over blocks of  sum over places |h' - h|^2 / sum over places |h|^2

h is what a block of the original gives, h' what is left of that block gives (FitNets, Romero et
al., arXiv 1412.6550; layer by layer: Patient knowledge distillation, Sun et al., arXiv
1908.09355). Cut blocks have nobody to answer for them, and blocks of another shape are left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penjing.model import Batch, Model

__all__ = ["distance", "twins", "watched"]


def twins(original: Model, student: Model) -> tuple[tuple[str, str], ...]:
    """Paths of the blocks of the student, each with the same block's in the original."""
    now = {path: path for path in original.blocks}
    for entry in student.structure[len(original.structure) :]:
        if entry["kind"] == "drop":
            gone = entry["path"]
            now = {_moved(own, gone): was for own, was in now.items() if own != gone}
    return tuple((own, now[own]) for own in student.blocks if own in now)


def _moved(path: str, gone: str) -> str:
    """Its path after a cut: what stands behind in the same list counts anew."""
    (head, _, name), (place, _, number) = path.rpartition("."), gone.rpartition(".")
    behind = head == place and name.isdigit() and number.isdigit() and int(name) > int(number)
    return f"{head}.{int(name) - 1}" if behind else path


@contextlib.contextmanager
def watched(model: Model, paths: Sequence[str]) -> Iterator[list[Tensor]]:
    """What the modules at `paths` give while the network runs, one tensor each in that order."""
    found: dict[str, Tensor] = {}

    def keep(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[path] = output[0] if isinstance(output, tuple) else output

        return hook

    made: list[Tensor] = []
    handles = [model.module.get_submodule(p).register_forward_hook(keep(p)) for p in paths]
    try:
        yield made
    finally:
        made += [found[path] for path in paths if path in found]
        for handle in handles:
            handle.remove()


def distance(own: Sequence[Tensor], wanted: Sequence[Tensor], batch: Batch) -> Tensor:
    """Scalar, 0 for equal ones; padding does not count."""
    parts = []
    mask = batch.get("attention_mask")
    for x, y in zip(own, wanted, strict=True):
        if x.shape != y.shape:
            continue
        if mask is not None and x.ndim == 3 and mask.shape == x.shape[:2]:
            x, y = x[mask.bool()], y[mask.bool()]  # [tokens, width]
        y = y.float()
        parts.append((x.float() - y).square().sum() / y.square().sum().clamp_min(1e-12))
    return torch.stack(parts).mean() if parts else torch.zeros(())
