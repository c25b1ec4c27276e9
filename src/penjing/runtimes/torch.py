"""Runtime `torch`: the model itself, for comparison; nothing is exported.

`open` takes an artifact or anything else `penjing.load` reads, `Session` a loaded model.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from penjing.errors import InputError
from penjing.model import Model

__all__ = ["Session", "file", "open"]

file = "."
"""The artifact's folder itself."""


class Session:
    """A model with the interface of the other runtimes.

    Attributes:
        inputs: shape of each input by name; the batch and the length of a text are free.
    """

    def __init__(self, model: Model, threads: int) -> None:
        self.model = model
        self._threads = threads
        text = model.interface in ("embedding", "classifier", "causal")
        self.inputs: dict[str, tuple[int | None, ...]] = {
            name: (None, None) if text else (None, *x.shape[1:])
            for name, x in model.example.items()
        }

    def run(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output for one batch.

        Raises:
            InputError: an input is missing.
        """
        example = self.model.example
        if missing := sorted(set(example) - set(batch)):
            raise InputError(
                f"input {missing[0]} is missing", got=sorted(batch), allowed=sorted(example)
            )
        inputs = {
            name: torch.as_tensor(np.asarray(batch[name])).to(x.dtype)
            for name, x in example.items()
        }
        was = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                return np.asarray(self.model.run(inputs).numpy())
        finally:
            torch.set_num_threads(was)


def open(path: Path, *, threads: int) -> Session:
    """Load `path` for `threads` threads.

    Raises:
        InputError: it cannot be loaded.
    """
    # Looked up late: loading stands above the runtimes.
    load = importlib.import_module("penjing.load").load
    return Session(load(path), threads)
