"""ExecuTorch: the C++ runtime of phones and boards, here through the Python binding in its wheel.

A `.pte` takes one sample at a time, so a batch is run row by row. The binding hands over torch
tensors, so a process holds torch beside the runtime: its peak memory is about 200 MB more than
the runtime's own on a device, before and after alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from penjing.errors import InputError, UsageError

__all__ = ["Session", "asked_for", "extra", "file", "open"]

file = "model.pte"
"""Name of the exported file in an artifact."""
extra = "edge"
"""What to install, `penjing[edge]`."""
asked_for = True
"""A fit that is free to choose does not try it: it is for other machines than this one."""

# Kernels of a loaded program keep the process's one pool of threads.
_open: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """One loaded program.

    Attributes:
        inputs: shape of each input by name, None for a free size.
    """

    def __init__(self, path: Path, threads: int, binding: Any) -> None:
        if binding._threadpool_get_thread_count() != threads:
            if _open:
                raise UsageError(
                    "threads of ExecuTorch", got=threads,
                    allowed=f"{binding._threadpool_get_thread_count()}, as its programs that are "
                    "open in this process have",
                    next="close them, or use a process of its own",
                )  # fmt: skip
            binding._unsafe_reset_threadpool(threads)
        try:
            self._program = binding._load_program(str(path))
            names = self._program.load_method("input_names")([])[0]
            self._longest = int(self._program.load_method("longest")([])[0])
            self._method = self._program.load_method("forward")
            meta = self._method.method_meta()
            tensors = [meta.input_tensor_meta(i) for i in range(meta.num_inputs())]
        except (RuntimeError, IndexError) as error:
            raise InputError(
                "ExecuTorch cannot load the file", got=str(error).strip().splitlines()[0],
                allowed="a .pte that penjing wrote",
            ) from error  # fmt: skip
        self._kinds = {
            name: _KINDS[tensor.dtype()]
            for name, tensor in zip(names.split(","), tensors, strict=True)
        }
        shapes = dict(zip(self._kinds, (t.sizes() for t in tensors), strict=True))
        self.inputs: dict[str, tuple[int | None, ...]] = {
            name: (None, None) if self._longest else (None, *shape[1:])
            for name, shape in shapes.items()
        }
        _open.add(self)

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """The one output, of the inputs named as in `inputs`; row by row.

        Raises:
            InputError: an input is missing or has a wrong shape, or a text is too long.
        """
        import torch

        if missing := sorted(set(self._kinds) - set(batch)):
            raise InputError(
                f"input {missing[0]} is missing", got=sorted(batch), allowed=sorted(self._kinds)
            )
        inputs = []
        for name, kind in self._kinds.items():
            array = np.ascontiguousarray(batch[name], dtype=kind)
            wanted = self.inputs[name]
            fits = array.ndim == len(wanted) and all(
                want in (None, size) for want, size in zip(wanted, array.shape, strict=True)
            )
            if not fits or len(array) == 0:
                raise InputError(f"shape of input {name}", got=array.shape, allowed=wanted)
            if self._longest and not 2 <= array.shape[1] <= self._longest:
                raise InputError(
                    "tokens of a text", got=array.shape[1], allowed=f"2 to {self._longest}",
                    next="choose a length that the program takes",
                )  # fmt: skip
            inputs.append(torch.from_numpy(array))
        try:
            rows = [
                self._method([x[row : row + 1] for x in inputs])[0].numpy().copy()
                for row in range(len(inputs[0]))
            ]
        except RuntimeError as error:
            raise InputError("ExecuTorch refuses the batch", got=str(error).strip()) from error
        return np.concatenate(rows)


def open(path: Path, *, threads: int) -> Session:
    """Load the file at `path` for `threads` threads.

    Raises:
        UsageError: ExecuTorch is not installed, or programs of this process have other threads.
        InputError: no such file, or not a program that penjing wrote.
    """
    if not Path(path).is_file():
        raise InputError("no such ExecuTorch program", got=path, allowed="a .pte file")
    try:
        import torch  # noqa: F401  the binding's library needs it loaded
        from executorch.extension.pybindings import _C
    except ImportError as error:
        raise UsageError(
            "ExecuTorch cannot be imported", got=error, next="pip install 'penjing[edge]'"
        ) from error
    return Session(Path(path), threads, _C)


# Numbers of the format's scalar types.
_KINDS: dict[int, type[np.generic]] = {
    0: np.uint8, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.int64, 6: np.float32, 7: np.float64,
    11: np.bool_,
}  # fmt: skip
