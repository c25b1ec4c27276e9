"""The pictures of the report with the words around them: drop, Pareto plot, units."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from penjing.report import plot
from penjing.report.text import (
    DASH,
    ceiling,
    drop_amount,
    finite,
    is_percent,
    milliseconds,
    number,
    quality,
    safe,
    size,
)
from penjing.result import Result

__all__ = ["drop", "explained", "front", "units"]

_ORIGINAL: plot.Kind = "original"
_CHOSEN: plot.Kind = "chosen"
_KINDS: dict[plot.Kind, str] = {
    "original": "original, fp32",
    "chosen": "chosen",
    "measured": "measured",
    "predicted": "predicted only",
}
_DECISIONS = (  # the class of a cell, its legend, and the words that mean it; first match wins
    ("cut", "cut away", r"\b(cut|drop(ped)?|remov\w*)\b"),
    ("narrow", "shrunk", r"\b(shrink|shrunk|slice\w*|heads?|hidden|width|neurons?)\b"),
    ("mask", "pruned", r"\b(prun\w*|mask\w*|spars\w*|\d+:\d+)\b"),
    ("bits8", "8 bits", r"\b(u?int8|8[ -]?bits?|bits?[ =:]*8|w8\w*)\b"),
    ("bits4", "4 to 7 bits", r"\b(u?int[4-7]|[4-7][ -]?bits?|bits?[ =:]*[4-7]|w4\w*)\b"),
    ("bits2", "under 4 bits", r"\b(u?int[1-3]|[1-3][ -]?bits?|bits?[ =:]*[1-3]|binary|ternary)\b"),
    ("kept", "kept as it was", r"\b(keep|kept|none|untouched|unchanged|fp32|float32|frozen)\b"),
    ("other", "other", r""),
)


def drop(result: Result) -> str:
    """The drop's interval against what is allowed, as a picture and in words."""
    drop, percent = result.drop, is_percent(result)
    if drop is None or not all(finite(v) for v in (drop.value, drop.low, drop.high)):
        return (
            "<section><h2>Drop of quality</h2><p>No evaluation data was given, so the drop of "
            "quality was not measured.</p></section>"
        )
    allowed = ceiling(result.budget, "drop")

    def show(value: float) -> str:
        return drop_amount(value, drop.relative, percent)

    share = f"{drop.confidence * 100:g}\u00a0%"
    text = (
        f"{show(drop.value)}, {share} interval from {show(drop.low)} to {show(drop.high)}, "
        f"paired over {drop.samples:,} samples."
    )
    kind = (
        "The drop is a share of the original's value."
        if drop.relative
        else "The drop is the difference from the original."
    )
    judged = ""
    if allowed is not None and drop.high > allowed >= drop.value:
        judged = (
            f'<p class="warn">The measured drop is allowed, but the upper end of its interval, '
            f"{show(drop.high)}, is above the {show(allowed)} allowed: on other data of this kind "
            "the drop may be larger than asked.</p>"
        )
    elif (unseen := drop.unseen) is not None:
        tone = ' class="warn"' if allowed is not None and unseen > allowed else ""
        judged = (
            f"<p{tone}>No sample changed, so the interval has no width. With {share} confidence at "
            f"most {100 * unseen:.2g}\u00a0% of all samples would change.</p>"
        )
    elif allowed is not None and drop.high <= allowed:
        judged = f"<p>The whole interval lies within the {show(allowed)} allowed.</p>"
    elif allowed is not None:
        judged = f'<p class="warn">The drop is above the {show(allowed)} allowed.</p>'
    picture = plot.interval(
        drop.value, drop.low, drop.high, allowed, show=show,
        title="Drop of quality with its interval", description=text,
    )  # fmt: skip
    return (
        f'<section><h2>Drop of {safe(result.metric, 60)}</h2><div class="drop">{picture}'
        f'<div><p>{text} <span class="soft">{kind}</span></p>{judged}</div></div></section>'
    )


def _floor(result: Result) -> float | None:
    allowed, quality_before = ceiling(result.budget, "drop"), result.before.quality
    if allowed is None or quality_before is None or not finite(quality_before):
        return None
    loss = allowed * abs(quality_before) if result.drop and result.drop.relative else allowed
    return quality_before - loss if result.higher_is_better else quality_before + loss


class _Candidate(NamedTuple):
    size: float
    latency: float
    quality: float | None
    kind: plot.Kind
    label: str
    name: str
    predicted: Mapping[str, float] = MappingProxyType({})


def _candidates(result: Result) -> list[_Candidate]:
    """Original, chosen and the rest of the front, numbered; the chosen stands in the front too."""
    before, after = result.before, result.after
    found = [
        _Candidate(m.size_bytes, m.latency_ms.median, m.quality, kind, kind, "")
        for m, kind in ((before, _ORIGINAL), (after, _CHOSEN))
    ]
    for p in result.front:
        if p.size_bytes != after.size_bytes or p.quality != after.quality:
            kind: plot.Kind = "measured" if p.measured else "predicted"
            label = str(len(found) - 1)
            found.append(
                _Candidate(p.size_bytes, p.latency_ms, p.quality, kind, label, p.name, p.predicted)
            )
        elif p.predicted:
            found[1] = found[1]._replace(predicted=p.predicted)
    return found


def front(result: Result) -> str:
    """Quality against size and against latency, and every point as a table."""
    points = _candidates(result)
    start = "<section><h2>What else was possible</h2>"
    drawn = [p for p in points if all(finite(v) for v in p[:3])]
    if not drawn:
        return f"{start}<p>Quality was not measured, so there is no plot of it.</p></section>"
    floor, present = _floor(result), {p.kind for p in drawn}
    keys = "".join(f"<li>{plot.legend(k)}{w}</li>" for k, w in _KINDS.items() if k in present)
    keys += "" if floor is None else '<li><span class="key dash"></span>worst quality allowed</li>'
    note = "" if len(points) > 2 else "<p>No other candidate was kept.</p>"
    return (
        f'{start}<p class="soft">Up and to the left is better. The line joins the measured points '
        "that no other measured point beats; the numbers are those of the table below.</p>"
        f'<figure class="panels">{_panels(result, drawn, floor)}</figure>'
        f'<ul class="keys">{keys}</ul>{note}{_points(result, points)}</section>'
    )


def _panels(result: Result, drawn: list[_Candidate], floor: float | None) -> str:
    percent, largest = is_percent(result), max(p.size for p in drawn)
    scale = 100.0 if percent else 1.0
    steps = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("bytes", 1.0))
    unit, step = next((u, s) for u, s in steps if largest >= s or s == 1.0)
    y_name = result.metric[:32] + (", %" if percent else "")
    y_name += "" if result.higher_is_better else " (lower is better)"
    original, chosen = (
        f"{size(m.size_bytes)}, {milliseconds(m.latency_ms.median)}, {quality(m.quality, percent)}"
        for m in (result.before, result.after)
    )

    def marks(cost: Callable[[_Candidate], float]) -> list[plot.Mark]:
        return [
            plot.Mark(cost(p), (p.quality or 0.0) * scale, p.kind, p.label, _hint(p, percent))
            for p in drawn
        ]

    return "".join(
        plot.panel(
            points,
            name=name,
            x_name=x_name,
            y_name=y_name,
            better_up=result.higher_is_better,
            floor=None if floor is None else floor * scale,
            title=f"{result.metric} against {name}",
            description=f"{len(drawn)} points. Original: {original}. Chosen: {chosen}.",
        )
        for name, x_name, points in (
            ("size", f"size, {unit}", marks(lambda p: p.size / step)),
            ("latency", "latency, ms", marks(lambda p: p.latency)),
        )
    )


def _hint(p: _Candidate, percent: bool) -> str:
    name = f"{p.label}: {p.name}" if p.name else p.label
    last = ", predicted only" if p.kind == "predicted" else ""
    return f"{name}: {size(p.size)}, {milliseconds(p.latency)}, {quality(p.quality, percent)}{last}"


def _points(result: Result, points: list[_Candidate]) -> str:
    percent = is_percent(result)
    rows = "".join(
        f'<tr class="{p.kind}"><td>{p.label}</td>'
        f'<td class="n">{size(p.size)}{_said(size, p.predicted.get("size_bytes"))}</td>'
        f'<td class="n">{milliseconds(p.latency)}'
        f"{_said(milliseconds, p.predicted.get('latency_ms'))}</td>"
        f'<td class="n">{quality(p.quality, percent)}'
        f'</td><td>{_KINDS[p.kind]}</td><td class="why">{safe(p.name)}</td></tr>'
        for p in points
    )
    named = any(p.name for p in points)
    about = ""
    if any(p.predicted for p in points):
        about = '<p class="soft">In brackets what was predicted before the candidate was made.</p>'
    return (
        f"<details><summary>All {len(points)} points</summary>{about}"
        '<div class="box" tabindex="0" role="region" aria-label="All points"><table><thead><tr>'
        '<th>Point</th><th class="n">Size</th><th class="n">Latency</th>'
        f'<th class="n">{safe(result.metric, 40)}</th><th>How known</th>'
        f"<th>{'Name' if named else ''}</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></details>"
    )


def _said(show: Callable[[float], str], value: float | None) -> str:
    return "" if value is None else f' <span class="soft">({show(value)})</span>'


def explained(result: Result) -> str:
    """What limited the result, and the error of each part's options as a table."""
    if not result.bounds and not result.sensitivity:
        return ""
    said = "".join(f"<li>{safe(text, 600)}</li>" for text in result.bounds)
    said = f'<ul class="notes">{said}</ul>' if said else ""
    options = list(dict.fromkeys(o for own in result.sensitivity.values() for o in own))
    if not options:
        return f"<section><h2>What limited it</h2>{said}</section>"
    heads = "".join(f'<th class="n">{safe(option, 60)}</th>' for option in options)
    most = {o: max(own.get(o, 0.0) for own in result.sensitivity.values()) for o in options}
    rows = "".join(
        f'<tr><td class="name">{safe(part)}</td>'
        + "".join(_error(own.get(o), most[o], len(result.sensitivity) > 1) for o in options)
        + "</tr>"
        for part, own in result.sensitivity.items()
    )
    return (
        f"<section><h2>What limited it</h2>{said}<h3>Sensitivity</h3>"
        '<p class="soft">Error of the outputs on calibration data when this alone is done; the '
        "largest of a column is marked.</p>"
        '<div class="box" tabindex="0" role="region" aria-label="Sensitivity"><table><thead><tr>'
        f"<th>Part</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


def _error(value: float | None, most: float, several: bool) -> str:
    if value is None:
        return f'<td class="n">{DASH}</td>'
    tone = " worse" if several and value == most and value > 0 else ""
    return f'<td class="n{tone}">{number(value, 5)}</td>'


def _class_of(decision: str) -> str:
    text = decision.lower()
    return next(name for name, _, words in _DECISIONS if re.search(words, text))


def units(result: Result) -> str:
    """The network as a strip, one cell a unit, and the reasons as a table."""
    if not result.units:
        return ""
    classes = [_class_of(u.decision) for u in result.units]
    cells = "".join(
        f'<li class="cell {c}" title="{safe(u.name)}: {safe(u.decision)}">'
        f'<span class="hidden">{safe(u.name, 80)}: {safe(u.decision, 80)}</span></li>'
        for c, u in zip(classes, result.units, strict=True)
    )
    keys = "".join(
        f'<li><span class="cell {c}"></span>{word}: {classes.count(c)}</li>'
        for c, word, _ in _DECISIONS
        if c in classes
    )
    rows = "".join(
        f'<tr><td class="name">{safe(u.name)}</td><td class="why">{safe(u.decision)}</td>'
        f'<td class="why">{safe(u.why, 600)}</td></tr>'
        for u in result.units
    )
    return (
        f'<section><h2>What was done, and why</h2><ol class="strip" aria-label="The network, one '
        f'cell a unit">{cells}</ol><ul class="keys">{keys}</ul><div class="box" tabindex="0" '
        'role="region" aria-label="Units"><table class="stack"><thead><tr>'
        "<th>Unit</th><th>Decision</th>"
        f"<th>Why</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )
