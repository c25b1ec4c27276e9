"""Leaf families found by file name: the file `criteria/wanda.py` is the criterion `wanda`.

A leaf is a module of a family's package that defines one agreed attribute
(`score` of a criterion, `fit` of a quantizer, ...). Nothing is registered by hand.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from penjing.errors import InputError, UsageError

__all__ = ["adopt", "attribute_of", "choices", "constant", "lookup", "user_modules"]

_OWN = "penjing_user_"


def choices(family: str) -> tuple[str, ...]:
    """Names in a family, e.g. `choices("criteria")`; hyphens stand for underscores."""
    package = importlib.import_module(f"penjing.{family}")
    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return tuple(sorted(name.replace("_", "-") for name in names if not name.startswith("_")))


def lookup(family: str, name: Any, attribute: str) -> Any:
    """The `attribute` of leaf `name`; a callable is given back as it is.

    `name` may also be `file.py:function` or `package.module:function`.

    Raises:
        UsageError: there is no such leaf; the choices are listed.
        InputError: a `file.py:function` that cannot be loaded.
    """
    if callable(name):
        return name
    if ":" in str(name):
        return attribute_of(str(name))
    if str(name).replace("_", "-") not in choices(family):
        raise UsageError(
            f"unknown name in {family}", got=repr(name), allowed=", ".join(choices(family))
        )
    module = importlib.import_module(f"penjing.{family}.{str(name).replace('-', '_')}")
    return getattr(module, attribute)


def constant(family: str, name: Any, attribute: str, default: Any) -> Any:
    """A constant that leaf `name` declares beside its function; `default` where it does not.

    A user's own function declares nothing.
    """
    if callable(name) or ":" in str(name):
        return default
    module = importlib.import_module(f"penjing.{family}.{str(name).replace('-', '_')}")
    return getattr(module, attribute, default)


def attribute_of(spec: str) -> Any:
    """The object that `file.py:name` or `package.module:name` stands for.

    This runs the user's own code, which is what the user asked for by naming it.

    Raises:
        InputError: no such file, module or name.
    """
    place, _, name = spec.rpartition(":")
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise InputError("no such Python file", got=place, next="check the path")
        written = path.stat()  # a file that changed is another module
        about = (str(path), written.st_mtime_ns, written.st_size)
        key = f"{_OWN}{path.stem}_{abs(hash(about))}"
        if key not in sys.modules:
            module_spec = importlib.util.spec_from_file_location(key, path)
            if module_spec is None or module_spec.loader is None:
                raise InputError("not a Python file", got=place)
            loaded = importlib.util.module_from_spec(module_spec)
            sys.modules[key] = loaded
            try:
                module_spec.loader.exec_module(loaded)
            except Exception as error:
                del sys.modules[key]
                raise InputError(
                    f"{place} does not import", got=f"{type(error).__name__}: {error}"
                ) from error
        module = sys.modules[key]
    else:
        try:
            module = importlib.import_module(place)
        except ImportError as error:
            raise InputError(
                "no such Python module", got=place, next="install it, or give file.py:function"
            ) from error
    if not hasattr(module, name):
        public = ", ".join(n for n in vars(module) if not n.startswith("_"))
        raise InputError(f"{place} has no {name}", allowed=public)
    return getattr(module, name)


def user_modules() -> dict[str, str]:
    """Python files of the user's that were loaded here: paths by module name."""
    return {name: str(m.__file__) for name, m in sys.modules.items() if name.startswith(_OWN)}


def adopt(modules: Mapping[str, str]) -> None:
    """Know what `user_modules` told in another process: its functions can be named here too.

    A file is loaded when one of its functions is needed.
    """
    sys.meta_path.append(_Own(modules))


class _Own:
    """Finds modules by the names that another process gave them."""

    def __init__(self, modules: Mapping[str, str]) -> None:
        self._modules = dict(modules)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        place = self._modules.get(name)
        return None if place is None else importlib.util.spec_from_file_location(name, place)
