"""report.html: one page that says what was asked, done and measured, and how to do it again."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.errors import InputError
from penjing.files import read_json, sha256, whole_file, write_json
from penjing.report.page import render
from penjing.report.text import finite
from penjing.result import FORMAT, Result

if TYPE_CHECKING:  # the command line says what it can do without torch
    from penjing.model import Model
    from penjing.recipe import Recipe

__all__ = ["of_training", "render", "write"]


def write(folder: Path) -> Path:
    """Write report.html into an artifact folder, whole or not at all; gives its path.

    Reads results.json, recipe.toml, manifest.json, and tuning.json where there is one; without
    results the page shows the curves of training that the manifest holds. Replaces report.html and
    its entry in the manifest. The command is the manifest's `command`, of its top or its `metrics`,
    else the one that replays the recipe; the title likewise its `name`, else the last part of the
    source's path.

    Raises:
        InputError: a file is missing or malformed, or the folder cannot be written.
    """
    if not folder.is_dir():
        raise InputError("no such artifact folder", got=folder)
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict):
        raise InputError(f"{folder / 'manifest.json'} is not a table", got=type(manifest).__name__)
    trainings, results = _trainings(manifest), folder / "results.json"
    result = None if trainings and not results.exists() else _read_result(results)
    page = render(
        result,
        title=_named(manifest, "name") or _source(manifest) or folder.absolute().name,
        recipe_toml=_recipe(folder / "recipe.toml", manifest),
        command=_named(manifest, "command") or _REPLAY,
        trainings=trainings,
        tuning=_tuning(folder / "tuning.json"),
    )
    output = folder / "report.html"
    whole_file(output, lambda path: _write_text(path, page), overwrite=True)
    entry = {"size": output.stat().st_size, "sha256": sha256(output)}
    files = manifest.get("files")
    if isinstance(files, dict) and files.get(output.name) != entry:
        manifest["files"] = dict(sorted({**files, output.name: entry}.items()))
        whole_file(
            folder / "manifest.json", lambda path: write_json(path, manifest), overwrite=True
        )
    return output


def of_training(model: Model, recipe: Recipe | None, name: str) -> str:
    """The page of an artifact that was trained and not measured."""
    text = recipe.to_toml() if recipe else "# no steps"
    return render(None, title=Path(model.source.path or name).name, recipe_toml=text,
                  command=_REPLAY, trainings=model.curves)  # fmt: skip


def _named(manifest: dict[str, Any], key: str) -> str:
    for table in (manifest, manifest.get("metrics")):
        if isinstance(table, dict) and isinstance(found := table.get(key), str) and found:
            return found
    return ""


def _trainings(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """What is well-formed of the manifest's curves."""
    metrics = manifest.get("metrics")
    found = metrics.get("curves") if isinstance(metrics, dict) else None
    return [
        one for one in (found if isinstance(found, list) else ())
        if isinstance(one, dict) and isinstance(one.get("losses"), list)
    ]  # fmt: skip


def _tuning(path: Path) -> dict[str, Any]:
    """What a search left; nothing where there was none."""
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def _source(manifest: dict[str, Any]) -> str:
    source = manifest.get("source")
    path = source.get("path") if isinstance(source, dict) else None
    return Path(path).name if isinstance(path, str) else ""


def _recipe(path: Path, manifest: dict[str, Any]) -> str:
    if not path.exists() and manifest.get("recipe") is None:
        return "# no steps"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("recipe.toml cannot be read", got=f"{path} ({error})") from error


_REPLAY = "penjing apply MODEL recipe.toml -o OUT"


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _read_result(path: Path) -> Result:
    table = read_json(path)
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        found = table.get("format") if isinstance(table, dict) else type(table).__name__
        raise InputError(f"{path} is of another format", got=found, allowed=f"format {FORMAT}")
    _check({k: v for k, v in table.items() if k != "format"}, Result, path.name)
    return Result.from_json(table)


def _check(value: Any, hint: Any, place: str) -> None:
    """Refuse JSON that does not have the shape of `hint`, a dataclass of the nouns."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return
        _check(value, next(h for h in inner if h is not type(None)), place)
    elif origin is tuple:
        _expect(isinstance(value, list), value, "a list", place)
        for index, item in enumerate(value):
            _check(item, inner[0], f"{place}[{index}]")
    elif origin is dict:
        _expect(isinstance(value, dict), value, "a table", place)
        for key, item in value.items():
            _check(item, inner[1], f"{place}.{key}")
    elif is_dataclass(hint):
        _expect(isinstance(value, dict), value, "a table", place)
        hints = typing.get_type_hints(hint)
        needed = {
            f.name for f in fields(hint) if f.default is MISSING and f.default_factory is MISSING
        }
        if missing := sorted(needed - set(value)):
            raise InputError(f"{place} has no {missing[0]}", allowed=", ".join(sorted(hints)))
        if surplus := sorted(set(value) - set(hints)):
            raise InputError(f"{place} has a surplus {surplus[0]}", allowed=", ".join(hints))
        for key, item in value.items():
            _check(item, hints[key], f"{place}.{key}")
    elif hint is float:
        _expect(finite(value) and not isinstance(value, bool), value, "a finite number", place)
    elif hint is int:
        _expect(isinstance(value, int) and not isinstance(value, bool), value, "an integer", place)
    else:
        _expect(isinstance(value, hint), value, hint.__name__, place)


def _expect(holds: bool, value: Any, allowed: str, place: str) -> None:
    if not holds:
        raise InputError(f"{place} is malformed", got=repr(value), allowed=allowed)
