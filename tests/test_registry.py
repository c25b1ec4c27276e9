"""Leaves are found by file name; the user's own functions too."""

from pathlib import Path

import pytest

import penjing.criteria
from penjing import registry
from penjing.criteria import magnitude
from penjing.errors import InputError, UsageError


def test_choices_are_the_files_of_the_folder() -> None:
    folder = Path(penjing.criteria.__file__).parent
    files = {p.stem.replace("_", "-") for p in folder.glob("[a-z]*.py")}
    assert set(registry.choices("criteria")) == files
    assert list(registry.choices("criteria")) == sorted(files)


def test_names_callables_and_places() -> None:
    assert registry.lookup("criteria", "magnitude", "score") is magnitude.score
    assert registry.lookup("criteria", len, "score") is len
    assert (
        registry.lookup("criteria", "penjing.criteria.magnitude:score", "score") is magnitude.score
    )


@pytest.mark.parametrize("name", ["zzz", "", "../errors", "__init__", None, 3])
def test_an_unknown_name_lists_the_choices(name: object) -> None:
    with pytest.raises(UsageError, match=r"criteria.*fisher, magnitude, random, taylor, wanda"):
        registry.lookup("criteria", name, "score")


def test_a_users_file_is_run_once(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("RUNS = []\nRUNS.append(1)\ndef score(w, s): return w * 2\n")
    assert registry.lookup("criteria", f"{file}:score", "score")(21, None) == 42
    assert registry.attribute_of(f"{file}:RUNS") == [1]


def test_two_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    for folder, value in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.py").write_text(f"x = {value}\n")
    found = [registry.attribute_of(f"{tmp_path / f / 'same.py'}:x") for f in ("a", "b")]
    assert found == [1, 2]


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise RuntimeError('boom')\n")
    whole = tmp_path / "whole.py"
    whole.write_text("def there(): pass\n_hidden = 1\n")
    cases = {
        f"{tmp_path / 'none.py'}:f": "no such Python file",
        f"{broken}:f": "RuntimeError: boom",
        f"{whole}:gone": "has no gone; allowed: there",
        "no.such.module:f": "no such Python module",
    }
    for spec, message in cases.items():
        with pytest.raises(InputError, match=message):
            registry.attribute_of(spec)
    whole.write_text("x = 1")
    broken.write_text("x = 1\n")
    assert registry.attribute_of(f"{broken}:x") == 1


def test_a_changed_file_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "net.py"
    path.write_text("made = 1\n")
    assert registry.attribute_of(f"{path}:made") == 1
    path.write_text("made = 22\n")
    assert registry.attribute_of(f"{path}:made") == 22
