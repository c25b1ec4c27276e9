"""A network divided between processes, and checkpoints of it: a file of each process.

Every process holds a share of each parameter, of its gradient and of the optimizer's state; a
block's parameters are put together while it runs (fully sharded data parallel, Zhao et al., arXiv
2304.11277; torch's `fully_shard`). A checkpoint is a folder of safetensors files, each with the
places of its shares as JSON, and `notes.json`, which is written last: a folder without it counts
for nothing. Another number of processes divides the shares anew. Nothing on disk is a pickle:
torch's own writer of checkpoints pickles its metadata (`FileSystemWriter.finish`), the one for
safetensors that is used here writes none.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from penjing import together
from penjing.errors import InputError
from penjing.files import kept_in, read_json, sync, whole_file, write_json

__all__ = ["divide", "is_divided", "like", "load", "save", "whole"]


def divide(module: nn.Module, blocks: Sequence[str]) -> None:
    """Leave this process its share of every parameter; of one process nothing changes.

    Gradients are the sum over all processes, as `together.sum_gradients` makes it.
    """
    if together.count() < 2:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = next(module.parameters()).device.type
    mesh = init_device_mesh(kind, (together.count(),))
    for part in (*(module.get_submodule(path) for path in blocks), module):
        held = fully_shard(part, mesh=mesh)
        held.set_gradient_divide_factor(1.0)
        held.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sums


def is_divided(tensor: Tensor) -> bool:
    """Whether this process holds a share of it alone."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of it, in every process; all must ask."""
    return tensor.full_tensor() if is_divided(tensor) else tensor  # type: ignore[attr-defined]


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """This process's share of a tensor that all have, if `other`, of its shape, is divided."""
    if not is_divided(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(
        tensor,
        other.device_mesh,  # type: ignore[attr-defined]
        other.placements,  # type: ignore[attr-defined]
        src_data_rank=None,
    )


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    """Add a checkpoint to a folder, then remove those before it; all processes must call it.

    Raises:
        InputError: the disk is full, or another process has ended.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save as write

    made = folder / f"{step:09d}"
    try:
        if not together.rank():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir(parents=True)
        together.meet()
        with _alone_too():
            writer = HuggingFaceStorageWriter(str(made), save_distributed=True)
            write(dict(tensors), storage_writer=writer)
        if not together.rank():
            sync(made)
            whole_file(made / "notes.json", lambda path: write_json(path, notes))
            for old in folder.iterdir():
                if old != made:
                    shutil.rmtree(old)
    except (OSError, CheckpointException, safetensors.SafetensorError) as error:
        raise InputError(
            f"cannot write the checkpoint {made}",
            got=str(error).splitlines()[0],
            next=f"free disk space and run again; {kept_in(folder.parent)}",
        ) from error


def load(folder: Path, trained: Sequence[Tensor]) -> tuple[dict[str, Tensor], Any] | None:
    """Tensors and notes of the last whole checkpoint, None without one; all processes must call.

    Args:
        trained: what is divided now; tensors that have an axis are divided alike, whatever number
            of processes saved them.
    """
    found = max((p.parent for p in folder.glob("*/notes.json")), default=None)
    if found is None:
        return None
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load as read
    from torch.distributed.tensor import zeros

    about = HuggingFaceStorageReader(str(found)).read_metadata().state_dict_metadata
    mesh = next((p.device_mesh for p in trained if is_divided(p)), None)  # type: ignore[attr-defined]
    held: dict[str, Tensor] = {}
    for name, one in about.items():
        size, kind = one.size, one.properties.dtype  # type: ignore[union-attr]
        shared = mesh is not None and len(size) and kind.is_floating_point
        held[name] = (
            zeros(size, dtype=kind, device_mesh=mesh, placements=_first_axis())
            if shared
            else torch.zeros(size, dtype=kind)
        )
    with _alone_too():
        read(held, storage_reader=HuggingFaceStorageReader(str(found)))
    return held, read_json(found / "notes.json", limit=1 << 30)


def _first_axis() -> Any:
    from torch.distributed.tensor import Shard

    return [Shard(0)]


@contextmanager
def _alone_too() -> Iterator[None]:
    """One process without others is no mistake."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is ")
        yield
