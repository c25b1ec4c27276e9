"""How a single technique runs: checks first, then load, work, save, and say what came out."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from penjing.cli.options import check_model, set_threads
from penjing.cli.show import count, folder_size, show_json, show_pairs
from penjing.errors import UsageError, printable
from penjing.files import check_output, holds_work
from penjing.units import format_size, format_time

if TYPE_CHECKING:
    from penjing.model import Model

__all__ = [
    "bits_by_layer", "check_bare", "cut_short", "is_bare", "note", "pruned", "removed", "show_file",
    "tables_in_floats", "technique",
]  # fmt: skip

BARE = (".npy", ".npz", ".safetensors", ".pth", ".pt")


def is_bare(model: str, output: Path) -> bool:
    """Whether this is a weight file without a network."""
    if Path(model).suffix not in BARE or ":" in model:
        return False
    if output.suffix not in BARE:
        raise UsageError(
            "a bare weight file becomes a weight file",
            got=f"-o {output}",
            allowed=f"-o with the ending {', '.join(BARE)}",
        )
    return True


def check_bare(model: str, options: Mapping[str, Any]) -> None:
    """Refuse what only a network can have: there is nothing to run data through, or to export.

    Raises:
        UsageError: options that were given, by name.
    """
    names = ("data", "to", "journal", "weights", "learn", "activations", "embeddings", "kv_cache",
             "floats", "refine", "observer", "attention", "mixed")  # fmt: skip
    if given := [f"--{name.replace('_', '-')}" for name in names if options.get(name)]:
        raise UsageError(
            f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} for networks",
            got=f"{model}, bare weights", next="leave it out, or give the network",
        )  # fmt: skip


def show_file(found: dict[str, Any], output: Path, as_json: bool) -> None:
    if as_json:
        show_json({"output": str(output)} | found)
    else:
        plain = {k: v for k, v in found.items() if not isinstance(v, list | tuple | dict)}
        sizes = " -> ".join(format_size(n) for n in found["size_bytes"].values())
        show_pairs(plain | {"size": sizes}, f"wrote {output}")


def note(text: str) -> None:
    """One line on standard error that is no error."""
    click.echo(f"penjing: note: {printable(text, 600)}", err=True)


def _several(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def removed(ratio: float, before: Model, after: Model, everywhere: bool = True) -> Iterator[str]:
    """Where `shrink` removed other than was asked for: how much it did, and the whole blocks.

    Args:
        everywhere: something was to go in every block.
    """
    entries = [e for e in after.structure[len(before.structure) :] if e["kind"] == "slice"]
    kept = total = 0
    for entry in entries:
        path, dim, index = entry["slices"][0]  # the consumer, which loses inputs
        kept, total = kept + len(index), total + before.module.get_parameter(path).shape[dim]
    whole = [b for b in before.blocks if not any(e["path"].startswith(f"{b}.") for e in entries)]
    reached = 1 - kept / total if total else 0.0
    if ratio and not entries:
        yield "nothing was removed: penjing inspect --groups says what holds each group"
    elif ratio and abs(reached - ratio) > 0.02:
        yield (
            f"{reached:.1%} of the units were removed, asked {ratio:.1%}: what stays is a "
            "multiple (--multiple), and some of each must"
        )
    if whole and everywhere:
        yield f"blocks left whole, nothing in them could be removed safely: {_several(whole)}"


def pruned(asked: float, before: Model, after: Model) -> Iterator[str]:
    """What `prune` gains and what it does not, and where it could not remove what was asked for."""
    own = {n: mask for n, mask in after.masks.items() if mask is not before.masks.get(n)}
    gone = sum(mask.numel() - int(mask.sum()) for mask in own.values())
    share = gone / max(sum(mask.numel() for mask in own.values()), 1)
    if own and share < asked - 0.02:
        yield (
            f"{share:.1%} of the connections were removed, asked {asked:.1%}: what fills no group "
            "or block stays"
        )
    silent = {name: int((~mask.flatten(1).any(1)).sum()) for name, mask in own.items()}
    if number := sum(silent.values()):
        names = [name.removesuffix(".weight") for name, empty in silent.items() if empty]
        yield (
            f"{number:,} outputs have no connection left, in {len(names)} layers: "
            f"{_several(names)}; a lower --sparsity keeps some"
        )
    was, now = (
        sum(model.stored_bytes(name) for name, _ in model.parameters()) for model in (before, after)
    )
    yield (
        f"the artifact's tensors take {format_size(now)}, before {format_size(was)}; no runtime "
        "here skips zeros, so the network is as fast as before, and exports hold every zero"
    )


def cut_short(ratio: float | None, before: Model, after: Model) -> Iterator[str]:
    """Where `cut` removed another share of the blocks, or of their halves, than was asked for."""
    count = len(before.blocks)
    drops = [e["path"] for e in after.structure[len(before.structure) :] if e["kind"] == "drop"]
    gone = {b for b in before.blocks if any(f"{path}.".startswith(f"{b}.") for path in drops)}
    if ratio and abs(len(gone) / count - ratio) > 0.02:
        yield (
            f"{len(gone)} of {count} blocks, {len(gone) / count:.1%}, were cut or lost a part, "
            f"asked {ratio:.1%}: it is a whole number, one at least"
        )


def bits_by_layer(after: Model) -> Iterator[str]:
    """How many layers have how many bits."""
    found = Counter(planes.bits[0] for planes in after.planes.values())
    yield "bits by layer: " + ", ".join(f"{n} in {bits:g}" for bits, n in sorted(found.items()))


def tables_in_floats(before: Model, after: Model, asked: bool) -> Iterator[str]:
    """The embedding tables left in floats: small ones, or all if none were `asked` for."""
    from torch import nn

    from penjing.steps.quantize import SMALL_TABLE

    quantized = {id(after.module.get_parameter(name)) for name in after.planes}
    tables = {
        path: m.weight.numel()
        for path, m in after.module.named_modules()
        if isinstance(m, nn.Embedding) and id(m.weight) not in quantized
    }
    if asked:
        tables = {path: count for path, count in tables.items() if count < SMALL_TABLE}
    share = sum(tables.values()) / max(before.parameter_count, 1)
    if tables and asked:
        yield f"tables of under {SMALL_TABLE:,} numbers stay in floats: {_several([*tables])}"
    elif share > 0.01:
        yield (
            f"tables stay in floats, {share:.0%} of the weights ({_several([*tables])}); "
            "--embeddings BITS quantizes them"
        )


def _alone(model: Model, steps: set[str]) -> Iterator[str]:
    """What stayed as it was because its kind has no such step; `shrink` knows every kind."""
    from penjing.inspect import left_alone

    names = " and ".join(sorted(steps & {"prune", "quantize"}))
    if names and (alone := left_alone(model)):
        yield f"left as they are, {names} cannot handle their kind: {_several(alone)}"


def _check_targets(model: Model, to: Sequence[str]) -> None:
    """Say before the work what a writer could not write of this network whatever is done to it.

    Raises:
        UsageError: a line of a writer's own check.
    """
    from penjing.registry import choices, lookup

    for target in to:
        if target in choices("writers") and (lines := lookup("writers", target, "check")(model)):
            raise UsageError(
                f"--to {target} cannot express {lines[0]}",
                got=f"{len(lines)} such" if len(lines) > 1 else None,
                next="choose another --to",
            )


def _drop(journal: Path) -> None:
    """Remove a journal, unless another run is writing it."""
    from penjing.files import held

    with contextlib.suppress(OSError), held(journal / "lock"):
        shutil.rmtree(journal)


def technique(
    work: Callable[..., Model],
    model: str,
    output: Path,
    *,
    overwrite: bool,
    weights: str | None,
    allow_pickle: bool,
    threads: int | None,
    journal: Path | None,
    to: tuple[str, ...],
    as_json: bool,
    remarks: Callable[[Model, Model], Iterable[str]] | None = None,
    **options: Any,
) -> None:
    """Do `work(model, journal=..., **options)`, save, and say what came out.

    The work loads the model once it has seen to its options. `remarks(before, after)` are lines for
    standard error.
    """
    check_model(model)
    check_output(output, overwrite, (Path(model),))
    set_threads(threads)
    from penjing import api
    from penjing.given import Later
    from penjing.together import rank

    begin = time.monotonic()
    kept = journal or output.with_name(output.name + ".journal")

    def load() -> Model:
        found = api.load(model, weights=weights, allow_pickle=allow_pickle)
        _check_targets(found, to)
        return found

    source = Later(model, load)
    try:
        done = work(source, journal=kept, **options)
        if rank():  # the first process writes
            return
        api.save(done, output, to=to, overwrite=overwrite)
    except BaseException:
        # Without a finished block or a checkpoint there is nothing to go on from.
        if holds_work(kept):
            note(f"what is finished is kept in {kept}: the same command goes on from there")
        elif journal is None and not rank():
            _drop(kept)
        raise
    if journal is None:
        _drop(kept)
    loaded, steps = source.model, done.recipe.steps if done.recipe else ()
    known = len(loaded.recipe.steps) if loaded.recipe else 0
    for line in _alone(loaded, {step.name for step in steps[known:]}):
        note(line)
    if skipped := [path for step in steps for path in getattr(step, "skip", ())]:
        note(f"left in floats: {_several(skipped)}")
    reasons: dict[str, list[str]] = {}
    for path, why in done.left.items():
        reasons.setdefault(why, []).append(path)
    for why, paths in reasons.items():
        note(f"{why}: {_several(paths)}")
    for line in remarks(loaded, done) if remarks else ():
        note(line)
    cached = round(sum(grid.bytes_per_token for grid in done.cache.values()))
    found: dict[str, Any] = {
        "output": str(output),
        "size_bytes": folder_size(output),
        "parameters_before": loaded.parameter_count,
        "parameters": done.parameter_count,
        "stored_bits_per_weight": done.stored_bits(),
        "zeros": int(sum(mask.numel() - int(mask.sum()) for mask in done.masks.values())),
        "seconds": round(time.monotonic() - begin, 3),
    }
    if as_json:
        show_json(found)
        return
    click.echo(f"wrote {printable(output, 600)} in {format_time(found['seconds'])}")
    show_pairs(
        {
            "size of the folder": format_size(found["size_bytes"]),
            "parameters": f"{count(found['parameters_before'])} -> {count(found['parameters'])}",
            "stored bits per weight": f"{found['stored_bits_per_weight']:.2f}, tensors alone",
        }
        | ({"KV cache": f"{format_size(cached)} a token"} if cached else {})
        | ({"connections removed": count(found["zeros"])} if found["zeros"] else {})
    )
