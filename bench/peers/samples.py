"""Samples for the peers' scripts: arrays named `number/input` of an .npz, one sample a number."""

from __future__ import annotations

from collections import defaultdict

import numpy as np


def read(path: str) -> list[dict[str, np.ndarray]]:
    """Inputs of each sample by name."""
    found: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    with np.load(path) as arrays:
        for key in arrays:
            number, _, name = key.partition("/")
            found[number][name] = arrays[key]
    return list(found.values())
