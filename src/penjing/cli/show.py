"""What a verb prints: one JSON object for machines, a short table for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penjing.errors import printable
from penjing.report.text import threads
from penjing.result import show_drop
from penjing.units import format_size, format_time

if TYPE_CHECKING:
    from penjing.channelmap import ChannelMap
    from penjing.inspect import Inspection
    from penjing.result import Measurement, Result

__all__ = [
    "count",
    "folder_size",
    "show_groups",
    "show_inspection",
    "show_json",
    "show_pairs",
    "show_result",
]


def show_json(value: Any) -> None:
    """`value` on one line of standard output."""
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain))


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()  # a numpy number
    return str(value)


def count(number: float | None) -> str:
    """1234567 as `1.23 M`; a dash for None."""
    if number is None:
        return "-"
    for unit in ("", " K", " M", " G"):
        if abs(number) < 1000:
            return f"{number:.0f}" if not unit else f"{number:.2f}{unit}"
        number /= 1000
    return f"{number:.2f} T"


def folder_size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:.6g}" if isinstance(value, float) else printable(value)


def show_pairs(pairs: dict[str, Any], heading: str | None = None) -> None:
    """Names and values, one pair a line; nested dictionaries indented."""
    if heading:
        click.echo(printable(heading))
    width = max((len(name) for name in pairs), default=0)
    for name, value in pairs.items():
        if isinstance(value, dict):
            inner = ", ".join(f"{k} {_text(v)}" for k, v in value.items())
            click.echo(f"  {name:<{width}}  {inner}")
        else:
            click.echo(f"  {name:<{width}}  {_text(value)}")


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else format_time(value / 1e3)


def _bytes(value: int | None) -> str:
    return "-" if value is None else format_size(value)


def show_inspection(found: Inspection, top: int | None = None) -> None:
    """A table of layers with the totals below it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", overflow="fold")
    table.add_column("kind")
    for name in ("parameters", "bytes", "MACs", "memory", "latency"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in found.layers[:top]:
        tied = f" = {layer.tied_to}" if layer.tied_to else ""
        table.add_row(
            Text(printable(layer.name) + printable(tied)),
            Text(printable(layer.kind)),
            count(layer.parameters),
            _bytes(layer.bytes),
            count(layer.macs),
            _bytes(layer.peak_memory_bytes),
            _milliseconds(layer.latency_ms),
        )
    total = found.totals
    table.add_section()
    table.add_row(
        "total",
        "",
        count(total.parameters),
        _bytes(total.bytes),
        count(total.macs),
        _bytes(total.peak_memory_bytes),
        _milliseconds(total.latency_ms),
        style="bold",
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    run = f"batch {found.batch}" + (f" x {found.length} tokens" if found.length else "")
    if total.macs is not None:
        click.echo(f"measured at {run}, {threads(found.threads)}, in torch")
    if found.blocks:
        names = f"{found.blocks[0]} ... {found.blocks[-1]}"
        click.echo(f"blocks: {len(found.blocks)}, {printable(names)}")
    for group in found.tied:
        click.echo(f"tied: {printable(' = '.join(group))}")
    if found.shared:
        click.echo(f"runs more than once: {printable(', '.join(found.shared))}")


def show_groups(found: ChannelMap, top: int | None = None) -> None:
    """Groups of channels that can go, and the axes that stay by the reason for it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, side in (("made by", "left"), ("units", "right"), ("kind", "left"),
                       ("read by", "left"), ("with it", "left")):  # fmt: skip
        table.add_column(name, justify="right" if side == "right" else "left", no_wrap=True)
    for free in found.free[:top]:
        group = free.group
        rest = [m.name for m in group.members if not m.summed and m.name != group.name]
        table.add_row(
            printable(group.name), str(group.count), "heads" if group.is_heads else "channels",
            printable(_several([m.name for m in group.members if m.summed])),
            printable(_several(rest)),
        )  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console = Console(width=220)
    console.print(table)
    click.echo(f"{len(found.free)} groups, each proved: silenced equals removed")
    reasons: dict[str, list[str]] = {}
    for axis in found.frozen:
        if not axis.name.endswith("bias"):
            reasons.setdefault(axis.reason, []).append(f"{axis.name}[{axis.dim}]")
    for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        click.echo(f"stays: {len(names)} axes, {printable(reason)}: {printable(_several(names))}")


def _several(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "") if names else "-"


def _versus(name: str, before: float | None, after: float | None, show: Any) -> tuple[str, ...]:
    gain = f"{before / after:.2f}x" if before and after else ""
    return name, show(before), show(after), gain


def show_result(result: Result, output: Path) -> None:
    """Verdict, before and after, the drop with its interval, where the report is."""
    from rich.console import Console
    from rich.table import Table

    before, after = result.before, result.after
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "before", "after", ""):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)

    def quality(side: Measurement) -> str:
        return "-" if side.quality is None else f"{side.quality:.4g}"

    length = f" x {after.latency_ms.length}" if after.latency_ms.length else ""
    rows = [
        _versus("size", before.size_bytes, after.size_bytes, _bytes),
        _versus("parameters", before.parameters, after.parameters, count),
        _versus(
            f"latency, batch {after.latency_ms.batch}{length}",
            before.latency_ms.median,
            after.latency_ms.median,
            _milliseconds,
        ),
        _versus("peak memory", before.peak_memory_bytes, after.peak_memory_bytes, _bytes),
        (result.metric, quality(before), quality(after), ""),
    ]
    for row in rows:
        table.add_row(*(printable(cell) for cell in row))
    verdict = "within the budget" if result.met else "NOT within the budget"
    if result.met and not result.limited:
        open_ended = "no limits were given"  # a note of fit says what was taken then
        verdict = next((n for n in result.notes if n.startswith(open_ended)), open_ended)
    click.echo(
        f"{printable(verdict)}; runtime {printable(result.runtime)}, {threads(result.threads)}"
    )
    Console(width=None if Console().is_terminal else 100).print(table)
    if (device := result.device) is not None:
        how = "measured on" if device["measured"] else "predicted, not measured, for"
        name = printable(device.get("processor") or device["name"])
        click.echo(f"latencies are {how} {name}, {threads(device['threads'])}")
    drop = result.drop
    if drop is not None:

        def shown(value: float) -> str:
            return printable(show_drop(value, result.metric, result.drop.relative))  # type: ignore[union-attr]

        click.echo(
            f"drop {shown(drop.value)}{' of the original' if drop.relative else ''}, "
            f"{drop.confidence:.0%} interval {shown(drop.low)} to {shown(drop.high)}, "
            f"{drop.samples} samples"
        )
    for note in result.notes:
        if "--within" in note:  # what there was no time for
            click.echo(printable(note, 200))
    page = output / "report.html"
    click.echo(f"report: {printable(page if page.is_file() else output, 600)}")
