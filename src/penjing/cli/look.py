"""Verbs that change nothing: inspect, evaluate."""

from __future__ import annotations

import click

from penjing.cli.options import (
    Leaf,
    check_model,
    data_option,
    json_option,
    model_options,
    set_threads,
    size_options,
    threads_option,
)
from penjing.cli.show import show_groups, show_inspection, show_json, show_pairs

__all__ = ["evaluate", "inspect"]

# As penjing.inspect.SORTS, whose import would import torch.
SORTS = ("order", "parameters", "bytes", "macs", "memory", "latency")


@click.command()
@model_options
@click.option("--sort", type=click.Choice(SORTS), default="order", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--length", type=click.IntRange(1), help="Tokens a sample, for text.  [default: 128]")
@threads_option
@click.option("--top", type=click.IntRange(1), metavar="N", help="Only the first N layers.")
@click.option("--latency/--no-latency", default=True, help="Measure latency.  [default: yes]")
@click.option("--groups", is_flag=True, help="Channels that shrink can remove, and why not others.")
@json_option
def inspect(
    model: str,
    weights: str | None,
    allow_pickle: bool,
    sort: str,
    batch: int,
    length: int | None,
    threads: int | None,
    top: int | None,
    latency: bool,
    groups: bool,
    as_json: bool,
) -> None:
    """Parameters, bytes, MACs, memory and latency by layer.

    \b
    penjing inspect ./my-model --sort latency --top 10
    penjing inspect ./my-model --groups
    penjing inspect weights.safetensors --json
    """
    check_model(model)
    set_threads(threads)
    from penjing.inspect import inspect as look
    from penjing.load import load
    from penjing.progress import task

    if groups:
        from penjing.channelmap import channel_map

        with task("follow the channels of the model"):
            channels = channel_map(load(model, weights=weights, allow_pickle=allow_pickle))
        if as_json:
            show_json(channels.to_json())
        else:
            show_groups(channels, top)
        return
    with task("read and run the model"):
        loaded = load(model, weights=weights, allow_pickle=allow_pickle)
        found = look(loaded, batch=batch, length=length, latency=latency).sorted(sort)
    if as_json:
        show_json(found.to_json())
    else:
        show_inspection(found, top)


@click.command()
@model_options
@data_option(required=True, help="Evaluation data: .jsonl .csv .parquet .npz or an image folder.")
@click.option(
    "--metric",
    "--task",
    "task",
    type=Leaf("tasks"),
    help="Default: what fits the model and its data.",
)
@click.option("--runtime", type=Leaf("runtimes"), help="For an artifact: its exported file.")
@click.option("--batch", type=click.IntRange(1), default=32, show_default=True)
@size_options
@json_option
def evaluate(
    model: str,
    weights: str | None,
    allow_pickle: bool,
    data: str,
    task: str | None,
    runtime: str | None,
    batch: int,
    length: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """The quality of a model or of an artifact on your data.

    \b
    penjing evaluate ./my-model --data eval.jsonl --metric perplexity
    """
    check_model(model)
    set_threads(threads)
    from penjing import api

    loaded = api.load(model, weights=weights, allow_pickle=allow_pickle) if not runtime else model
    found = api.evaluate(loaded, data, task=task, runtime=runtime, length=length, batch=batch)
    if as_json:
        show_json(found)
    else:
        show_pairs(found)
