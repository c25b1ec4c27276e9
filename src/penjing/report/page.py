"""The report: one HTML page that loads nothing, runs nothing and escapes every name.

    verdict, before and after, the drop's interval, Pareto plot, units, notes, how to reproduce

Its policy is `default-src 'none'`; the one style sheet is let in by its own SHA-256, so even a
style attribute that got through the escaping would have no effect.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from penjing.report import figures
from penjing.report.curves import curves
from penjing.report.text import (
    DASH,
    amount,
    call,
    ceiling,
    count,
    drop_amount,
    finite,
    is_percent,
    lines,
    milliseconds,
    number,
    phrase,
    quality,
    ratio,
    safe,
    size,
    threads,
)
from penjing.report.tuning import trials
from penjing.result import Measurement, Result

__all__ = ["render"]

_TREE = (
    '<path class="tray" d="M8 39h32l-3 5H11z"/>'
    '<path class="wood" d="M23 39c-4-6 5-9 2-15M25 28c3-1 6-2 8-5M24 31c-4 0-8-2-9-5"/>'
    '<ellipse class="leaf" cx="24" cy="14" rx="10" ry="7"/>'
    '<ellipse class="leaf" cx="36" cy="21" rx="8" ry="4.6"/>'
    '<ellipse class="leaf" cx="12" cy="23" rx="8.5" ry="4.6"/>'
)
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 48 48"><style>.leaf{fill:#4c9a70}'
    ".wood{fill:none;stroke:#6b5a45;stroke-width:3}.tray{fill:#9c4322}</style>" + _TREE + "</svg>"
)


def render(
    result: Result | None, *, title: str, recipe_toml: str, command: str,
    trainings: Sequence[Mapping[str, Any]] = (), tuning: Mapping[str, Any] | None = None,
) -> str:  # fmt: skip
    """The whole page as one string.

    Args:
        result: what was measured; missing parts and numbers that are not finite become a dash.
            None where nothing was: the page shows the training alone.
        title: the model's name.
        recipe_toml: shown as it is.
        command: the command line that makes the artifact again.
        trainings: as `penjing.report.curves` draws them.
        tuning: as `penjing.report.tuning` shows it.
    """
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    if result is None:
        parts = [f"{_top(title)}<main><h1>Trained, not measured.</h1>", curves(trainings),
                 _reproduce({}, recipe_toml, command)]  # fmt: skip
    else:
        parts = [
            _verdict(result, title),
            _table(result),
            figures.drop(result),
            figures.front(result),
            figures.units(result),
            figures.explained(result),
            trials(tuning or {}),
            curves(trainings),
            _notes(result),
            _reproduce(_facts(result), recipe_toml, command),
        ]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{safe(title, 120)} · Penjing report</title>\n"
        f'<link rel="icon" href="data:image/svg+xml,{quote(_ICON)}">\n'
        f"<style>{style}</style></head>\n<body>{body}\n</body></html>\n"
    )


def _drop_words(result: Result) -> tuple[str, str]:
    """The drop as a clause, and its interval as one."""
    drop, percent = result.drop, is_percent(result)
    if drop is None or not finite(drop.value):
        return "quality was not compared", ""
    worse = drop_amount(abs(drop.value), drop.relative, percent)
    metric = safe(result.metric, 60)
    if float(f"{drop.value:.4g}") == 0:
        clause = f"{metric} is unchanged on these samples"
    elif drop.relative:
        clause = f"{metric} is {worse} {'worse' if drop.value > 0 else 'better'}"
    else:
        rises = (drop.value < 0) == result.higher_is_better
        clause = f"{metric} {'rises' if rises else 'falls'} by {worse}"
    share = f"{drop.confidence * 100:g}" if finite(drop.confidence) else DASH
    low, high = (drop_amount(v, drop.relative, percent, False) for v in (drop.low, drop.high))
    return clause, f"{share}\u00a0% interval of the drop {low} to {high}"


def _verdict(result: Result, title: str) -> str:
    before, after = result.before, result.after
    sizes = ratio(before.size_bytes, after.size_bytes)
    speeds = ratio(before.latency_ms.median, after.latency_ms.median)
    smaller = amount(sizes, "smaller", "larger", "the same size")
    faster = amount(speeds, "faster", "slower", "the same speed")
    clause, spread = _drop_words(result)
    figures = f"{phrase(smaller)}, {phrase(faster)}, and {clause}"
    figures += f" ({spread})" if spread else ""
    why = safe((result.why or "").strip().rstrip("."), 400)
    if not result.limited and result.met:
        state, rest = '<span class="state">Measured:</span>', f"{figures}."
    elif result.met:
        state, rest = '<span class="state">Budget met:</span>', f"{figures}."
    else:
        state = '<span class="state missed">Budget not met:</span>'
        rest = f"{why or 'no reason was recorded'}; the nearest artifact is {figures}."
    asked = _asked(result)
    drop, percent = result.drop, is_percent(result)
    head = DASH if drop is None else drop_amount(drop.value, drop.relative, percent)
    head = head.replace("\u00a0points", "\u00a0pt")
    label = "drop of quality" if drop is None else f"drop of {safe(result.metric, 60)}"
    tiles = (
        (*smaller, f"{size(before.size_bytes)} → {size(after.size_bytes)}"),
        (
            *faster,
            f"{milliseconds(before.latency_ms.median)} → {milliseconds(after.latency_ms.median)}, "
            f"{call(after.latency_ms)}",
        ),
        (head, label, spread.replace(" of the drop", "") or "not measured"),
    )
    cells = "".join(
        f'<div><dt>{word}</dt><dd class="big">{big}</dd><dd class="detail">{detail}</dd></div>'
        for big, word, detail in tiles
    )
    note = f'<p class="soft">{why}.</p>' if result.met and why else ""
    return (
        f'{_top(title)}<main><h1>{state} {rest}</h1>{note}<p class="soft">{asked}</p>'
        f'<dl class="ratios">{cells}</dl>'
    )


def _top(title: str) -> str:
    return (
        '<header class="top"><svg class="tree" viewBox="0 0 48 48" aria-hidden="true">'
        f"{_TREE}</svg>"
        f"<p><strong>{safe(title)}</strong><br>Penjing report</p></header>\n"
    )


def _asked(result: Result) -> str:
    """The budget in words; what is not understood is shown as it was given."""
    budget, parts, known = result.budget, [], set()
    relative = result.drop.relative if result.drop else False
    for name, show in (
        ("drop", lambda v: drop_amount(v, relative, is_percent(result))),
        ("size", size),
        ("latency", milliseconds),
        ("memory", size),
    ):
        value = ceiling(budget, name)
        if value is not None:
            known |= {f"max_{name}", f"max_{name}_bytes", f"max_{name}_ms"}
            parts.append(f"{name} at most {show(value)}")
    within = budget.get("within")
    if isinstance(within, int | float) and finite(within):
        known.add("within")
        parts.append(f"{milliseconds(1e3 * within)} of search")
    rest = {k: v for k, v in budget.items() if k not in known and v is not None}
    parts += [
        f"{safe(k, 60)} {DASH if isinstance(v, float) and not finite(v) else safe(v, 100)}"
        for k, v in rest.items()
    ]
    return "Asked for: " + ", ".join(parts) + "." if parts else "No limit was asked for."


def _table(result: Result) -> str:
    before, after, percent = result.before, result.after, is_percent(result)
    bits = "\u00a0bits"

    def row(
        name: str, old: str, new: str, factor: float | None, words: tuple[str, str] | None
    ) -> str:
        text, tone = "", ""
        if words and factor is not None:
            text = phrase(amount(factor, *words, "the same"))
            tone = "" if "same" in text else " better" if factor > 1 else " worse"
        return (
            f'<tr><th scope="row">{name}</th><td class="n">{old}</td><td class="n">{new}</td>'
            f'<td class="n{tone}">{text or DASH}</td></tr>'
        )

    def compared(name: str, of: str, show: object, words: tuple[str, str]) -> str:
        old, new = getattr(before, of), getattr(after, of)
        return row(name, show(old), show(new), ratio(old, new), words)  # type: ignore[operator]

    rows = [
        compared("Size on disk", "size_bytes", size, ("smaller", "larger")),
        compared("Parameters", "parameters", count, ("fewer", "more")),
        compared(
            "Stored per weight",
            "stored_bits_per_weight",
            lambda v: number(v) + bits,
            ("fewer", "more"),
        ),
    ]
    pairs = [(before.latency_ms, after.latency_ms)]
    if before.latency_batch_ms and after.latency_batch_ms:
        pairs.append((before.latency_batch_ms, after.latency_batch_ms))
    for old, new in pairs:
        for name, of in (("Latency, median", "median"), ("Latency, p95", "p95")):
            a, b = getattr(old, of), getattr(new, of)
            label = f'{name} <span class="soft small">{call(new)}</span>'
            # A ratio of two tails is noise.
            factor = ratio(a, b) if of == "median" else None
            rows.append(row(label, milliseconds(a), milliseconds(b), factor, ("faster", "slower")))
    a, b = before.throughput_per_second, after.throughput_per_second
    if a is not None or b is not None:
        rows.append(
            row(
                "Throughput, samples a second",
                number(a, 1),
                number(b, 1),
                ratio(b, a),
                ("more", "less"),
            )
        )
    rows.append(compared("Peak memory", "peak_memory_bytes", size, ("less", "more")))
    rows.append(_quality_row(result, before, after, percent))
    version = result.versions.get(result.runtime)
    runtime = safe(result.runtime, 60) + (f" {safe(version, 40)}" if version else "")
    return (
        '<section><h2>Before and after</h2><div class="box" tabindex="0" role="region" '
        'aria-label="Before and after"><table>'
        '<thead><tr><th scope="col"><span class="hidden">Figure</span></th>'
        '<th scope="col" class="n">Before</th><th scope="col" class="n">After</th>'
        '<th scope="col" class="n">Change</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="soft small under">Before is the same network, unedited, exported in fp32 and '
        f"measured in the same runtime in the same run: {runtime}, {threads(result.threads)}. "
        f"Task: {safe(result.task, 60)}.</p></section>"
    )


def _quality_row(result: Result, before: Measurement, after: Measurement, percent: bool) -> str:
    better = "higher is better" if result.higher_is_better else "lower is better"
    drop = result.drop
    change = DASH if drop is None else drop_amount(-drop.value, drop.relative, percent)
    if drop is not None and not result.higher_is_better:
        change = drop_amount(drop.value, drop.relative, percent)
    if drop is not None and not change.startswith(("−", DASH, "0.00")):
        change = "+" + change
    tone = "" if drop is None or not drop.value else " worse" if drop.value > 0 else " better"
    return (
        f'<tr><th scope="row">{safe(result.metric, 80)} '
        f'<span class="soft small">{better}</span></th>'
        f'<td class="n">{quality(before.quality, percent)}</td>'
        f'<td class="n">{quality(after.quality, percent)}</td>'
        f'<td class="n{tone}">{change}</td></tr>'
    )


def _notes(result: Result) -> str:
    if not result.notes:
        return ""
    items = "".join(f"<li>{safe(note, 2000)}</li>" for note in result.notes)
    return f'<section><h2>Notes</h2><ul class="notes">{items}</ul></section>'


def _facts(result: Result) -> dict[str, Any]:
    return {"seed": result.seed, "threads": result.threads, **result.versions}


def _reproduce(facts: Mapping[str, Any], recipe_toml: str, command: str) -> str:
    # words of their own, so that a narrow page does not break a line inside `--option`
    words = " ".join(f'<span class="word">{w}</span>' for w in lines(command).split(" "))
    versions = "".join(
        f"<div><dt>{safe(k, 80)}</dt><dd>{safe(v, 80)}</dd></div>" for k, v in facts.items()
    )
    return (
        '<section><h2>How to reproduce</h2><h3>Command</h3><pre class="wrap"><code>'
        f"{words}</code></pre><h3>Recipe</h3>"
        f'<pre tabindex="0"><code>{lines(recipe_toml)}</code></pre>'
        + (f'<h3>Seed and versions</h3><dl class="facts">{versions}</dl>' if facts else "")
        + "</section></main>"
    )
