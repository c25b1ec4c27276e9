"""Bare weight files: `.npy`, `.npz`, `.safetensors` and `.pth` state dicts, names to tensors.

Nothing in a file is executed: arrays of Python objects are refused, and `.pth` is read with
torch's weights-only unpickler, uncompressed zip form only. What a file claims to hold is
checked against its size and this machine's memory before anything is allocated.
"""

from __future__ import annotations

import errno
import json
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from penjing.errors import InputError, UsageError
from penjing.files import whole_file

__all__ = ["DESCRIPTION", "FORMATS", "Tensors", "check_format", "read", "write"]

FORMATS = (".npy", ".npz", ".safetensors", ".pth", ".pt")
# Entry of quantized files: a JSON object, see penjing.weights.
DESCRIPTION = "penjing"
_LONE = "weight"


@dataclass(frozen=True)
class Tensors:
    """What a weight file holds.

    Attributes:
        tensors: by name; the array of a `.npy` is called `weight`.
        lone: whether it came from a `.npy`.
        extra: JSON objects and metadata strings that travel along.
        raw: arrays of kinds torch does not have (strings, dates), only kept from npz to npz.
        dtypes: numpy dtypes in a byte order other than this machine's.
    """

    tensors: dict[str, Tensor]
    lone: bool = False
    extra: dict[str, Any] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)
    dtypes: dict[str, Any] = field(default_factory=dict)

    def replaced(self, tensors: dict[str, Tensor], lone: bool | None = None) -> Tensors:
        """The same with other tensors."""
        return replace(self, tensors=tensors, lone=self.lone if lone is None else lone)


def check_format(path: Path) -> None:
    """Refuse an extension that is not a weight file's.

    Raises:
        UsageError: with the extensions there are.
    """
    if path.suffix not in FORMATS:
        raise UsageError("format of a weight file", got=path.name, allowed=", ".join(FORMATS))


def read(path: Path) -> Tensors:
    """Read a weight file, by its extension.

    Raises:
        InputError: missing, damaged, of Python objects, or too large for this machine.
        UsageError: an extension that is not a weight file's.
    """
    check_format(path)
    if not path.is_file():
        raise InputError("no such file", got=path, next="check the path")
    readers = {".npy": _read_npy, ".npz": _read_npz, ".safetensors": _read_safetensors}
    _check_memory(path, path.stat().st_size)
    try:
        return readers.get(path.suffix, _read_pth)(path)
    except InputError:
        raise
    except MemoryError as error:
        raise InputError(f"{path} does not fit in memory", next="use a larger machine") from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds Python objects other than tensors",
            next="save only the state dict: torch.save(model.state_dict(), ...)",
        ) from error
    except (OSError, ValueError, KeyError, EOFError, RuntimeError) as error:
        raise _damaged(path, error) from error
    except (zipfile.BadZipFile, SafetensorError, NotImplementedError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is not a whole {path.suffix} file", got=error, next="save it, or fetch it, again"
    )


def _check_memory(path: Path, size: int) -> None:
    free = psutil.virtual_memory().available
    if size > free:
        raise InputError(
            f"{path} does not fit in memory", got=f"{size} B", allowed=f"{free} B are available"
        )


def _refuse_objects(path: Path, name: str, dtype: Any) -> None:
    if dtype.hasobject:
        raise InputError(
            f"array {name} of {path} holds Python objects, which are never read",
            got=dtype,
            next="save it as an array of numbers",
        )


def _from_numpy(array: Any) -> Tensor | None:
    """The tensor, or None for a kind that torch does not have."""
    native = array.dtype.newbyteorder("=")
    try:
        return torch.from_numpy(np.array(array, dtype=native, order="C", copy=True))
    except TypeError:
        return None


def _take(found: Tensors, name: str, array: Any) -> None:
    tensor = _from_numpy(array)
    if tensor is None:
        found.raw[name] = np.array(array)
        return
    found.tensors[name] = tensor
    if not array.dtype.isnative:
        found.dtypes[name] = array.dtype


def _read_npy(path: Path) -> Tensors:
    with path.open("rb") as file:
        shape, _, dtype = _npy_header(file)
        size = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
        left = path.stat().st_size - file.tell()
    _refuse_objects(path, "in it", dtype)
    if size > left:
        raise InputError(f"{path} is cut short", got=f"{left} B of data", allowed=f"{size} B")
    found = Tensors({}, lone=True)
    _take(found, _LONE, np.load(path, allow_pickle=False))
    if found.raw:
        raise InputError(f"{path} has no numbers to work on", got=dtype, allowed="floats")
    return found


def _npy_header(file: IO[bytes]) -> tuple[Any, bool, Any]:
    version = np.lib.format.read_magic(file)
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, order, dtype = read_header(file)
    return shape, order, dtype


def _read_npz(path: Path) -> Tensors:
    with zipfile.ZipFile(path) as archive:
        _check_memory(path, sum(entry.file_size for entry in archive.infolist()))
        for entry in archive.infolist():
            with archive.open(entry) as file:
                shape, _, dtype = _npy_header(file)
                size = int(np.prod([int(n) for n in shape], dtype=object)) * dtype.itemsize
                _refuse_objects(path, entry.filename, dtype)
                if size > entry.file_size:
                    raise InputError(f"array {entry.filename} of {path} is cut short")
    found = Tensors({})
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            _take(found, name, arrays[name])
    if DESCRIPTION in found.raw and found.raw[DESCRIPTION].dtype.kind == "U":
        found.extra[DESCRIPTION] = json.loads(str(found.raw.pop(DESCRIPTION)))
    return found


def _read_safetensors(path: Path) -> Tensors:
    found = Tensors({})
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            found.tensors[name] = file.get_tensor(name)
        found.extra.update(file.metadata() or {})
    if DESCRIPTION in found.extra:
        found.extra[DESCRIPTION] = json.loads(found.extra[DESCRIPTION])
    return found


def _read_pth(path: Path) -> Tensors:
    if not zipfile.is_zipfile(path):
        raise InputError(
            f"{path} is not a zip archive, the form torch saves since 1.6",
            next="save it again with a recent torch, or as .safetensors",
        )
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise InputError(f"{path} is compressed, as torch never writes", next="save it again")
    table = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(table, dict) or not all(isinstance(t, Tensor) for t in table.values()):
        raise InputError(
            f"{path} is not a state dict",
            got=type(table).__name__,
            allowed="names to tensors",
            next="save only the state dict: torch.save(model.state_dict(), ...)",
        )
    found = Tensors({})
    for name, tensor in table.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise InputError(f"tensor {name} of {path} is not a plain tensor", got=tensor.layout)
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise InputError(
                f"tensor {name} of {path} claims more than is stored", got=tensor.shape
            )
        found.tensors[str(name)] = tensor.detach()
    return found


def write(
    output: Path, content: Tensors, overwrite: bool = False, *, compress: bool = False
) -> None:
    """Write a weight file in the format of its extension, whole or not at all.

    Args:
        compress: deflate the arrays of a `.npz`, which numpy undoes by itself.

    Raises:
        InputError: it cannot be written, or the format cannot hold what is in it.
        UsageError: an extension that is not a weight file's.
    """
    check_format(output)
    writers: dict[str, Callable[[Path, Tensors], None]] = {
        ".npy": _write_npy, ".npz": partial(_write_npz, compress=compress),
        ".safetensors": _write_safetensors,
    }  # fmt: skip
    writer = writers.get(output.suffix, _write_pth)

    def to(path: Path) -> None:
        try:
            writer(path, content)
        except (SafetensorError, RuntimeError) as error:
            # Both libraries wrap the operating system's error.
            raise OSError(errno.EIO, str(error)) from error
        except OSError as error:
            # numpy raises a short write without a number.
            raise OSError(error.errno or errno.ENOSPC, str(error)) from error

    if content.raw and output.suffix != ".npz":
        raise InputError(
            f"{output.suffix} cannot hold every array", got=", ".join(content.raw), allowed=".npz"
        )
    whole_file(output, to, overwrite)


def _array(content: Tensors, name: str) -> Any:
    tensor = content.tensors[name]
    try:
        array = tensor.numpy()
    except TypeError as error:
        raise InputError(
            "numpy's formats cannot hold a tensor",
            got=f"{name} {tensor.dtype}",
            next="write .safetensors",
        ) from error
    return array.astype(content.dtypes[name]) if name in content.dtypes else array


def _write_npy(path: Path, content: Tensors) -> None:
    if len(content.tensors) != 1:
        raise InputError(
            "a .npy holds one array",
            got=f"{len(content.tensors)} tensors",
            next="write .npz or .safetensors",
        )
    np.save(path, _array(content, next(iter(content.tensors))), allow_pickle=False)


def _write_npz(path: Path, content: Tensors, compress: bool = False) -> None:
    arrays = {name: _array(content, name) for name in content.tensors} | content.raw
    if DESCRIPTION in content.extra:
        arrays[DESCRIPTION] = np.array(json.dumps(content.extra[DESCRIPTION]))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            # A fixed date, so that the same weights give the same bytes.
            entry = zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def _write_safetensors(path: Path, content: Tensors) -> None:
    metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in content.extra.items()}
    tensors = {}
    taken = set()
    for name, tensor in content.tensors.items():
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in taken else tensor.contiguous()
        taken.add(place)
    save_file(tensors, path, metadata or None)


def _write_pth(path: Path, content: Tensors) -> None:
    # Through a handle torch does not write the path's name into the file.
    with path.open("wb") as file:
        torch.save(content.tensors, file)
