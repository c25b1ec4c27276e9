"""Verbs on a finished artifact: export, measure, verify, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from penjing.cli.options import (
    Leaf,
    check_model,
    data_option,
    json_option,
    threads_option,
    to_option,
)
from penjing.cli.show import show_json, show_pairs
from penjing.errors import InputError, UsageError, printable
from penjing.files import check_output, whole_file

__all__ = ["export", "measure", "report", "verify"]


def _check_artifact(artifact: str) -> Path:
    check_model(artifact)
    if not (Path(artifact) / "manifest.json").is_file():
        raise InputError(
            "not an artifact", got=artifact, allowed="a folder that penjing wrote",
            next="penjing fit or penjing quantize make one",
        )  # fmt: skip
    return Path(artifact)


artifact_argument = click.argument("artifact", metavar="ARTIFACT")


@click.command()
@artifact_argument
@to_option
@json_option
def export(artifact: str, to: tuple[str, ...], as_json: bool) -> None:
    """Write the model for a runtime; refused unless it computes the same.

    \b
    penjing export ./fitted --to onnx,openvino
    """
    if not to:
        raise UsageError("export to what", allowed="--to onnx,openvino")
    _check_artifact(artifact)
    from penjing import api
    from penjing.progress import task

    with task("export"):
        parity = api.export(artifact, to)
    if as_json:
        show_json({"artifact": artifact, "parity": parity})
    else:
        show_pairs({name: f"differs by {value:.3g}" for name, value in parity.items()}, "exported")


@click.command()
@click.argument("artifact", metavar="[ARTIFACT]", required=False)
@click.option("--runtime", type=Leaf("runtimes"), help="Default: the embedded runtime.")
@data_option(help="Measure the quality through the exported file too.")
@click.option("--metric", "--task", "task", type=Leaf("tasks"))
@click.option("--batch", type=click.IntRange(1), help="A second batch size, with throughput.")
@click.option(
    "--length",
    type=click.IntRange(1),
    help="Tokens a sample, for text.  [default: 128, or as many as the network takes]",
)
@threads_option
@click.option("--device", metavar="ssh://HOST", help="Run there; the latency is the device's.")
@click.option(
    "--profile",
    type=click.Path(path_type=Path),
    help="Without ARTIFACT: time this machine's kernels, or the device's, and write them.",
)
@click.option(
    "--kit",
    type=click.Path(path_type=Path),
    help="Without ARTIFACT: write the file that does so on a device.",
)
@click.option("--overwrite", is_flag=True, help="Replace a profile or a kit that exists.")
@json_option
def measure(
    artifact: str | None,
    runtime: str | None,
    data: str | None,
    task: str | None,
    batch: int | None,
    length: int | None,
    threads: int | None,
    device: str | None,
    profile: Path | None,
    kit: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Size, latency, throughput, memory and quality of the exported file.

    It runs in a fresh process.

    \b
    penjing measure ./fitted --runtime openvino --batch 8
    penjing measure --profile here.json
    penjing measure --kit kit.pyz
    """
    if profile is not None or kit is not None:
        _record(artifact, device, profile, kit, threads, overwrite, as_json)
        return
    if artifact is None:
        raise UsageError("measure what", allowed="an ARTIFACT, --profile FILE or --kit FILE")
    _check_artifact(artifact)
    from penjing import api
    from penjing.progress import task as working

    with working("measure"):
        found = api.measure(
            artifact,
            runtime=runtime,
            data=data,
            task=task,
            batch=batch,
            length=length,
            threads=threads,
            device=device,
        )
    if as_json:
        show_json(found)
    else:
        show_pairs(found)


def _record(
    artifact: str | None,
    device: str | None,
    profile: Path | None,
    kit: Path | None,
    threads: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write a kit, or a profile."""
    if artifact is not None or (profile is not None and kit is not None):
        raise UsageError("--profile and --kit go alone", next="leave ARTIFACT and the other out")
    if kit is not None and device is not None:
        raise UsageError("--kit with --device", next="--profile runs the kit on the device itself")
    output = profile or kit
    assert output is not None
    check_output(output, overwrite)
    from penjing.fit.kit import record, write_kit
    from penjing.progress import task as working

    table: dict[str, Any] = {}
    if kit is not None:
        with working("writing the kit"):
            write_kit(kit, overwrite=overwrite)
        table = {"kit": str(kit), "size_bytes": kit.stat().st_size}
    else:
        with working("timing kernels"):
            found = record(device, threads=() if threads is None else (threads,))
        text = json.dumps(found, indent=1) + "\n"
        whole_file(output, lambda place: place.write_text(text, "utf-8"), overwrite=overwrite)
        kept = ("processor", "cores", "memory_bytes", "bytes_per_second")
        table = {"profile": str(output)} | {name: found[name] for name in kept}
        table["kernels"] = len(found["kernels"])
    if as_json:
        show_json(table)
    else:
        show_pairs(table)


@click.command()
@artifact_argument
@json_option
def verify(artifact: str, as_json: bool) -> int:
    """Check hashes, structure and parity; exit status 1 when one fails.

    \b
    penjing verify ./fitted
    """
    _check_artifact(artifact)
    from penjing import api
    from penjing.progress import task

    with task("verify"):
        checks = api.verify(artifact)
    sound = all(check.ok for check in checks)
    if as_json:
        rows = [{"name": c.name, "ok": bool(c.ok), "detail": c.detail} for c in checks]
        show_json({"artifact": artifact, "ok": sound, "checks": rows})
    else:
        for check in checks:
            mark = "ok    " if check.ok else "FAILED"
            click.echo(f"{mark}  {printable(check.name)}  {printable(check.detail)}")
    return 0 if sound else 1


@click.command()
@artifact_argument
@json_option
def report(artifact: str, as_json: bool) -> None:
    """Write the report page of an artifact again and say where it is.

    \b
    penjing report ./fitted
    """
    folder = _check_artifact(artifact)
    from penjing import api

    page = api.report(folder)
    if as_json:
        show_json({"report": str(page)})
    else:
        click.echo(printable(page, 600))
