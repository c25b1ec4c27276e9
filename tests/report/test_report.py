"""The report's structure, its figures and its inertness, read by an HTML parser."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from penjing.errors import InputError
from penjing.report import render, write
from penjing.report.plot import Mark, interval, panel
from penjing.result import Drop, Latency, Point, Result, Unit

sys.path.insert(0, str(Path(__file__).parent))
import report_samples as samples

VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\u202e' style='x"


class Page(HTMLParser):
    """Tags, attributes and text; a tag that is not closed in order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.style = ""
        self.cells: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.style += data
            return
        self.text += data
        if self.cells and ("td" in self.open or "th" in self.open):
            self.cells[-1][-1] += data

    def row(self, start: str) -> list[str]:
        rows = ([cell.replace("\u00a0", " ") for cell in row] for row in self.cells)
        return next(row for row in rows if row[0].startswith(start))


def page_of(result: Result, **changes: str) -> str:
    given = {"title": "MiniLM", "recipe_toml": samples.RECIPE, "command": samples.COMMAND}
    return render(result, **(given | changes))


def plain(page: Page) -> str:
    return " ".join(page.text.replace("\u00a0", " ").split())


def test_the_verdict_comes_first_with_the_three_figures() -> None:
    text = plain(Page(page_of(samples.minilm())))
    # 90,870,123 / 10,812,410 = 8.404; 10.3 / 1.9 = 5.42
    sentence = (
        "Budget met: 8.4× smaller, 5.4× faster, and label retrieval accuracy falls by 0.60 points "
        "(95 % interval of the drop 0.12 to 1.08)."
    )
    assert sentence in text
    parts = [
        sentence, "Before and after", "Drop of", "What else was possible", "What was done, and why",
        "Notes", "How to reproduce",
    ]  # fmt: skip
    assert sorted(parts, key=text.index) == parts
    assert (
        "Asked for: drop at most 1.00 points, size at most 15.0 MB, latency at most 5.0 ms." in text
    )
    assert "above the 1.00 points allowed" in text


def test_the_table_has_the_figures_of_the_result() -> None:
    page = Page(page_of(samples.minilm()))
    assert page.row("Size on disk")[1:] == ["90.9 MB", "10.8 MB", "8.4× smaller"]
    assert page.row("Parameters")[1:] == ["22.7 M", "14.9 M", "1.52× fewer"]
    assert page.row("Stored per weight")[1:] == ["32.01 bits", "5.80 bits", "5.5× fewer"]
    assert page.row("Latency, median batch 1 ×")[1:] == ["10.3 ms", "1.9 ms", "5.4× faster"]
    assert page.row("Latency, p95 batch 1 ×")[1:] == ["11.8 ms", "2.3 ms", "–"]
    assert page.row("Latency, median batch 32 ×")[1:] == ["243.1 ms", "45.2 ms", "5.4× faster"]
    assert page.row("Throughput")[1:] == ["131.4", "702.9", "5.3× more"]
    assert page.row("Peak memory")[1:] == ["312.5 MB", "96.3 MB", "3.2× less"]
    assert page.row("label retrieval accuracy")[1:] == ["95.70 %", "95.10 %", "−0.60 points"]
    text = plain(page)
    assert "exported in fp32 and measured in the same runtime in the same run" in text
    assert "onnxruntime 1.32.0, 2 threads" in text


def test_every_unit_point_and_recipe_line_is_there() -> None:
    result = samples.minilm()
    page = Page(page_of(result))
    for unit in result.units:
        assert page.row(unit.name) == [unit.name, unit.decision, unit.why]
    rows = [row for row in page.cells if row and row[0].isdigit()]
    others = [p for p in result.front if p.size_bytes != result.after.size_bytes]
    assert [(row[4] == "measured", row[5]) for row in rows] == [
        (p.measured, p.name) for p in others
    ]
    assert samples.RECIPE.strip() in page.text
    assert samples.COMMAND in page.text
    cells = [v for t, n, v in page.attributes if t == "li" and n == "class"]
    assert cells == [
        f"cell {c}" for c in ["bits4", "bits8", "narrow", "cut", "cut", "cut", "cut", "kept"]
    ]


def test_the_policy_lets_in_only_this_style_sheet() -> None:
    text = page_of(samples.minilm())
    page = Page(text)
    digest = hashlib.sha256(page.style.encode()).digest()
    policy = next(v for t, n, v in page.attributes if n == "content" and "default-src" in v)
    found = re.search(r"'sha256-([^']+)'", policy)
    assert found
    assert base64.b64decode(found[1]) == digest
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert text.index("Content-Security-Policy") < text.index("<style>")


def loads(page: Page) -> list[str]:
    names = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"}
    return [v for _, n, v in page.attributes if n in names]


def hostile() -> Result:
    base = samples.minilm()
    return replace(
        base,
        task=HOSTILE, metric=HOSTILE, runtime=HOSTILE, why=HOSTILE,
        budget={HOSTILE: HOSTILE, "max_size": HOSTILE},
        front=tuple(replace(p, name=HOSTILE, recipe=HOSTILE) for p in base.front),
        units=(Unit(HOSTILE, HOSTILE, HOSTILE),),
        notes=(HOSTILE,), versions={HOSTILE: HOSTILE},
    )  # fmt: skip


@pytest.mark.parametrize("met", [True, False])
def test_hostile_names_are_inert(met: bool) -> None:
    text = page_of(replace(hostile(), met=met), title=HOSTILE, recipe_toml=HOSTILE, command=HOSTILE)
    page = Page(text)
    benign = Page(page_of(replace(samples.minilm(), met=met, why="x")))
    assert set(page.tags) <= set(benign.tags)
    assert "script" not in page.tags
    assert not [n for _, n, _ in page.attributes if n.startswith("on") or n == "style"]
    assert {n for _, n, _ in page.attributes} <= {n for _, n, _ in benign.attributes}
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert all(v.startswith(("data:", "#")) for v in loads(page))


@pytest.mark.parametrize("sample", ["minilm", "language", "bare"])
def test_nothing_is_loaded(sample: str) -> None:
    page = Page(page_of(getattr(samples, sample)()))
    assert loads(page)
    assert all(v.startswith(("data:", "#")) for v in loads(page))
    assert "url(" not in page.style
    assert "@import" not in page.style


def awkward() -> dict[str, Result]:
    base, nan, inf = samples.minilm(), math.nan, math.inf
    poor = replace(base.after, size_bytes=0, parameters=0, stored_bits_per_weight=nan, quality=nan,
                   latency_ms=Latency(nan, inf, 1, None), peak_memory_bytes=0)  # fmt: skip
    vast = replace(base.before, size_bytes=10**16, parameters=10**15, quality=1e30)
    return {
        "bare": samples.bare(),
        "no drop": replace(base, drop=None),
        "no quality": replace(base, before=replace(base.before, quality=None), drop=None, front=()),
        "empty front": replace(base, front=()),
        "same": replace(base, after=base.before, front=(), drop=Drop(0, 0, 0, 0.95, 1, False)),
        "not finite": replace(
            base, after=poor, drop=Drop(nan, -inf, inf, nan, 0, True), budget={"max_drop": nan},
            front=(Point(nan, inf, nan, "", True), Point(0, 0, 0, "", False)),
        ),
        "vast": replace(base, before=vast, higher_is_better=False, metric="kl",
                        drop=Drop(1e12, -1e12, 1e300, 0.95, 3, True)),
        "gain": replace(base, drop=Drop(-0.004, -0.009, 0.0, 0.9, 12, False), units=(), notes=()),
        "one point": replace(base, before=replace(base.before, quality=None), front=()),
        "tiny allowed": replace(base, budget={"max_drop": 1e-9}),
    }  # fmt: skip


@pytest.mark.parametrize("case", awkward())
def test_awkward_results_give_a_page_without_nan(case: str) -> None:
    page = Page(page_of(awkward()[case]))
    skipped = ("href", "content")  # the icon and the policy, which says 'none'
    written = page.text + " ".join(v for _, n, v in page.attributes if n not in skipped)
    assert not re.search(r"\b(nan|inf|infinity|none)\b", written, re.IGNORECASE)
    assert "Budget met" in page.text or case == "bare"


def test_a_relative_drop_of_a_metric_where_lower_is_better() -> None:
    page = Page(page_of(samples.language()))
    text = plain(page)
    assert (
        "Budget not met: the drop of perplexity is 21.42 %, above the 10 % allowed, at every size "
        "below 100 MB; the nearest artifact is 5.7× smaller, 1.15× slower, and perplexity is "
        "21.42 % worse (95 % interval of the drop 19.10 to 23.87)." in text
    )
    assert page.row("perplexity") == ["perplexity lower is better", "17.213", "20.900", "+21.42 %"]
    assert "The drop is above the 10.00 % allowed." in text
    assert "the same" in page.row("Parameters")[3]


def test_a_gain_is_not_called_a_drop() -> None:
    text = plain(Page(page_of(awkward()["gain"])))
    assert "accuracy rises by 0.40 points" in text
    assert "+0.40 points" in text
    assert "The whole interval lies within" in text


def marks(count: int) -> list[Mark]:
    first = [Mark(90, 95.7, "original", "original", ""), Mark(11, 95.1, "chosen", "chosen", "")]
    return first + [
        Mark(9 + 0.7 * i, 93 + 2.5 * (i / count) ** 0.4, "measured", str(i), "")
        for i in range(count)
    ]


def draw(points: list[Mark], up: bool = True) -> str:
    return panel(points, name="p", x_name="size", y_name="q", better_up=up, floor=94.7, title="t",
                 description="d")  # fmt: skip


def circles(svg: str, kind: str) -> list[tuple[float, float]]:
    found = re.findall(rf'class="mark {kind}" cx="([\d.]+)" cy="([\d.]+)"', svg)
    return [(float(x), float(y)) for x, y in found]


def test_points_lie_where_their_numbers_say() -> None:
    # 10 to 40 on a logarithmic axis: 20 is half way; up is better also where lower is better
    points = [Mark(x, y, "measured", "", "") for x, y in ((10, 1.0), (20, 2.0), (50, 3.0))]
    for up in (True, False):
        (a, low), (b, middle), (c, high) = sorted(circles(draw(points, up), "measured"))
        assert math.isclose((b - a) / (c - a), math.log(2) / math.log(5), abs_tol=2e-3)
        assert (low > middle > high) is up


def test_the_better_end_is_up() -> None:
    points = [Mark(1, 1.0, "measured", "", ""), Mark(2, 9.0, "measured", "", "")]
    assert circles(draw(points), "measured")[0][1] != circles(draw(points, False), "measured")[0][1]


@pytest.mark.parametrize("count", [0, 1, 12, 100])
def test_labels_do_not_collide(count: int) -> None:
    svg = draw(marks(count))
    found = re.findall(
        r'<text class="label[^"]*" x="([\d.-]+)" y="([\d.-]+)" text-anchor="(\w+)">([^<]+)<', svg
    )
    boxes = []
    for x, y, anchor, text in found:
        wide = 13 * 0.5 * len(text)
        start = float(x) - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
        boxes.append((start, float(y) - 9, start + wide, float(y), text))
    assert {"original", "chosen"} <= {b[4] for b in boxes}
    for i, a in enumerate(boxes):
        assert a[0] >= 0
        assert a[2] <= 380
        for b in boxes[:i]:
            assert a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3], (a, b)


def test_the_interval_is_drawn_to_scale() -> None:
    svg = interval(0.6, 0.1, 1.1, 1.0, show=str, title="t", description="d")
    bar = re.search(r'class="bar" x1="([\d.]+)" x2="([\d.]+)"', svg)
    floor = re.search(r'class="floor" x1="([\d.]+)"', svg)
    zero = re.search(r'class="zero" x1="([\d.]+)"', svg)
    assert bar
    assert floor
    assert zero
    low, high, allowed, origin = (float(v) for v in (bar[1], bar[2], floor[1], zero[1]))
    assert math.isclose((low - origin) / (allowed - origin), 0.1, abs_tol=2e-3)
    assert math.isclose((high - origin) / (allowed - origin), 1.1, abs_tol=2e-3)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "fitted"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(samples.minilm().to_json()))
    (folder / "recipe.toml").write_text(samples.RECIPE)
    manifest = {"format": 1, "recipe": samples.RECIPE, "source": {"path": "/models/all-MiniLM"},
                "metrics": {"command": samples.COMMAND}, "files": {"a": {"size": 1}}}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_write_makes_the_page_of_the_folder(artifact: Path) -> None:
    path = write(artifact)
    assert path == artifact / "report.html"
    assert path.read_text(encoding="utf-8") == page_of(samples.minilm(), title="all-MiniLM")
    entry = json.loads((artifact / "manifest.json").read_text())["files"]["report.html"]
    data = path.read_bytes()
    assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert write(artifact).read_bytes() == data
    assert sorted(p.name for p in artifact.iterdir()) == [
        "manifest.json", "recipe.toml", "report.html", "results.json",
    ]  # fmt: skip


def put(place: str, value: object) -> str:
    table = json.loads(json.dumps(samples.minilm().to_json()))
    inner = table
    *way, last = place.split(".")
    for key in way:
        inner = inner[key]
    inner[int(last) if isinstance(inner, list) else last] = value
    return json.dumps(table)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "another format"),
        ("{}", "another format"),
        ('{"format": 1}', "results.json has no"),
        (put("format", 2), "another format"),
        (put("extra", 2), "surplus extra"),
        (put("after.size_bytes", "big"), "results.json.after.size_bytes"),
        (put("after.quality", math.nan), "finite"),
        (put("after.latency_ms", None), "latency_ms"),
        (put("after.latency_ms.batch", True), "batch"),
        (put("drop.low", math.inf), "finite"),
        (put("met", 1), "met"),
        (put("front", {}), "a list"),
        (put("front.0", 3), "front[0]"),
        (put("units", [{"name": "a"}]), "units[0]"),
        (put("notes", [1]), "notes[0]"),
        (put("versions", {"a": 1}), "versions.a"),
        (put("budget", []), "a table"),
    ],
)
def test_a_malformed_result_is_one_line(artifact: Path, text: str, says: str) -> None:
    (artifact / "results.json").write_text(text)
    with pytest.raises(InputError) as caught:
        write(artifact)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (artifact / "report.html").exists()


@pytest.mark.parametrize("name", ["results.json", "manifest.json", "recipe.toml"])
def test_a_missing_file_is_said(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    with pytest.raises(InputError, match=name.split(".")[0]):
        write(artifact)
    assert not (artifact / "report.html").exists()


@pytest.mark.parametrize(
    ("budget", "state"),
    [({}, "Measured:"), ({"within": 300.0}, "Measured:"), ({"max_drop": 0.01}, "Budget met:")],
)
def test_a_budget_is_met_where_there_is_one(budget: dict[str, float], state: str) -> None:
    page = page_of(replace(samples.minilm(), budget=budget))
    assert re.findall(r'<span class="state">(.*?)</span>', page) == [state]


def test_the_time_asked_for_has_a_unit() -> None:
    result = replace(samples.minilm(), budget={"max_drop": 0.01, "within": 300.0})
    page = render(result, title="t", recipe_toml="", command="").replace("\u00a0", " ")
    assert "Asked for: drop at most 1.00 points, 5 min 0 s of search." in page


def test_an_interval_without_width_is_not_called_proof() -> None:
    drop = Drop(0.0, 0.0, 0.0, 0.95, 20, False)
    # The share p with (1 - p)^20 = 0.05 is 13.91 %.
    assert drop.unseen == pytest.approx(0.1391, abs=5e-5)
    result = replace(samples.minilm(), drop=drop, budget={"max_drop": 0.01})
    page = page_of(result)
    assert "is unchanged on these samples" in page
    assert '<p class="warn">No sample changed' in page
    assert "at most 14\u00a0% of all samples" in page
    assert "The whole interval lies within" not in page
    assert Drop(0.0, -0.1, 0.1, 0.95, 20, False).unseen is None


def test_what_limited_it_and_what_was_predicted() -> None:
    result = samples.minilm()
    first = replace(result.front[0], predicted={"size_bytes": 23.5e6, "latency_ms": 5.2})
    table = {"<block>": {"cut": 0.25, "int8": 0.001}, "b": {"int8": 0.002}}
    front, said = (first, *result.front[1:]), ("<size> binds",)
    explained = replace(result, front=front, sensitivity=table, bounds=said)
    page = render(explained, title="t", recipe_toml="", command="c")
    assert "&lt;size&gt; binds" in page
    assert "(23.5\u00a0MB)" in page
    assert "(5.2\u00a0ms)" in page
    section = page[page.index("Sensitivity") :]
    cells = re.findall(r'<td class="n( worse)?">([^<]*)</td>', section[: section.index("</table>")])
    assert [text for _, text in cells] == ["0.25000", "0.00100", "–", "0.00200"]
    assert [bool(mark) for mark, _ in cells] == [True, False, False, True]
