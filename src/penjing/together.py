"""Several processes that train one network together, as `torchrun` starts them.

Every process holds the whole network and does the same; in training each takes its own batches,
and gradients are summed over all. Files are written by the first alone. Without `torchrun` there
is one process, and nothing here does anything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from penjing.errors import InputError

__all__ = ["agreed", "count", "group", "meet", "rank", "sum_gradients", "total"]


def _is_on() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def rank() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if _is_on() else 0


def count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _is_on() else 1


@contextmanager
def group() -> Iterator[None]:
    """The processes of `torchrun` work together in the body; of one process nothing changes."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or _is_on():
        yield
        return
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def _all_here() -> Iterator[None]:
    """What all processes do at once, and none can alone.

    Raises:
        InputError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        raise InputError(
            "another process has ended before its time", got=str(error).splitlines()[0],
            next="see what it said, and run again: training goes on from its last checkpoint",
        ) from error  # fmt: skip


def meet() -> None:
    """Wait until all processes are here."""
    if _is_on():
        with _all_here():
            distributed.barrier()


def agreed(value: float) -> float:
    """The first process's number."""
    if not _is_on():
        return value
    held = torch.tensor(value, dtype=torch.float64)
    with _all_here():
        distributed.broadcast(held, 0)
    return float(held)


def total(value: float) -> float:
    """Sum over all processes."""
    if not _is_on():
        return value
    held = torch.tensor(value, dtype=torch.float64)
    with _all_here():
        distributed.all_reduce(held)
    return float(held)


def sum_gradients(parameters: Sequence[Tensor]) -> None:
    """Replace every gradient by its sum over all processes; none counts as zero."""
    if not _is_on() or not parameters:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
    with _all_here():
        distributed.all_reduce(flat)
    for parameter, part in zip(
        parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True
    ):
        parameter.grad = part.reshape(parameter.shape)
