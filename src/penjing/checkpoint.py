"""A checkpoint of training: one file from which it goes on as if nothing had happened.

Tensors as safetensors, all else as JSON in the file's header; no pickle. Written beside its place,
synced, renamed: after a kill the last whole one is there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from penjing import sharding, together
from penjing.files import write_tensors

__all__ = ["Checkpoint", "optimizer_state", "restore_optimizer"]

EVERY = 30.0
"""Seconds between two checkpoints."""


@dataclass
class Checkpoint:
    """The place of a checkpoint and what the caller wants to find again.

    Attributes:
        path: of the file; None keeps nothing.
        last: keep the end of descent too, for what follows it.
        tensors, notes: the caller's own, saved and restored with the rest; notes are JSON-ready.
        divided: a folder with a file of each process, see `penjing.sharding`; without it the first
            process writes all.
    """

    path: Path | None = None
    last: bool = False
    tensors: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    divided: bool = False
    _last: float = field(default_factory=time.monotonic)

    def due(self) -> bool:
        """Whether it is time for another; all processes agree."""
        if self.path is None:
            return False
        return bool(together.agreed(time.monotonic() - self._last >= EVERY))

    def save(self, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
        """Put everything on disk; all processes must call it.

        Args:
            notes: with a number `step`.

        Raises:
            InputError: the disk is full, or the folder is gone.
        """
        if self.path is None or (together.rank() and not self.divided):
            return
        own = {f"own.{n}": t for n, t in self.tensors.items()}
        whole = {n: t.detach().contiguous() for n, t in {**tensors, **own}.items()}
        # The same storage twice is refused.
        whole = {n: t.clone() if n in own else t for n, t in whole.items()}
        said = {"notes": notes, "own": self.notes}
        if self.divided:
            sharding.save(self.path.with_suffix(".shards"), int(notes["step"]), whole, said)
            self._last = time.monotonic()
            return
        text = json.dumps(said)
        write_tensors(self.path, whole, {"training": text}, "the checkpoint")
        self._last = time.monotonic()

    def load(
        self, trained: Sequence[Tensor] = ()
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and notes as they were saved, None where there are none or the file is torn.

        Args:
            trained: see `penjing.sharding.load`.
        """
        if self.path is None:
            return None
        if self.divided:
            held = sharding.load(self.path.with_suffix(".shards"), trained)
        else:
            held = _read(self.path)
        if held is None:
            return None
        found, said = held
        notes, self.notes = dict(said["notes"]), dict(said["own"])
        self.tensors = {n[4:]: t for n, t in found.items() if n.startswith("own.")}
        return {n: t for n, t in found.items() if not n.startswith("own.")}, notes

    def remove(self) -> None:
        """What it was for is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            shutil.rmtree(self.path.with_suffix(".shards"), ignore_errors=True)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = json.loads((file.metadata() or {})["training"])
            return found, {name: dict(said[name]) for name in ("notes", "own")}
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError):
        return None


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state: tensors by `optimizer.number.name`, and what is no tensor."""
    tensors, plain = {}, {}
    for number, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            key = f"optimizer.{number}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            else:
                plain[key] = value
    return tensors, plain


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], plain: dict[str, Any]
) -> None:
    """Put back what `optimizer_state` gave, of an optimizer made alike."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **plain}.items():
        head, _, rest = key.partition(".")
        number, _, name = rest.partition(".")
        if head == "optimizer":
            state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
