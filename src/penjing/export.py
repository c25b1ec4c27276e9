"""Export: write a model for a runtime, run the file, and refuse it when it disagrees.

Files that no runtime here runs (`gguf`, `compressed-tensors`) are read back into torch instead.

The deviation of a target is the worst sample's |exported - torch| / |torch| (Euclidean) over
the example and four random batches of other sizes, lengths and paddings. Allowed, from what
the runtimes' own rounding was measured to give on a six-layer sentence encoder:

    float32, or only tables quantized       0.001
    quantized weights                       0.15    (measured 0.03 to 0.06: the runtimes round
                                                     the inputs of low-bit products to int8);
                                            or twice what such a rounding of the inputs does to
                                            the torch model, 0.5 at most: a deep decoder
                                            that was cut magnifies it
    quantized weights and inputs            0.3     (measured 0.00 to 0.12: one input on the
                                                     edge between two codes moves all that follow)
    quantized weights, read back            0.01    (float16 rounds what is stored wider)
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from penjing.errors import ExportError, UsageError
from penjing.graph import is_weighted
from penjing.load import load
from penjing.model import Batch, Model
from penjing.registry import choices, lookup
from penjing.silence import unheard

__all__ = ["READ_BACK", "TARGETS", "deviation", "export", "file_of", "probes", "tolerance"]

TARGETS = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch"}
"""The runtime that runs what a writer writes."""
READ_BACK = ("compressed-tensors", "gguf")
"""Writers whose files no runtime here runs."""

_ROUNDED = 0.15  # where low-bit products are
_SHAPES = ((1, 7), (3, 20), (2, 33), (4, 12))  # batch, length


def export(
    model: Model, folder: Path, to: Sequence[str] = ("onnx",), *, threads: int = 1
) -> dict[str, float]:
    """Write `model` into `folder` for each target and prove the files by running them.

    Args:
        model: the edited model.
        folder: an existing folder; a target's old file in it is replaced.
        to: writers, of `TARGETS` and `READ_BACK`.
        threads: for running the files.

    Returns:
        The deviation of each target.

    Raises:
        UsageError: an unknown target, or a scheme that it cannot express.
        ExportError: it cannot be written, or deviates more than `tolerance`; nothing is left.
    """
    known = (*TARGETS, *READ_BACK)
    for target in to:
        if target not in known or target not in choices("writers"):
            raise UsageError("unknown export target", got=target, allowed=", ".join(known))
    found = {}
    with tempfile.TemporaryDirectory(prefix=".export.", dir=folder) as work:
        # Those that are read back say at once what they cannot express.
        for target in sorted(to, key=lambda name: name not in READ_BACK):
            name = file_of(target)
            place = Path(work) / target
            place.mkdir()
            lookup("writers", target, "write")(model, place / name)
            found[target] = deviation(model, target, place / name, threads=threads)
            allowed = tolerance(model, target, found[target])
            if not found[target] <= allowed:
                raise ExportError(
                    f"the {target} file does not agree with the model",
                    got=f"a deviation of {found[target]:.3g}",
                    allowed=f"<= {allowed:g}",
                    next="export to another format, or quantize less"
                    + (", or leave --observer out" if model.activations else ""),
                )
        for target in to:
            for made in (Path(work) / target).iterdir():
                old = folder / made.name
                if old.is_dir():
                    shutil.rmtree(old)
                made.replace(old)
    return found


def file_of(target: str) -> str:
    """Name in an artifact of what a writer writes."""
    if target in TARGETS:
        return str(lookup("runtimes", TARGETS[target], "file"))
    return str(lookup("writers", target, "file"))


def tolerance(model: Model, target: str = "onnx", found: float = 0.0) -> float:
    """The deviation allowed of this model's exports, of which one has `found`."""
    if model.activations:
        return 0.3
    tables = {
        f"{path}.weight" for path, m in model.module.named_modules() if isinstance(m, nn.Embedding)
    }
    tied = {name for group in model.tied() for name in group}
    if not set(model.planes) - (tables - tied):
        return 1e-3
    if target in READ_BACK:
        return 0.01
    return _ROUNDED if found <= _ROUNDED else max(_ROUNDED, min(0.5, 2 * _sensitivity(model)))


def deviation(model: Model, target: str, path: Path, *, threads: int = 1) -> float:
    """Worst relative error of a sample through the file at `path`; NaN where either is NaN."""
    return _worst(model, _runner(model, target, path, threads), f"the {target} file")


def _worst(model: Model, run: Callable[[Batch], np.ndarray], what: str) -> float:
    worst = 0.0
    for batch in probes(model):
        with torch.no_grad():
            wanted = model.run(batch).double().numpy()
        got = run(batch)
        if got.shape != wanted.shape:
            raise ExportError(f"{what} gives another shape", got=got.shape, allowed=wanted.shape)
        got = got.astype(np.float64)
        if model.interface == "causal":
            kept = batch["attention_mask"].numpy().astype(bool)[:, :, None]
            wanted, got = wanted * kept, np.where(kept, got, 0)
        rows = len(wanted)
        size = np.linalg.norm(wanted.reshape(rows, -1), axis=1)
        error = np.linalg.norm((got - wanted).reshape(rows, -1), axis=1)
        worst = float(np.max([worst, *(error / np.maximum(size, 1e-12))]))
    return worst


def _sensitivity(model: Model) -> float:
    """The deviation that 8-bit inputs of products with quantized weights make in torch.

    A scale for every 32 inputs, as the runtimes' low-bit products have.
    """

    def rounded(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
        x = inputs[0]
        padded = nn.functional.pad(x, (0, -x.shape[-1] % 32))
        parts = padded.reshape(*x.shape[:-1], -1, 32)
        scale = parts.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return ((parts / scale).round() * scale).reshape(padded.shape)[..., : x.shape[-1]]

    def run(batch: Batch) -> np.ndarray:
        hooks = [
            layer.register_forward_pre_hook(rounded)
            for path, layer in model.module.named_modules()
            if isinstance(layer, nn.Linear) and f"{path}.weight" in model.planes
        ]
        try:
            with torch.no_grad():
                return model.run(batch).numpy()
        finally:
            for hook in hooks:
                hook.remove()

    return _worst(model, run, "the model")


def _runner(model: Model, target: str, path: Path, threads: int) -> Callable[[Batch], np.ndarray]:
    """The output of the file at `path`, as an array."""
    if target in TARGETS:
        with unheard():
            session = lookup("runtimes", TARGETS[target], "open")(path, threads=threads)
        return lambda batch: np.asarray(session.run({n: x.numpy() for n, x in batch.items()}))
    if target == "gguf":
        twin = load(str(path))
    else:
        twin = model.copy()
        found = lookup("writers", target, "tensors")(path)
        if missing := set(model.state()) - set(found):
            raise ExportError(f"{sorted(missing)[0]} is not in the {target} file")
        twin.module.load_state_dict(found, strict=False)

    def run(batch: Batch) -> np.ndarray:
        with torch.no_grad():
            return twin.run(batch).numpy()

    return run


def probes(model: Model, seed: int = 0) -> Iterator[Batch]:
    """The example, then four random batches of other sizes."""
    yield {name: _within(model, x) for name, x in model.example.items()}
    random = torch.Generator().manual_seed(seed)
    for rows, length in _SHAPES:
        if model.interface in ("embedding", "classifier", "causal") and not model.is_image:
            yield _text(model, rows, length, random)
        else:
            batch = {name: _like(x, rows, random) for name, x in model.example.items()}
            yield {name: _within(model, x) for name, x in batch.items()}


def _within(model: Model, x: torch.Tensor) -> torch.Tensor:
    """Pictures as the first convolution was calibrated on: others are cut, or not, at its end."""
    layers = ((path, m) for path, m in model.module.named_modules() if is_weighted(m))
    path, layer = next(layers, ("", model.module))
    found = model.activations.get(path)
    if found is None or not found.scale or not isinstance(layer, nn.Conv2d) or x.ndim != 4:
        return x
    return x.clamp(-found.zero_point * found.scale, (255 - found.zero_point) * found.scale)


def _like(x: torch.Tensor, rows: int, random: torch.Generator) -> torch.Tensor:
    """Values of the example in another order: [rows, ...]; normal ones where it has one alone."""
    wanted = (rows, *x.shape[1:])
    if x.is_floating_point() and bool((x == x.flatten()[:1]).all()):
        return torch.randn(wanted, generator=random).to(x)
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
