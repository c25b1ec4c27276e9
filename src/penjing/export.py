"""Export: write a model for a runtime, run the file, and refuse it when it disagrees.

The deviation of a target is the worst sample's |exported - torch| / |torch| (Euclidean) over
the example and four random batches of other sizes, lengths and paddings. Allowed, from what
the runtimes' own rounding was measured to give on a six-layer sentence encoder:

    float32, or only tables quantized       0.001
    quantized weights                       0.15    (measured 0.03 to 0.06: the runtimes round
                                                     the inputs of low-bit products to int8)
    quantized weights and inputs            0.3     (measured 0.00 to 0.12: one input on the
                                                     edge between two codes moves all that follow)
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from penjing.errors import ExportError, UsageError
from penjing.model import Batch, Model
from penjing.registry import choices, lookup

__all__ = ["TARGETS", "deviation", "export", "probes", "tolerance"]

TARGETS = {"onnx": "onnxruntime", "openvino": "openvino"}
"""The runtime that runs what a writer writes."""

_SHAPES = ((1, 7), (3, 20), (2, 33), (4, 12))  # batch, length


def export(
    model: Model, folder: Path, to: Sequence[str] = ("onnx",), *, threads: int = 1
) -> dict[str, float]:
    """Write `model` into `folder` for each target and prove the files by running them.

    Args:
        model: the edited model.
        folder: an existing folder; a target's old file in it is replaced.
        to: writers, `onnx` and `openvino`.
        threads: for running the files.

    Returns:
        The deviation of each target.

    Raises:
        UsageError: an unknown target, or a scheme that it cannot express.
        ExportError: it cannot be written, or deviates more than `tolerance`; nothing is left.
    """
    for target in to:
        if target not in TARGETS or target not in choices("writers"):
            raise UsageError("unknown export target", got=target, allowed=", ".join(TARGETS))
    allowed = tolerance(model)
    found = {}
    with tempfile.TemporaryDirectory(prefix=".export.", dir=folder) as work:
        for target in to:
            name = lookup("runtimes", TARGETS[target], "file")
            place = Path(work) / target
            place.mkdir()
            lookup("writers", target, "write")(model, place / name)
            found[target] = deviation(model, target, place / name, threads=threads)
            if not found[target] <= allowed:
                raise ExportError(
                    f"the {target} file does not agree with the model",
                    got=f"a deviation of {found[target]:.3g}",
                    allowed=f"<= {allowed:g}",
                    next="export to another format, or quantize less",
                )
        for target in to:
            for made in (Path(work) / target).iterdir():
                old = folder / made.name
                if old.is_dir():
                    shutil.rmtree(old)
                made.replace(old)
    return found


def tolerance(model: Model) -> float:
    """The deviation allowed of this model's exports."""
    if model.activations:
        return 0.3
    tables = {
        f"{path}.weight" for path, m in model.module.named_modules() if isinstance(m, nn.Embedding)
    }
    tied = {name for group in model.tied() for name in group}
    return 0.15 if set(model.planes) - (tables - tied) else 1e-3


def deviation(model: Model, target: str, path: Path, *, threads: int = 1) -> float:
    """Worst relative error of a sample through the file at `path`; NaN where either is NaN."""
    session = lookup("runtimes", TARGETS[target], "open")(path, threads=threads)
    worst = 0.0
    for batch in probes(model):
        with torch.no_grad():
            wanted = model.run(batch).double().numpy()
        got = session.run({name: x.numpy() for name, x in batch.items()})
        if got.shape != wanted.shape:
            raise ExportError(
                f"the {target} file gives another shape", got=got.shape, allowed=wanted.shape
            )
        got = got.astype(np.float64)
        if model.interface == "causal":
            kept = batch["attention_mask"].numpy().astype(bool)[:, :, None]
            wanted, got = wanted * kept, np.where(kept, got, 0)
        rows = len(wanted)
        size = np.linalg.norm(wanted.reshape(rows, -1), axis=1)
        error = np.linalg.norm((got - wanted).reshape(rows, -1), axis=1)
        worst = float(np.max([worst, *(error / np.maximum(size, 1e-12))]))
    return worst


def probes(model: Model, seed: int = 0) -> Iterator[Batch]:
    """The example, then four random batches of other sizes."""
    yield model.example
    random = torch.Generator().manual_seed(seed)
    for rows, length in _SHAPES:
        if model.interface in ("embedding", "classifier", "causal") and not model.is_image:
            yield _text(model, rows, length, random)
        else:
            yield {name: _like(x, rows, random) for name, x in model.example.items()}


def _like(x: torch.Tensor, rows: int, random: torch.Generator) -> torch.Tensor:
    """Values of the example in another order: [rows, ...]."""
    wanted = (rows, *x.shape[1:])
    count = int(np.prod(wanted))
    pick = torch.randint(x.numel(), (count,), generator=random)
    return x.reshape(-1)[pick].reshape(wanted)


def _text(model: Model, rows: int, length: int, random: torch.Generator) -> Batch:
    limit = model.longest or 510
    length = max(min(length, limit), 1)
    batch: Batch = {}
    tokens = model.example["input_ids"]
    table = getattr(model.module, "get_input_embeddings", lambda: None)()
    vocabulary = getattr(table, "num_embeddings", int(tokens.max()) + 1)
    for name, x in model.example.items():
        if name == "input_ids":
            batch[name] = torch.randint(vocabulary, (rows, length), generator=random)
        elif name == "attention_mask":
            ends = torch.randint(1, length + 1, (rows,), generator=random)
            ends[0] = length
            batch[name] = (torch.arange(length) < ends[:, None]).to(x.dtype)
        else:
            batch[name] = torch.zeros(rows, length, dtype=x.dtype)
    return batch
