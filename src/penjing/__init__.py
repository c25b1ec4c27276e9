"""Penjing: from a trained model and a budget to the smallest, fastest artifact that passes.

The verbs are loaded when they are first used: the process that measures an exported file
imports this package and must not load torch.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"

# As type checkers know it; `typing` takes longer to import than all of this.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from penjing.api import (
        apply,
        cut,
        evaluate,
        export,
        fit,
        inspect,
        load,
        measure,
        prune,
        quantize,
        recover,
        report,
        save,
        shrink,
        transfer,
        tune,
        verify,
    )

__all__ = [
    "__version__",
    "apply",
    "cut",
    "evaluate",
    "export",
    "fit",
    "inspect",
    "load",
    "measure",
    "prune",
    "quantize",
    "recover",
    "report",
    "save",
    "shrink",
    "transfer",
    "tune",
    "verify",
]


class _Package(ModuleType):
    """A package whose verbs stay functions: some live in a submodule of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        # The import system binds each submodule on its package; that would hide the verb.
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in __all__:
            raise AttributeError(f"module 'penjing' has no attribute {name!r}")
        return getattr(importlib.import_module("penjing.api"), name)

    def __dir__(self) -> list[str]:
        return sorted(__all__)


sys.modules[__name__].__class__ = _Package
