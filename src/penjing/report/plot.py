"""Pictures as inline SVG: quality against a cost, and a drop's interval against what is allowed.

Hand-written so that they are sharp at any size, follow the page's colours (CSS classes, no
inline style) and need no request. A label is drawn only where it meets no other label and no
mark; the table below the plot has every point.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from penjing.report.text import finite, safe

__all__ = ["Axis", "Mark", "interval", "legend", "panel"]

Kind = Literal["original", "chosen", "measured", "predicted"]
WIDTH, HEIGHT = 380, 290
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 28, 44
FONT = 13.0  # the larger of the two sizes in style.css, so that phones do not collide either
_RADIUS: dict[Kind, float] = {"original": 6, "chosen": 10, "measured": 5, "predicted": 5}
_ADVANCE = 0.62  # mean width of a character, in font sizes, on the wide side


@dataclass(frozen=True)
class Mark:
    """One point of a panel, in display units."""

    x: float
    y: float
    kind: Kind
    label: str
    hint: str


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic map from [low, high] to [start, end] pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @staticmethod
    def over(values: Sequence[float], start: float, end: float, may_log: bool) -> Axis:
        """Axis that holds all of `values` with a margin; logarithmic above a range of 1 : 4."""
        low, high = min(values), max(values)
        if may_log and low > 0 and high / low > 4:
            margin = (high / low) ** 0.09
            return Axis(low / margin, high * margin, start, end, True)
        margin = (high - low) * 0.1 or abs(high) * 0.05 or 1.0
        return Axis(low - margin, high + margin, start, end, False)

    def __call__(self, value: float) -> float:
        """Pixel of `value`."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values inside the axis: three to seven of them where they exist."""
        if not self.log:
            step = _round_up((self.high - self.low) / 5.5)
            first = math.ceil(self.low / step - 1e-9)
            last = math.floor(self.high / step + 1e-9)
            return [i * step for i in range(first, last + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 5), (1, 3), (1,)):
            ticks = [d * 10.0**e for e in decades for d in digits]
            ticks = [t for t in ticks if self.low <= t <= self.high]
            if len(ticks) <= 6:
                break
        return ticks[:: math.ceil(len(ticks) / 6) or 1]


def _round_up(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(d * power for d in (1, 2, 2.5, 5, 10) if d * power >= step * (1 - 1e-9))


def _tick_text(value: float) -> str:
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}".replace(".0e", "e").replace("e+0", "e").replace("e-0", "e−")
    return f"{value:.6g}".replace("-", "−")


Box = tuple[float, float, float, float]


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _place(
    x: float, y: float, text: str, taken: list[Box], reaches: Sequence[float]
) -> tuple[float, float, str] | None:
    """Where `text` can stand at one of the distances `reaches` from (x, y), or None."""
    wide, high = len(text) * FONT * _ADVANCE, FONT * 0.75
    for r in reaches:
        near = r * 0.75
        options = (
            (x, y - r, "middle"),
            (x + r, y + 4, "start"),
            (x - r, y + 4, "end"),
            (x, y + r + high, "middle"),
            (x + near, y - near, "start"),
            (x - near, y - near, "end"),
            (x + near, y + near + high, "start"),
            (x - near, y + near + high, "end"),
        )
        for left, base, anchor in options:
            start = left - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
            box = (start - 1, base - FONT * 0.8, start + wide + 1, base + FONT * 0.2)
            inside = box[0] >= LEFT and box[2] <= WIDTH - 2 and box[1] >= TOP - 4
            free = not any(_meet(box, other) for other in taken)
            if inside and free and box[3] <= HEIGHT - BOTTOM:
                taken.append(box)
                return left, base, anchor
    return None


def _shape(kind: Kind, x: float, y: float) -> str:
    if kind == "original":
        return (
            f'<rect class="mark original" x="{x - 5:.1f}" y="{y - 5:.1f}" width="10" height="10"/>'
        )
    if kind == "chosen":
        return (
            f'<circle class="halo" cx="{x:.1f}" cy="{y:.1f}" r="9"/>'
            f'<circle class="mark chosen" cx="{x:.1f}" cy="{y:.1f}" r="5.5"/>'
        )
    return f'<circle class="mark {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def legend(kind: Kind) -> str:
    """The mark of `kind` alone, for the legend."""
    return f'<svg class="key" viewBox="0 0 22 22" aria-hidden="true">{_shape(kind, 11, 11)}</svg>'


def _stairs(marks: Sequence[Mark], better_up: bool) -> list[Mark]:
    """Marks that no other measured mark beats in both directions, by cost."""
    sign = 1 if better_up else -1
    best, kept = -math.inf, []
    for mark in sorted(marks, key=lambda m: (m.x, -sign * m.y)):
        if sign * mark.y > best:
            best = sign * mark.y
            kept.append(mark)
    return kept


def panel(
    marks: Sequence[Mark],
    *,
    name: str,
    x_name: str,
    y_name: str,
    better_up: bool,
    floor: float | None,
    title: str,
    description: str,
) -> str:
    """Quality (up is always better) against a cost (left is better).

    Args:
        marks: finite points in display units; drawn in the order given, labelled last first.
        name: prefix of the element ids.
        better_up: False turns the vertical axis round.
        floor: the worst quality allowed, a dashed line.
    """
    drawn = [m for m in marks if finite(m.x) and finite(m.y)]
    if not drawn:
        return ""
    levels = [m.y for m in drawn] + ([floor] if floor is not None and finite(floor) else [])
    bottom, top = HEIGHT - BOTTOM, TOP
    x_axis = Axis.over([m.x for m in drawn], LEFT, WIDTH - RIGHT, True)
    ends = (bottom, top) if better_up else (top, bottom)
    y_axis = Axis.over(levels, ends[0], ends[1], not better_up)
    out = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="{name}-title {name}-text">',
        f'<title id="{name}-title">{safe(title)}</title>',
        f'<desc id="{name}-text">{safe(description, 2000)}</desc>',
    ]
    for value in y_axis.ticks():
        y = y_axis(value)
        out.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        out.append(_text(LEFT - 6, y + 4, _tick_text(value), "end", "tick"))
    for value in x_axis.ticks():
        x = x_axis(value)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        out.append(_text(x, bottom + 16, _tick_text(value), "middle", "tick"))
    scale = ", log scale" if x_axis.log else ""
    out.append(_text(WIDTH - RIGHT, HEIGHT - 6, f"← {x_name}{scale}", "end", "axis"))
    out.append(_text(4, 13, f"↑ {y_name}{', log scale' if y_axis.log else ''}", "start", "axis"))
    taken: list[Box] = []
    for mark in drawn:
        x, y, r = x_axis(mark.x), y_axis(mark.y), _RADIUS[mark.kind]
        taken.append((x - r, y - r, x + r, y + r))
    if floor is not None and finite(floor):
        y = y_axis(floor)
        out.append(
            f'<line class="floor" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        taken.append((LEFT, y - 1.5, WIDTH, y + 1.5))
    steps = _stairs([m for m in drawn if m.kind != "predicted"], better_up)
    if len(steps) > 1:
        path = f"M{x_axis(steps[0].x):.1f} {y_axis(steps[0].y):.1f}" + "".join(
            f"H{x_axis(m.x):.1f}V{y_axis(m.y):.1f}" for m in steps[1:]
        )
        out.append(f'<path class="front" d="{path}"/>')
    labels = []
    rank = {"original": 0, "chosen": 1, "measured": 2, "predicted": 3}
    for mark in sorted(drawn, key=lambda m: rank[m.kind]):
        first = _RADIUS[mark.kind] + 4
        reaches = (first, 18.0, 28.0, 40.0) if mark.kind in ("original", "chosen") else (first,)
        x, y = x_axis(mark.x), y_axis(mark.y)
        place = _place(x, y, mark.label, taken, reaches) if mark.label else None
        if place:
            if math.dist((x, y), place[:2]) > 34:
                line = f'x1="{x:.1f}" y1="{y:.1f}" x2="{place[0]:.1f}" y2="{place[1] + 3:.1f}"'
                out.append(f'<line class="leader" {line}/>')
            labels.append(_text(place[0], place[1], mark.label, place[2], f"label {mark.kind}"))
        if mark.kind == "chosen" and floor is not None and finite(floor):
            labels += _floor_label(y_axis(floor), taken)
    for mark in sorted(drawn, key=lambda m: -rank[m.kind]):
        shape = _shape(mark.kind, x_axis(mark.x), y_axis(mark.y))
        out.append(f"<g><title>{safe(mark.hint)}</title>{shape}</g>")
    return "".join([*out, *labels, "</svg>"])


def _floor_label(y: float, taken: list[Box]) -> list[str]:
    text = "worst allowed"
    wide = len(text) * FONT * _ADVANCE
    for base in (y + FONT, y - 5):
        for right in (WIDTH - RIGHT - 2, LEFT + 4 + wide):
            box = (right - wide, base - FONT * 0.8, right, base + FONT * 0.2)
            if box[3] <= HEIGHT - BOTTOM and not any(
                _meet(box, other) for other in taken if other[2] - other[0] < WIDTH * 0.7
            ):
                taken.append(box)
                return [_text(right, base, text, "end", "label limit")]
    return []


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {where}>{safe(text, 60)}</text>'


def interval(
    value: float,
    low: float,
    high: float,
    allowed: float | None,
    *,
    show: Callable[[float], str],
    title: str,
    description: str,
) -> str:
    """The interval of a drop on a line from better (left) to worse, against what is allowed."""
    if not all(finite(v) for v in (value, low, high)):
        return ""
    ends = [0.0, value, low, high] + ([] if allowed is None else [allowed * 1.15])
    axis = Axis.over(ends, 8, WIDTH - 8, False)
    middle, zero = 46, axis(0.0)
    out = [
        f'<svg class="interval" viewBox="0 0 {WIDTH} 92" role="img" '
        'aria-labelledby="drop-title drop-text">',
        f'<title id="drop-title">{safe(title)}</title>',
        f'<desc id="drop-text">{safe(description)}</desc>',
    ]
    if allowed is not None and finite(allowed):
        end = axis(allowed)
        out.append(f'<rect class="inside" x="8" y="22" width="{max(end - 8, 0):.1f}" height="48"/>')
        out.append(f'<line class="floor" x1="{end:.1f}" x2="{end:.1f}" y1="22" y2="70"/>')
        anchor = "end" if end > WIDTH * 0.6 else "middle" if end > WIDTH * 0.25 else "start"
        out.append(_text(end, 15, f"allowed {show(allowed)}", anchor, "label limit"))
    out.append(f'<line class="grid" x1="8" x2="{WIDTH - 8}" y1="70" y2="70"/>')
    out.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="22" y2="74"/>')
    out.append(_text(max(zero, 12), 87, "no drop", "middle" if zero > 34 else "start", "tick"))
    out.append(_text(WIDTH - 8, 87, "worse →", "end", "tick"))
    left, right = axis(low), axis(high)
    out.append(f'<line class="bar" x1="{left:.1f}" x2="{right:.1f}" y1="{middle}" y2="{middle}"/>')
    out += [
        f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{middle - 7}" y2="{middle + 7}"/>'
        for x in (left, right)
    ]
    out.append(f'<circle class="mark chosen" cx="{axis(value):.1f}" cy="{middle}" r="5.5"/></svg>')
    return "".join(out)
