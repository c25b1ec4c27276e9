"""The trials of a search for hyper-parameters: every one, the front, and what mattered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from penjing.report.text import DASH, finite, milliseconds, number, safe, size

__all__ = ["trials"]


def trials(tuning: Mapping[str, Any]) -> str:
    """A section; nothing without trials.

    Args:
        tuning: as `tuning.json` of an artifact holds it; what is malformed becomes a dash.
    """
    records = [r for r in _list(tuning, "trials") if r.get("same") is None]
    if not records:
        return ""
    names = [safe(name, 80) for name in sorted({n for r in records for n in _table(r, "params")})]
    heads = "".join(f"<th>{name}</th>" for name in names)
    figures = '<th class="n">Drop</th><th class="n">Size</th>'
    timed = any(finite(_table(r, "figures").get("latency_ms")) for r in records)
    figures += '<th class="n">Latency</th>' if timed else ""
    best, front = tuning.get("best"), tuning.get("front")
    rows = "".join(
        _row(r, best, front if isinstance(front, list) else [], timed, sorted(
            {n for one in records for n in _table(one, "params")}
        ))
        for r in records
    )  # fmt: skip
    counts = ", ".join(
        f"{count} {state}"
        for state in ("complete", "pruned", "refused")
        if (count := sum(r.get("state") == state for r in records))
    )
    return (
        f'<section><h2>Trials</h2><p class="soft">{counts}. Figures of trials are on the samples '
        "of the search; those of the chosen one above are on samples that no trial saw.</p>"
        f"{_importances(tuning)}<details><summary>All {len(records)} trials</summary>"
        '<div class="box" tabindex="0" role="region" aria-label="Trials"><table><thead><tr>'
        f"<th>Trial</th>{heads}{figures}<th>How it ended</th></tr></thead><tbody>{rows}"
        "</tbody></table></div></details></section>"
    )


def _row(
    record: Mapping[str, Any], best: Any, front: Sequence[Any], timed: bool, names: Sequence[str]
) -> str:
    figures, params = _table(record, "figures"), _table(record, "params")
    own = record.get("number")
    values = "".join(f"<td>{_value(params.get(name))}</td>" for name in names)
    end = safe(record.get("state", DASH), 20)
    if record.get("why"):
        end += f": {safe(record['why'])}"
    elif own == best:
        end = "chosen"
    elif own in front:
        end = "on the front"
    elif any(finite(v) and v > 0 for v in _table(record, "limits").values()):
        end = "above a limit"
    latency = f'<td class="n">{milliseconds(figures.get("latency_ms"))}</td>' if timed else ""
    chosen = ' class="chosen"' if own == best else ""
    return (
        f"<tr{chosen}><td>{safe(own, 20)}</td>{values}"
        f'<td class="n">{number(figures.get("drop"), 4)}</td>'
        f'<td class="n">{size(figures.get("size_bytes"))}</td>{latency}'
        f'<td class="why">{end}</td></tr>'
    )


def _importances(tuning: Mapping[str, Any]) -> str:
    tables = {
        safe(name, 60): shares
        for name in _table(tuning, "importances")
        if (shares := _table(_table(tuning, "importances"), name))
    }
    note = tuning.get("importance_note")
    words = f'<p class="soft">{safe(note)}.</p>' if note else ""
    if not tables:
        return words
    heads = "".join(f'<th class="n">{name}</th>' for name in tables)
    names = {name: None for shares in tables.values() for name in shares}
    rows = "".join(
        f'<tr><th scope="row">{safe(name, 80)}</th>'
        + "".join(f'<td class="n">{_share(shares.get(name))}</td>' for shares in tables.values())
        + "</tr>"
        for name in names
    )
    return (
        "<h3>What mattered</h3><p>Share of each hyper-parameter in being among the best tenth of "
        f"the trials (PED-ANOVA).</p><table><thead><tr><th>Hyper-parameter</th>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table>{words}"
    )


def _share(value: Any) -> str:
    return f"{100 * value:.0f}\u00a0%" if finite(value) else DASH


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if finite(value) else DASH
    return DASH if value is None else safe(value, 80)


def _table(table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = table.get(name)
    return found if isinstance(found, Mapping) else {}


def _list(table: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    found = table.get(name)
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []
