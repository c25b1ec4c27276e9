"""Runtime `packed`: the model in torch, its quantized layers computed from packed planes.

Memory is that of the stored bits; see `penjing.packedlayers`. It runs every family of codes.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from penjing.packedlayers import pack_model
from penjing.runtimes.torch import Session

__all__ = ["file", "open"]

file = "."
"""The artifact's folder itself."""


def open(path: Path, *, threads: int) -> Session:
    """Load `path` for `threads` threads.

    Raises:
        InputError: it cannot be loaded.
    """
    # Looked up late: loading stands above the runtimes.
    load = importlib.import_module("penjing.load").load
    return Session(pack_model(load(path)), threads)
