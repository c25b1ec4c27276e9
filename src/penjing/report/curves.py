"""The loss of every training, from its first step to its last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penjing.report.plot import Axis
from penjing.report.text import finite, safe

__all__ = ["curves"]

_WIDTH, _HEIGHT, _LEFT, _EDGE, _LOW = 640, 220, 64, 12, 30


def curves(trainings: Sequence[Mapping[str, Any]]) -> str:
    """A section with one picture for each; nothing without any.

    Args:
        trainings: `step`, `why` and `losses`, the mean loss of each part of the way.
    """
    drawn = [picture for number, one in enumerate(trainings) if (picture := _picture(one, number))]
    return "<section><h2>Training</h2>" + "".join(drawn) + "</section>" if drawn else ""


def _picture(training: Mapping[str, Any], number: int) -> str:
    losses = [float(v) for v in training.get("losses", ()) if finite(v)]
    if len(losses) < 2:
        return ""
    bottom, right = _HEIGHT - _LOW, _WIDTH - _EDGE
    axis = Axis.over(losses, bottom, _EDGE, False)
    words = f"{training.get('step', 'training')}: {training.get('why', '')}"
    out = [
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-labelledby="curve-{number}"><title id="curve-{number}">'
        f"{safe('loss, ' + words, 300)}</title>"
    ]
    for value in axis.ticks():
        y = axis(value)
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">'
                   f"{value:.3g}</text>")  # fmt: skip
    places = (_LEFT + (right - _LEFT) * i / (len(losses) - 1) for i in range(len(losses)))
    points = " L".join(f"{x:.1f} {axis(v):.1f}" for x, v in zip(places, losses, strict=True))
    out.append(f'<path class="front" d="M{points}"/>')
    scale = ", log scale" if axis.log else ""
    out.append(f'<text class="axis" x="{right}" y="{_HEIGHT - 8}" text-anchor="end">'
               f"loss{scale}, from the first step to the last</text></svg>")  # fmt: skip
    return f"<p>{safe(words, 300)}</p>" + "".join(out)
