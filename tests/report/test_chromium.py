"""The report in a real browser: nothing overflows, nothing is refused, colours have contrast."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from penjing.report import render
from penjing.result import Result, Unit

sys.path.insert(0, str(Path(__file__).parent))
import chromium
import report_samples as samples

pytestmark = pytest.mark.skipif(chromium.CHROMIUM is None, reason="no chromium")

SIZES = [(1280, False), (1280, True), (360, False), (360, True)]
ATTACK = "\"><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"


def page(folder: Path, result: Result, title: str = "all-MiniLM-L6-v2") -> Path:
    path = folder / "report.html"
    text = render(result, title=title, recipe_toml=samples.RECIPE, command=samples.COMMAND)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def colour(text: str) -> tuple[float, ...]:
    return tuple(float(v) for v in re.findall(r"[\d.]+", text)[:3])


def luminance(text: str) -> float:
    """Relative luminance of WCAG 2.2."""
    parts = [c / 255 for c in colour(text)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_it_fits_and_can_be_read(tmp_path: Path, width: int, dark: bool) -> None:
    found: dict[str, Any] = chromium.layout(page(tmp_path, samples.minilm()), tmp_path, width, dark)
    assert found["complaints"] == []
    assert found["view"] == width
    assert found["width"] <= width
    assert found["style"] == 1
    assert (luminance(found["paper"]) < 0.1) is dark
    inks = ["ink", "soft", "state", "better", "worse", "axis", "limit"]
    for name in inks:
        assert contrast(found[name], found["paper"]) >= 4.5, name
    assert contrast(found["ink"], found["card"]) >= 4.5
    assert contrast(found["ink"], found["leafy"]) >= 4.5
    for texts in found["labels"]:
        assert len(texts) > 10
        for left, top, right, bottom, wide, high, text in texts:
            assert left >= -1, text
            assert top >= -1, text
            assert right <= wide + 1, text
            assert bottom <= high + 1, text
        # glyph boxes have leading above and below the letters
        for a, b in combinations(texts, 2):
            apart = a[0] >= b[2] or b[0] >= a[2] or a[1] + 4 >= b[3] - 4 or b[1] + 4 >= a[3] - 4
            assert apart, (a[6], b[6])


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_long_names_and_a_hundred_units_scroll_inside_their_box(
    tmp_path: Path, width: int, dark: bool
) -> None:
    result = samples.language()
    result = replace(result, metric="m" * 300, notes=("n" * 2000,), runtime="r" * 200)
    found: dict[str, Any] = chromium.layout(
        page(tmp_path, result, "t" * 400), tmp_path, width, dark
    )
    assert found["complaints"] == []
    assert found["width"] <= width
    assert found["cells"] == 100


def test_a_wide_page_is_noticed(tmp_path: Path) -> None:
    path = page(tmp_path, samples.bare())
    path.write_text(path.read_text().replace("<main>", "<main><pre>" + "w" * 9 + "</pre>", 1))
    text = re.sub(r"<pre[^>]*>", '<table><tr><td class="n">' + "w" * 900, path.read_text(), count=1)
    path.write_text(text)
    assert chromium.layout(path, tmp_path, 360)["width"] > 360  # type: ignore[operator]


def test_hostile_names_do_nothing(tmp_path: Path) -> None:
    result = replace(
        samples.minilm(), metric=ATTACK, task=ATTACK, notes=(ATTACK,),
        units=(Unit(ATTACK, ATTACK, ATTACK),), why=ATTACK, versions={ATTACK: ATTACK},
    )  # fmt: skip
    found = chromium.layout(page(tmp_path, result, ATTACK), tmp_path, 360)
    assert found["scripts"] == 0
    assert found["images"] == 0
    assert found["hacked"] is False
    assert found["names"] == [ATTACK]
    assert found["complaints"] == []


def test_the_policy_stops_what_would_get_through(tmp_path: Path) -> None:
    path = page(tmp_path, samples.bare())
    bad = f"<main><p style='color:red'>{ATTACK}</p><img src='https://example.invalid/a.png'>"
    path.write_text(path.read_text(encoding="utf-8").replace("<main>", bad), encoding="utf-8")
    found: dict[str, Any] = chromium.layout(path, tmp_path, 360)
    assert found["scripts"] == 1
    assert found["hacked"] is False
    assert len(found["complaints"]) >= 3


@pytest.mark.parametrize(("width", "dark"), SIZES)
def test_the_picture_has_the_paper_of_its_theme(tmp_path: Path, width: int, dark: bool) -> None:
    png = tmp_path / "page.png"
    path = page(tmp_path, samples.minilm())
    assert chromium.screenshot(path, png, tmp_path, width, 900, dark) == []
    picture = Image.open(png).convert("RGB").crop((0, 0, width, 900))
    paper = (0x15, 0x19, 0x16) if dark else (0xFA, 0xF9, 0xF5)
    edge = picture.crop((width - 8, 0, width, 900)).getcolors()
    assert edge is not None
    assert [c for _, c in edge] == [paper]
    colours = picture.getcolors(1 << 20)
    assert colours is not None
    assert len(colours) > 50
