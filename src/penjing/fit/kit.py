"""A kit: one file that times a device's kernels there, made here.

It holds chains of linear layers of some shapes in every number format as ONNX files, and the code
that times them (`penjing.runtimes._profile`). The device needs numpy and onnxruntime.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from penjing.errors import ExportError
from penjing.fit import chains
from penjing.fit.space import FORMATS
from penjing.runtimes._kit import pack
from penjing.runtimes._ssh import Host

__all__ = ["SHAPES", "TOKENS", "record", "write_kernels", "write_kit"]

SHAPES = ((256, 256), (384, 1536), (768, 768))
"""[in] -> [out] of usual transformers; other shapes are found between them."""
TOKENS = (1, 16, 128)


def write_kernels(
    folder: Path,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    formats: Sequence[str] = tuple(FORMATS),
) -> None:
    """`folder/kernels.json` and the files that it names."""
    kernels = []
    for inputs, outputs in shapes:
        weights = chains.weights(inputs, outputs)
        for name in formats:
            file = f"{name}-{inputs}-{outputs}.onnx"
            chains.write(weights, FORMATS[name], "onnxruntime", folder / file)
            kernels.append(
                {"file": file, "format": name, "inputs": inputs, "outputs": outputs,
                 "layers": len(weights)}
            )  # fmt: skip
    (folder / "kernels.json").write_text(json.dumps({"tokens": list(tokens), "kernels": kernels}))


def write_kit(
    path: Path,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
    *,
    overwrite: bool = False,
) -> None:
    """Write the kit to the file `path`.

    Raises:
        InputError: it exists, without `overwrite`.
    """
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "kernels"
        folder.mkdir()
        write_kernels(folder, shapes, tokens)
        files = {f"kernels/{file.name}": file for file in sorted(folder.iterdir())}
        pack(path, files, overwrite=overwrite)


def record(
    address: str | None = None,
    *,
    threads: Sequence[int] = (),
    seconds: float = 20.0,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    tokens: Sequence[int] = TOKENS,
) -> dict[str, Any]:
    """A profile of this machine, or of one reached by SSH, by a kit that is run there.

    Args:
        address: as `penjing.runtimes._ssh.Host` takes it, or None for this machine.
        threads: none for 1 and one for each core.

    Raises:
        InputError, UsageError: as `Host` does.
        ExportError: the kit fails here.
    """
    options = ["--seconds", f"{seconds:g}"]
    options += ["--threads", ",".join(map(str, threads))] if threads else []
    with tempfile.TemporaryDirectory() as work:
        kit, target = Path(work) / "kit.pyz", Path(work) / "profile.json"
        write_kit(kit, shapes, tokens)
        if address is not None:
            with Host(address) as host:
                text = host.profile(kit, options)
            return dict(json.loads(text))
        # A process of its own, as on a device: nothing but the runtime is loaded.
        done = subprocess.run(
            [sys.executable, "-P", str(kit), str(target), *options],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise ExportError("the kit failed", got=(done.stderr.strip().splitlines() or [""])[-1])
        return dict(json.loads(target.read_text("utf-8")))
