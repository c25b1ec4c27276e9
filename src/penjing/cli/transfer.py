"""The verb transfer: from a teacher to a student."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from penjing.cli.options import (
    RATIO,
    TIME,
    Leaf,
    Numbers,
    check_model,
    data_option,
    descent_options,
    json_option,
    output_options,
    set_threads,
    size_options,
    to_option,
)
from penjing.cli.show import count, folder_size, show_json, show_pairs
from penjing.cli.work import note
from penjing.errors import UsageError, printable
from penjing.files import check_output
from penjing.registry import choices
from penjing.units import format_size, format_time

__all__ = ["transfer"]


class _Weighted(click.ParamType):  # type: ignore[type-arg]
    """Names with commas between them, each with a weight where it has one: `kl=0.5,labels`."""

    name = "names"

    def __init__(self, family: str, *more: str) -> None:
        self.family, self.more = family, more

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        parts = tuple(part.strip() for part in value.split(",") if part.strip())
        if parts == ("none",):
            return ()
        known = (*choices(self.family), *self.more)
        for part in parts:
            name = part.partition("=")[0]
            if ":" not in name and name.replace("_", "-") not in known:
                self.fail(f"got {name!r}; allowed: none, {', '.join(known)}", param, ctx)
        return parts


@click.command()
@click.argument("teacher", metavar="TEACHER")
@click.argument("student", metavar="[STUDENT]", required=False)
@click.option(
    "--share",
    type=RATIO,
    metavar="50%",
    help="Without STUDENT: derive one that costs so much of TEACHER.",
)
@click.option(
    "--of",
    type=click.Choice(["latency", "macs", "parameters"]),
    default="latency",
    show_default=True,
    help="What --share is of; latency is measured in onnxruntime.",
)
@click.option("--weights", metavar="FILE", help="Weights of a factory that is the teacher.")
@click.option(
    "--student-weights",
    metavar="FILE",
    help="Weights of a factory that is the student.  [default: own, those it starts with]",
)
@click.option(
    "--parameters/--no-parameters",
    default=True,
    show_default=True,
    help="Begin with the teacher's weights.",
)
@click.option(
    "--features",
    type=_Weighted("features"),
    default=(),
    metavar="NAME[=W],...",
    help=f"Match hidden states: {', '.join(choices('features'))}.  [default: none]",
)
@click.option(
    "--outputs",
    type=_Weighted("losses", "labels"),
    metavar="NAME[=W],...",
    help=f"Match outputs: none, labels, {', '.join(choices('losses'))}.  "
    "[default: cosine for embeddings, else kl]",
)
@click.option("--temperature", type=Numbers(0, min_open=True), help="Of losses that have one.")
@click.option(
    "--layers",
    type=click.Choice(["place", "cka"]),
    default="place",
    show_default=True,
    help="How blocks are matched for features.",
)
@click.option(
    "--criterion",
    type=Leaf("unitcriteria", "gram", *choices("criteria")),
    default="gram",
    show_default=True,
    help="How units are chosen for a narrower student.",
)
@data_option(required=True, help="Training data: .jsonl .csv .parquet .npz or an image folder.")
@click.option("--within", type=TIME, metavar="60s", help="Training time.  [default: 60s]")
@descent_options(lr=5e-4)
@click.option(
    "--samples", type=click.IntRange(1), default=2048, show_default=True, help="At the most."
)
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
@size_options
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Keep the teacher's outputs there, for later runs.",
)
@output_options(journal=False)
@to_option
@json_option
def transfer(
    teacher: str,
    student: str | None,
    share: float | None,
    weights: str | None,
    student_weights: str | None,
    data: str,
    within: float | None,
    steps: int | None,
    threads: int | None,
    output: Path,
    overwrite: bool,
    to: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Give STUDENT, a network of another shape, what TEACHER knows; or derive one of a cost.

    \b
    penjing transfer ./teacher ./student --data texts.jsonl --within 60s -o ./taught
    penjing transfer ./teacher --share 50% --data texts.jsonl --within 60s -o ./half
    penjing transfer ./teacher ./student --features relations --data texts.jsonl -o ./taught
    penjing transfer net.py:large net.py:small --weights large.pth --outputs dkd,labels
        --data images.npz -o ./taught
    """
    if (student is None) == (share is None):
        raise UsageError(
            "either STUDENT or --share", got="both" if student else "neither",
            next="--share 50% derives a student of half the latency",
        )  # fmt: skip
    models = [path for path in (teacher, student) if path is not None]
    for path in models:
        check_model(path)
    check_output(output, overwrite, (*map(Path, models), Path(data)))
    set_threads(threads)
    from penjing import api
    from penjing.readers import factory

    begin = time.monotonic()
    old = api.load(teacher, weights=weights)
    new = None
    if student is not None:
        own = "own" if factory.recognises(Path(student)) else None
        new = api.load(student, weights=student_weights or own)
    seconds = within if within is not None else 0.0 if steps else 60.0
    told: list[str] = []
    done = api.transfer(
        old,
        new,
        data,
        share=share,
        within=seconds,
        steps=steps or 0,
        tell=told.append,
        **options,
    )
    api.save(done, output, to=to, overwrite=overwrite)
    for line in told:
        note(line)
    found = {
        "output": str(output),
        "size_bytes": folder_size(output),
        "parameters_teacher": old.parameter_count,
        "parameters": done.parameter_count,
        "seconds": round(time.monotonic() - begin, 3),
        "transferred": told,
    }
    if as_json:
        show_json(found)
        return
    click.echo(f"wrote {printable(output, 600)} in {format_time(float(found['seconds']))}")  # type: ignore[arg-type]
    shrunk = f"{count(old.parameter_count)} -> {count(done.parameter_count)}"
    show_pairs({"size of the folder": format_size(folder_size(output)), "parameters": shrunk})
