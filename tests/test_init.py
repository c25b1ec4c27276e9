"""The package's verbs are lazy and are functions, whatever was imported before."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import penjing


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import penjing, sys; print([m for m in sys.modules if m.split('.')[0] == 'torch'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_submodule_of_a_verbs_name_does_not_hide_the_verb(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in = ModuleType("penjing.api")
    stand_in.measure = lambda: "called"
    monkeypatch.setitem(sys.modules, "penjing.api", stand_in)
    importlib.import_module("penjing.measure")
    assert penjing.measure() == "called"
    assert isinstance(sys.modules["penjing.measure"], ModuleType)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = penjing.nonsense
    assert "fit" in dir(penjing)


def test_the_version_is_the_projects() -> None:
    project = Path(__file__).parents[1] / "pyproject.toml"
    assert f'version = "{penjing.__version__}"' in project.read_text()


def test_every_verb_is_in_the_api() -> None:
    source = Path(penjing.__file__).parent / "api.py"
    if not source.exists():
        pytest.skip("the api is not there yet")
    tree = ast.parse(source.read_text())
    names = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    names |= {
        a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names
    }
    assert set(penjing.__all__) - {"__version__"} <= names
