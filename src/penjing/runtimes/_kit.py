"""What a device needs of this package, as one file that its Python runs: a zip of six modules.

With numpy and onnxruntime installed there it times kernels and exported files; see `_profile`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

from penjing.files import whole_file

__all__ = ["pack"]

_MODULES = (
    "__init__.py", "errors.py", "runtimes/__init__.py", "runtimes/_worker.py",
    "runtimes/_profile.py", "runtimes/onnxruntime.py",
)  # fmt: skip
_MAIN = """\
import pathlib, sys
try:
    import numpy, onnxruntime
except ImportError as error:
    sys.exit(f"kit: {error}; next: python3 -m pip install numpy onnxruntime")
from penjing.runtimes._profile import main
main(pathlib.Path(sys.argv[0]))
"""


def pack(path: Path, files: Mapping[str, Path] | None = None, *, overwrite: bool = False) -> None:
    """Write the file, with more `files` by their names in it.

    Raises:
        InputError: it exists, without `overwrite`.
    """
    package = Path(__file__).parents[1]

    def write(place: Path) -> None:
        place.write_bytes(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(place, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("__main__.py", _MAIN)
            for name in _MODULES:
                archive.write(package / name, f"penjing/{name}")
            for name, file in (files or {}).items():
                archive.write(file, name, zipfile.ZIP_STORED)

    whole_file(path, write, overwrite=overwrite)
