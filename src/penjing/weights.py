"""Verbs on bare weight files: prune and quantize without a network around them.

    prune      w[i] = 0 where |w[i]| is among the round(sparsity * n) least of its tensor
    quantize   w = scale * codes + shift, codes unsigned integers of 2 to 8 bits

Tensors of two or more dimensions are edited, as matrices [shape[0], rest]; where a file has
none, all its float tensors are, each as one row. The others pass through and are reported.
How a quantized weight is stored: `penjing.packed`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penjing import packed, registry, weightfiles
from penjing.errors import InputError, UsageError
from penjing.files import check_output
from penjing.masks import Pattern
from penjing.planes import IntegerPlanes, Scheme
from penjing.units import parse_ratio
from penjing.weightfiles import Tensors

__all__ = ["dequantize_file", "prune_file", "quantize_file"]

# Scales of shorter rows would outweigh their codes: such a tensor is quantized as one row.
_SHORT = 8


def prune_file(
    path: Path | str,
    output: Path | str,
    sparsity: float | str | None = None,
    *,
    criterion: str | Callable[..., Tensor] = "magnitude",
    pattern: str | None = None,
    targets: Sequence[str] = (),
    overwrite: bool = False,
    compress: bool = False,
) -> dict[str, Any]:
    """Set the least important weights of a file to zero; shapes and dtypes stay.

    Args:
        path: `.npy`, `.npz`, `.safetensors` or `.pth`.
        output: file to write, in the format of its own extension.
        sparsity: fraction removed of each tensor, 0 to 1 or `50%`.
        criterion: name or callable `score(weight [out, in], stats)`; there are no stats here.
        pattern: `n:m`, n of every m consecutive inputs stay, which sets the sparsity; or `RxC`,
            blocks of so many rows by so many columns stay or go together.
        targets: globs of tensor names; without any, every matrix.
        overwrite: replace an output that exists.
        compress: deflate a `.npz`, which numpy undoes by itself; other formats store every zero.

    Returns:
        JSON-ready report: sizes, weights, how many were removed, each tensor.

    Raises:
        InputError: a file that cannot be used or written, or holds NaN or infinite values.
        UsageError: options that do not make sense.
    """
    chosen = Pattern.parse(pattern, None if sparsity is None else parse_ratio(sparsity))
    names = registry.choices("criteria")
    blind = [n for n in names if not registry.constant("criteria", n, "needs", ())]
    if isinstance(criterion, str) and ":" not in criterion and criterion not in blind:
        raise UsageError(
            "criterion of bare weights", got=criterion, allowed=", ".join(blind),
            next="others look at data: give the network that the weights are of",
        )  # fmt: skip
    score = registry.lookup("criteria", criterion, "score")
    if compress and Path(output).suffix != ".npz":
        raise UsageError(
            "format of a compressed file", got=Path(output).name, allowed=".npz",
            next="pack other files with a general tool such as zip",
        )  # fmt: skip
    path, output = _checked(path, output, overwrite)
    loaded = weightfiles.read(path)
    _refuse_quantized(loaded, path)
    edited, skipped = _targets(loaded.tensors, path, "prune", targets)
    entries = []
    result = dict(loaded.tensors)
    done: dict[Any, Tensor] = {}
    for name in edited:
        tensor = loaded.tensors[name]
        single = torch.promote_types(tensor.dtype, torch.float32)
        scores = score(_matrix(tensor).to(single), None)  # [out, in]
        kept = chosen.mask(scores)
        # Tied tensors get one result between them, so that they stay tied.
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in done:
            done[place] = torch.where(kept.reshape(tensor.shape), tensor, torch.zeros_like(tensor))
        result[name] = done[place]
        removed = int((~kept).sum())
        entry: dict[str, Any] = {
            "name": name,
            "shape": list(tensor.shape),
            "weights": tensor.numel(),
        }
        entry["removed"] = removed
        if left := chosen.leftover(*scores.shape):
            entry["why"] = left
        entries.append(entry)
    weightfiles.write(output, loaded.replaced(result), overwrite, compress=compress)
    weights, removed = (sum(e[key] for e in entries) for key in ("weights", "removed"))
    return _report("prune", path, output, entries, skipped) | {
        "weights": weights,
        "removed": removed,
        "sparsity": removed / max(weights, 1),
        "pattern": pattern,
    }


def quantize_file(
    path: Path | str,
    output: Path | str,
    bits: int | None = None,
    *,
    group: int = 0,
    method: str | Callable[..., IntegerPlanes] = "rtn",
    dequantize: bool = False,
    symmetric: bool = False,
    targets: Sequence[str] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Store the weights of a file as integers with scale and shift.

    Args:
        path: `.npy`, `.npz`, `.safetensors` or `.pth`.
        output: `.npz` or `.safetensors`; with `dequantize` any format that `path` may have.
        bits: 2 to 8.
        group: consecutive inputs that share a scale; 0 is the whole row.
        method: name or callable `fit(weight [out, in], scheme, stats)`; no stats here.
        dequantize: write floats of the original dtypes: of a file that is quantized already,
            or as they come back from quantizing this one.
        symmetric: the zero point is fixed at 2**(bits - 1).
        targets: globs of tensor names; without any, every matrix.
        overwrite: replace an output that exists.

    Returns:
        JSON-ready report: sizes, stored bits a weight, relative error, each tensor.

    Raises:
        InputError: a file that cannot be used or written, or holds NaN or infinite values.
        UsageError: options that do not make sense.
    """
    if dequantize and bits is None:
        return dequantize_file(path, output, overwrite=overwrite)
    if bits is None:
        raise UsageError("no bits", allowed="2 to 8", next="pass --bits 8")
    scheme = Scheme(bits, group, symmetric)
    fit = registry.lookup("quantizers", method, "fit")
    if not dequantize and Path(output).suffix not in (".npz", ".safetensors"):
        raise UsageError(
            "format of a quantized file",
            got=Path(output).name,
            allowed=".npz, .safetensors",
            next="or pass --dequantize for floats",
        )
    path, output = _checked(path, output, overwrite)
    loaded = weightfiles.read(path)
    if dequantize and weightfiles.DESCRIPTION in loaded.extra:
        return dequantize_file(path, output, overwrite=overwrite)
    _refuse_quantized(loaded, path)
    edited, skipped = _targets(loaded.tensors, path, "quantize", targets)
    result = {name: t for name, t in loaded.tensors.items() if name not in edited}
    described: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    for name in edited:
        tensor = loaded.tensors[name]
        matrix = _matrix(tensor, _SHORT)  # [out, in]
        planes = packed.plain(fit(_single(matrix, name, path), scheme, None))
        back = packed.restored(planes, tensor.dtype).reshape(tensor.shape)
        error = float((back.double() - tensor.double()).norm())
        entries.append(
            {
                "name": name,
                "shape": list(tensor.shape),
                "weights": tensor.numel(),
                "bits_per_weight": 8 * planes.stored_bytes / max(tensor.numel(), 1),
                "relative_error": error / max(float(tensor.double().norm()), 1e-300),
            }
        )
        if dequantize:
            result[name] = back
            continue
        described[name], stored = packed.pack(planes, tensor)
        prefix = "" if loaded.lone else f"{name}."
        for key, value in stored.items():
            if prefix + key in loaded.tensors:
                raise InputError(f"a tensor of {path} has a name that is needed", got=prefix + key)
            result[prefix + key] = value
    if dequantize:
        result = {name: result[name] for name in loaded.tensors}
    else:
        loaded.extra[weightfiles.DESCRIPTION] = {
            "format": 1,
            "lone": loaded.lone,
            "tensors": described,
        }
    weightfiles.write(output, loaded.replaced(result), overwrite)
    weights = sum(int(e["weights"]) for e in entries)
    stored_bits = sum(e["bits_per_weight"] * e["weights"] for e in entries)
    return _report("quantize", path, output, entries, skipped) | {
        "weights": weights,
        "bits": bits,
        "group": group,
        "symmetric": symmetric,
        "method": method if isinstance(method, str) else getattr(method, "__name__", "callable"),
        "stored_bits_per_weight": stored_bits / max(weights, 1),
    }


def dequantize_file(
    path: Path | str, output: Path | str, *, overwrite: bool = False
) -> dict[str, Any]:
    """Floats, in the original dtypes and shapes, of a file that `quantize_file` wrote.

    Args:
        path: `.npz` or `.safetensors`.
        output: file to write, in the format of its own extension.
        overwrite: replace an output that exists.

    Raises:
        InputError: not such a file, a damaged one, or one that cannot be written.
    """
    path, output = _checked(path, output, overwrite)
    loaded = weightfiles.read(path)
    table = loaded.extra.pop(weightfiles.DESCRIPTION, None)
    if table is None:
        raise InputError(f"{path} is not quantized", next="give a file that penjing quantize wrote")
    result = dict(loaded.tensors)
    entries = []
    try:
        for name, description in table["tensors"].items():
            prefix = "" if table["lone"] else f"{name}."
            keys = [
                k
                for k in result
                if k.startswith(prefix) and k[len(prefix) :] in packed.keys(description)
            ]
            stored = {key[len(prefix) :]: result.pop(key) for key in keys}
            result[name] = packed.unpack(stored, description)
            entries.append({"name": name, "shape": list(result[name].shape)})
    except InputError as error:
        raise InputError(f"{path} is damaged", got=error, next="quantize again") from error
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(
            f"{path} is damaged", got=f"{type(error).__name__}: {error}", next="quantize again"
        ) from error
    weightfiles.write(output, loaded.replaced(result, lone=bool(table["lone"])), overwrite)
    return _report("dequantize", path, output, entries, [])


def _checked(path: Path | str, output: Path | str, overwrite: bool) -> tuple[Path, Path]:
    path, output = Path(path), Path(output)
    weightfiles.check_format(output)
    check_output(output, overwrite, (path,))
    return path, output


def _refuse_quantized(loaded: Tensors, path: Path) -> None:
    if weightfiles.DESCRIPTION in loaded.extra:
        raise InputError(
            f"{path} is quantized already", next="penjing quantize --dequantize gives floats back"
        )


def _targets(
    tensors: Mapping[str, Tensor], path: Path, verb: str, targets: Sequence[str] = ()
) -> tuple[list[str], list[dict[str, str]]]:
    """Names to edit, and the others with the reason; NaN and infinities refused by name."""
    floats = []
    skipped = []
    for name, tensor in tensors.items():
        if tensor.dtype not in packed.FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            skipped.append({"name": name, "why": f"{kind} is left as it is"})
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"tensor {name} of {path} has NaN or infinite values", next="repair the weights"
            )
        floats.append(name)
    wanted = [n for n in floats if not targets or any(fnmatchcase(n, t) for t in targets)]
    if floats and not wanted:
        raise InputError(
            f"the targets match no tensor of {path}", got=", ".join(targets),
            allowed=f"globs of names such as {floats[0]}",
        )  # fmt: skip
    edited = [name for name in wanted if tensors[name].ndim >= 2] or wanted
    skipped += [
        {
            "name": name,
            "why": "fewer than two dimensions (a bias or a norm)"
            if name in set(wanted)
            else "no target",
        }
        for name in floats
        if name not in set(edited)
    ]
    if not edited:
        raise InputError(
            f"nothing to {verb} in {path}",
            got=", ".join(f"{n} {t.dtype}" for n, t in tensors.items()) or "no tensors",
            allowed="float16, bfloat16, float32 or float64 tensors",
        )
    return edited, skipped


def _matrix(tensor: Tensor, shortest: int = 0) -> Tensor:
    """[shape[0], rest]; one row when there are fewer than two dimensions or rows are short."""
    width = math.prod(tensor.shape[1:])
    if tensor.ndim < 2 or width < shortest:
        return tensor.reshape(1, tensor.numel())
    return tensor.reshape(tensor.shape[0], width)


def _single(matrix: Tensor, name: str, path: Path) -> Tensor:
    single = matrix.float()
    # Half the largest float32, so that scale * codes cannot overflow on the way back.
    if single.numel() and not float(single.abs().max()) <= torch.finfo(torch.float32).max / 2:
        raise InputError(
            f"tensor {name} of {path} has values too large to quantize", allowed="1e38"
        )
    return single


def _report(
    verb: str,
    path: Path,
    output: Path,
    entries: list[dict[str, Any]],
    skipped: list[dict[str, str]],
) -> dict[str, Any]:
    return {
        "verb": verb,
        "input": str(path),
        "output": str(output),
        "size_bytes": {"before": path.stat().st_size, "after": output.stat().st_size},
        "tensors": entries,
        "skipped": skipped,
    }
