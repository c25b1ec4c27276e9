"""The verbs in Python, the same as on the command line.

    import penjing
    model = penjing.load("./my-model")
    small = penjing.quantize(penjing.cut(model, 2, data="text.jsonl"), bits=8)
    penjing.save(small, "./small", to=["onnx"])
    result = penjing.fit(model, "eval.jsonl", "./fitted", max_drop=0.01)

`model` is a Model or anything `load` takes; `data` a Dataset or a path. No verb changes the
model that it is given.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from penjing.apply import apply as _apply
from penjing.data import Dataset, align, encode, prepare
from penjing.data import read as _read
from penjing.errors import InputError, UsageError
from penjing.evaluate import evaluate as _evaluate
from penjing.evaluate import torch_predictor
from penjing.export import TARGETS
from penjing.export import export as _export
from penjing.files import check_output, read_json
from penjing.fit import Budget, Settings
from penjing.fit import fit as _fit
from penjing.gradients import LABELS
from penjing.inspect import inspect
from penjing.learning import check_learned, learning
from penjing.load import load, original
from penjing.measure import Candidate, measure_files, physical_cores, quality
from penjing.model import Batch, Model
from penjing.processor import weight_bits
from penjing.recipe import Recipe
from penjing.registry import lookup
from penjing.report import write as report
from penjing.result import Result
from penjing.sensitivity import in_floats
from penjing.sizing import for_latency
from penjing.steps._select import LEARNED
from penjing.steps.cache import Cache, check_decoder
from penjing.steps.constrain import Constrain
from penjing.steps.cut import Cut
from penjing.steps.equalize import Equalize
from penjing.steps.fold import Fold, has_norms
from penjing.steps.prune import Prune
from penjing.steps.quantize import Quantize
from penjing.steps.recover import Recover
from penjing.steps.rotate import Rotate
from penjing.steps.shrink import OF, Shrink
from penjing.tasks import find
from penjing.transfer import transfer
from penjing.verify import verify
from penjing.writers.artifact import extend
from penjing.writers.artifact import save as _save

__all__ = [
    "STEPS", "apply", "cut", "evaluate", "export", "fit", "inspect", "load", "measure", "prune",
    "quantize", "recover", "report", "save", "shrink", "transfer", "verify",
]  # fmt: skip

Place = str | os.PathLike[str]

# Samples that show which inputs 8 bits harm.
_FEW = 24

_STEPS = Prune, Shrink, Cut, Constrain, Fold, Equalize, Rotate, Quantize, Cache, Recover
STEPS: dict[str, Any] = {step.name: step for step in _STEPS}


def _quiet(_: str) -> None:
    """Nobody listens."""


def _model(model: Model | Place) -> Model:
    return model if isinstance(model, Model) else load(os.fspath(model))


def _dataset(data: Dataset | Place) -> Dataset:
    return data if isinstance(data, Dataset) else _read(data)


def _edited(model: Model) -> bool:
    return bool(model.structure or model.masks or model.planes)


def _batches(
    model: Model,
    data: Dataset | Place | None,
    samples: int,
    length: int,
    labels: bool = False,
    needed: bool = False,
) -> list[Batch]:
    """Calibration batches of at most `samples` samples, spread evenly over the data.

    Args:
        labels: they hold them, where there are any that are classes of the network.
        needed: data without them is refused; a language model needs none.
    """
    if data is None:
        return []
    length, given = model.at_most(length), _dataset(data)
    if needed and model.interface != "causal":
        find("classification", given, model).check(given, model)
    dataset = prepare(given, model, length).spread(samples)
    known = _classes(model, dataset) if labels or needed else None
    if dataset.kind != "text":
        return _labelled(encode(dataset, model, length=length, batch=8), known)
    # Texts of one length go together, so that little of a batch is padding; the batches in
    # random order, because steps hold out the first or the last.
    sizes = [len(text) for text in dataset.samples]
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    known = None if known is None else known[order]
    batches = _labelled(encode(dataset.subset(order), model, length=length, batch=8), known)
    return [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]


def _classes(model: Model, dataset: Dataset) -> np.ndarray | None:
    """Class numbers [n]; None where labels are not classes of the network, for none are needed."""
    try:
        lookup("tasks", "classification", "task").check(dataset, model)
    except InputError:
        return None
    return align(dataset, model).labels


def _labelled(batches: Iterable[Batch], labels: np.ndarray | None) -> list[Batch]:
    """The same with class numbers, in the order of the samples."""
    made, start = list(batches), 0
    if labels is None:
        return made
    for batch in made:
        count = len(next(iter(batch.values())))
        batch[LABELS] = torch.as_tensor(labels[start : start + count])
        start += count
    return made


def apply(
    model: Model | Place,
    recipe: Recipe | Place,
    data: Dataset | Place | None = None,
    *,
    journal: Path | None = None,
    seed: int | None = None,
    samples: int = 128,
    length: int = 128,
) -> Model:
    """A copy of the model with a recipe's edits.

    Args:
        recipe: a Recipe or the path of a `recipe.toml`.
        data: calibration data.
        journal: folder to go on from after a kill.
        seed: in place of the recipe's own.
        samples, length: of calibration, at the most.

    Raises:
        InputError: unusable model, recipe or data.
    """
    loaded = _model(model)
    if not isinstance(recipe, Recipe):
        path = Path(recipe)
        if not path.is_file():
            raise InputError("no such recipe", got=path, next="give a recipe.toml")
        recipe = Recipe.from_toml(path.read_text(encoding="utf-8"), STEPS)
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    check_learned(recipe)
    slopes = any("gradient" in step.needs for step in recipe.steps)
    needed = any(getattr(step, "loss", None) == LABELS for step in recipe.steps)
    batches = _batches(loaded, data, samples, length, slopes, needed)
    distils = any(step.name in ("recover", "constrain") for step in recipe.steps)
    before = original(loaded) if distils and _edited(loaded) else None
    done = _apply(loaded, recipe, batches, original=before, journal=journal).model
    earlier = loaded.recipe.steps if loaded.recipe else ()
    done.recipe = Recipe((*earlier, *recipe.steps), recipe.seed)
    return done


def prune(
    model: Model | Place,
    sparsity: float = 0.5,
    *,
    pattern: str | None = None,
    criterion: str | None = None,
    ranking: str | None = None,
    learn: str | None = None,
    data: Dataset | Place | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> Model:
    """A copy with the least important connections set to zero; see `penjing.steps.prune`.

    Args:
        pattern: `2:4` keeps two of every four inputs, whatever `sparsity` is; with `1x4` blocks of
            one output and four inputs stay or go whole.
        criterion: without one `admm` with data, `magnitude` without.
        ranking: `layer`, the same fraction of every layer, or `global`, layers against each other;
            without one `global` for `admm` without a pattern.
        learn: learn what goes in training, by a name of `penjing.constraints` (see
            `penjing.steps.constrain`, whose options `steps`, `lr`, `weights_lr`, `optimizer` and
            `loss` may follow); the criterion is then where it starts.
    """
    if learn is not None:
        if pattern is not None:
            raise UsageError("a pattern that is learned", got=pattern, next="give a sparsity")
        if ranking is not None:
            raise UsageError("a ranking of what is learned", got=ranking, next="leave it out")
        _need(data, "a constraint that is learned")
        recipe = learning(learn, "weights", sparsity, Prune(sparsity, LEARNED), seed, options,
                          criterion=criterion, targets=tuple(targets or ()))  # fmt: skip
        return apply(model, recipe, data, **options)
    chosen = criterion or ("admm" if data is not None else "magnitude")
    if ranking is None:
        ranking = "global" if chosen == "admm" and pattern is None else "layer"
    step = Prune(sparsity, chosen, pattern, targets=tuple(targets or ()), ranking=ranking)
    if step.needs and data is None:
        raise UsageError(f"criterion {chosen} needs data", next="give --data, or use magnitude")
    return apply(model, Recipe((step,), seed), data, **options)


def shrink(
    model: Model | Place,
    ratio: float = 0.5,
    *,
    data: Dataset | Place | None = None,
    of: str = "units",
    criterion: str = "gram",
    ranking: str = "layer",
    heads: float | None = None,
    multiple: int = 8,
    learn: str | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    tell: Callable[[str], object] = _quiet,
    **options: Any,
) -> Model:
    """A copy without the least important neurons; see `penjing.steps.shrink`.

    Args:
        ratio: what goes, of the units of every group; with `of` parameters, macs or latency, of
            those of the whole network. Latency is measured, see `penjing.sizing`.
        ranking: `layer`, the same fraction of every group; `global` or `measured`, groups against
            each other.
        multiple: units that stay are a multiple of it, which kernels want; of heads any number.
        learn: learn what goes in training, all groups together, see `prune`.
        tell: gets a line about what was measured.
    """
    _need(data, "shrink")
    loaded = _network(model, "shrink")
    if of not in (*OF, "latency"):
        raise UsageError("of", got=repr(of), allowed=", ".join((*OF, "latency")))
    chosen = tuple(targets or ())
    timed = of == "latency"
    if learn is not None:
        for name, value, usual in (("heads", heads, None), ("ranking", ranking, "layer")):
            if value != usual:
                raise UsageError(f"{name}, of a constraint that is learned", got=value,
                                 next="leave it out: how many of each go is learned")  # fmt: skip
        if timed:
            raise UsageError("latency, of a constraint that is learned", allowed=", ".join(OF))
        recipe = learning(learn, "neurons", ratio, Shrink(criterion=LEARNED), seed, options,
                          measure=of, criterion=criterion, targets=chosen,
                          multiple=multiple)  # fmt: skip
        return apply(loaded, recipe, data, **options)
    step = Shrink(ratio, heads, criterion, targets=chosen, multiple=multiple,
                  of="macs" if timed else of, ranking=ranking)  # fmt: skip
    if timed:
        samples, length = options.get("samples", 128), options.get("length", 128)
        slopes = "gradient" in step.needs
        batches = [] if ranking == "layer" else _batches(loaded, data, samples, length, slopes)
        step, sized = for_latency(
            loaded, step, ratio, batches, length=length, folder=options.get("journal")
        )
        tell(sized.describe())
    return apply(loaded, Recipe((step,), seed), data, **options)


def cut(
    model: Model | Place,
    layers: int | float | None = None,
    *,
    ratio: float | None = None,
    data: Dataset | Place | None = None,
    criterion: str = "influence",
    patch: str = "linear",
    learn: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Model:
    """A copy without the least important blocks; see `penjing.steps.cut`.

    Args:
        layers: how many blocks go; a fraction below 1 is a ratio.
        learn: learn what goes in training, see `prune`. Where the weights are trained along there
            is no patch: they have made up for what is gone.
    """
    if isinstance(layers, float) and 0 < layers < 1:
        layers, ratio = None, layers
    if layers is not None and layers != int(layers):
        raise UsageError("layers", got=layers, allowed="a whole number, or a ratio below 1")
    _need(data, "cut")
    count = None if layers is None else int(layers)
    if learn is not None:
        loaded = _model(model)
        Cut(count, ratio, criterion=criterion, patch=patch)
        budget = ratio or int(count or 0) / max(1, len(loaded.blocks))
        step = Cut(criterion=LEARNED, patch="none" if options.get("weights_lr") else patch)
        recipe = learning(learn, "layers", budget, step, seed, options, criterion=criterion)
        return apply(loaded, recipe, data, **options)
    step = Cut(count, ratio, criterion=criterion, patch=patch, seed=seed)
    return apply(model, Recipe((step,), seed), data, **options)


def quantize(
    model: Model | Place,
    bits: float = 8,
    *,
    group: int = 0,
    method: str | None = None,
    codes: str = "integer",
    scale_bits: int = 32,
    activations: int | None = None,
    embeddings: int | None = None,
    symmetric: bool | None = None,
    rotate: bool = False,
    refine: int = 0,
    kv_cache: int | None = None,
    floats: float = 0.0,
    data: Dataset | Place | None = None,
    targets: Sequence[str] | None = None,
    seed: int = 0,
    **options: Any,
) -> Model:
    """A copy with integer weights, and with `activations=8` integer inputs; see the step.

    Without a method: `gptq` with data, `rtn` without. With activations and no data, ranges are
    found at run time. Batch norms are folded into their convolutions first. Where this processor's
    sums of byte products saturate, weights beside integer inputs are paired, or have 7 of their 8
    bits (methods other than gptq and rtn). `kv_cache` is 8 or 4 bits of a decoder's keys and
    values; their ranges need data. `floats` is the share of the work that may stay in floats, see
    `penjing.sensitivity`. `refine` is steps of gradient descent on a block after it is quantized.
    """
    if kv_cache is not None:
        _need(data, "a KV cache in integers")
    narrow = bool(activations) and bits == 8 and weight_bits() < 8
    paired = narrow and method in (None, "gptq", "rtn")
    if narrow and not paired:
        bits = weight_bits()
    if method == "awq":
        _need(data, "quantize with the method awq")
    if refine:
        _need(data, "quantize with refine")
    loaded = _model(model)
    if kv_cache is not None:
        check_decoder(loaded)
    skip: tuple[str, ...] = ()
    if floats:
        _need(data, "what to leave in floats")
        plain = _apply(loaded, Recipe((Fold(),))).model if has_norms(loaded) else loaded
        few = _batches(loaded, data, _FEW, options.get("length", 128))
        skip = in_floats(plain, few, floats)
    step = Quantize(
        bits,
        group,
        method or ("gptq" if data is not None else "rtn"),
        bool(activations) if symmetric is None else symmetric,
        activations=activations or 0,
        dynamic=bool(activations) and data is None,
        embeddings=embeddings or 0,
        embedding_group=32 if (embeddings or 8) < 8 else 0,
        targets=tuple(targets or ()),
        codes=codes,
        scale_bits=scale_bits,
        rotate=rotate,
        refine=refine,
        paired=paired,
        skip=skip,
    )
    steps: tuple[Any, ...] = (Fold(), step) if has_norms(loaded) else (step,)
    if kv_cache is not None:
        steps += (Cache(kv_cache),)
    return apply(loaded, Recipe(steps, seed), data, **options)


def recover(
    model: Model | Place,
    data: Dataset | Place | None = None,
    *,
    seconds: float = 60.0,
    lr: float = 1e-4,
    loss: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Model:
    """A copy trained toward the original's outputs; see `penjing.steps.recover`."""
    loaded = _model(model)
    _need(data, "recover")
    if not _edited(loaded):
        raise UsageError("nothing to recover: the model is not edited", next="edit it first")
    step = Recover(seconds=seconds, lr=lr, loss=loss, seed=seed)
    return apply(loaded, Recipe((step,), seed), data, **{"samples": 512, **options})


def _network(model: Model | Place, verb: str) -> Model:
    loaded = _model(model)
    if loaded.interface == "weights":
        raise UsageError(f"{verb} is for networks", got="bare weights",
                         next="give the network, or prune or quantize the file")  # fmt: skip
    return loaded


def _need(data: object, verb: str) -> None:
    if data is None:
        raise UsageError(f"{verb} needs data", next="give --data")


def save(
    model: Model,
    output: Place,
    *,
    to: Sequence[str] = (),
    recipe: Recipe | None = None,
    overwrite: bool = False,
) -> None:
    """Write an artifact, with exports (as `penjing export --to`) that passed parity."""

    def extra(folder: Path) -> None:
        if to:
            _export(model, folder, tuple(to))

    _save(model, Path(output), recipe=recipe or model.recipe, extra=extra, overwrite=overwrite)


def export(artifact: Place, to: Sequence[str] = ("onnx",)) -> dict[str, float]:
    """Add exports to an artifact; deviation from the torch model by target.

    Raises:
        ExportError: an exported file does not agree; the artifact is as it was.
    """
    model, found = load(os.fspath(artifact)), {}
    extend(Path(artifact), lambda folder: found.update(_export(model, folder, tuple(to))))
    return found


def _exported(artifact: Path, runtime: str | None) -> tuple[str, Path]:
    """Runtime and file of an artifact's export."""
    there = {}
    if runtime == "packed":  # runs the artifact itself
        return runtime, artifact
    for name in TARGETS.values():
        path = artifact / str(lookup("runtimes", name, "file"))
        if path.exists():
            there[name] = path
    if not there or (runtime is not None and runtime not in there):
        raise InputError(
            "the artifact has no export for this runtime" if runtime else "nothing is exported",
            got=runtime or artifact, allowed=", ".join(there) or None,
            next=f"penjing export {artifact} --to onnx, or --runtime packed",
        )  # fmt: skip
    name = runtime or _measured_runtime(artifact) or next(iter(there))
    return (name, there[name]) if name in there else next(iter(there.items()))


def _measured_runtime(artifact: Path) -> str | None:
    path = artifact / "results.json"
    return str(read_json(path).get("runtime")) if path.exists() else None


def evaluate(
    model: Model | Place,
    data: Dataset | Place,
    *,
    task: Any = None,
    runtime: str | None = None,
    length: int = 128,
    batch: int = 32,
) -> dict[str, Any]:
    """A task's metric on data, through torch, or through an artifact's exported file."""
    loaded, dataset = _model(model), _dataset(data)
    length = loaded.at_most(length)
    measure_of = find(task, dataset, loaded)
    reference = torch_predictor(original(loaded)) if measure_of.needs_reference else None
    if runtime in (None, "torch"):
        found = _evaluate(torch_predictor(loaded), loaded, dataset, measure_of, length=length,
                          batch=batch, reference=reference)  # fmt: skip
    else:
        if isinstance(model, Model):
            raise UsageError("an exported file is evaluated from its artifact's path")
        name, path = _exported(Path(model), runtime)
        found = quality(Candidate(path, name, loaded.parameter_count), loaded, dataset, measure_of,
                        length=length, batch=batch, reference=reference)  # fmt: skip
    return {"metric": measure_of.metric, "value": found.value, "samples": found.samples,
            "runtime": runtime or "torch"}  # fmt: skip


def measure(
    artifact: Place,
    *,
    runtime: str | None = None,
    data: Dataset | Place | None = None,
    task: Any = None,
    batch: int | None = None,
    length: int = 128,
    threads: int | None = None,
) -> dict[str, Any]:
    """Size, latency, throughput, memory, and quality on data, of an artifact's exported file."""
    model = load(os.fspath(artifact))
    name, path = _exported(Path(artifact), runtime)
    found = measure_files(
        [Candidate(path, name, model.parameter_count)], model, length=length, user_batch=batch,
        threads=threads,
    )[0].measurement  # fmt: skip
    table: dict[str, Any] = {"runtime": name, "threads": threads or physical_cores()}
    table |= asdict(found)
    if data is not None:
        scored = evaluate(artifact, data, task=task, runtime=name, length=length)
        table |= {"metric": scored["metric"], "quality": scored["value"]}
        table["samples"] = scored["samples"]
    return table


def fit(
    model: Model | Place,
    data: Dataset | Place,
    output: Place,
    *,
    calibration: Dataset | Place | None = None,
    task: Any = None,
    max_drop: float | None = None,
    max_size: int | None = None,
    max_latency: float | None = None,
    max_memory: int | None = None,
    runtime: str | None = None,
    within: float | None = None,
    batch: int = 1,
    length: int = 128,
    threads: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    confidence: float = 0.95,
    recover: float = 20.0,
) -> Result:
    """The smallest and fastest artifact within a budget, every number measured by running it.

    Args:
        data: what quality is measured on; calibration data is split off it without `calibration`.
        output: the artifact folder.
        task: a name, `file.py:function`, a callable, or None for what suits data and model.
        max_drop: of the metric, a fraction; relative where the task says so (perplexity).
        max_size: bytes.
        max_latency: seconds.
        max_memory: bytes.
        within: seconds of work.
        recover: seconds of distillation of a candidate.

    Raises:
        InputError: unusable model or data, or an output that exists.
    """
    budget = Budget(max_drop, max_size, max_latency, max_memory, within)
    place = Path(output)
    check_output(place, overwrite)
    loaded = _model(model)
    length = loaded.at_most(length)
    dataset = _dataset(data)
    tuned = None if calibration is None else _dataset(calibration)
    words = ["penjing", "fit", loaded.source.path]
    words += [] if isinstance(data, Dataset) else ["--data", os.fspath(data)]
    words += ["--calibration", os.fspath(calibration)] if isinstance(calibration, str) else []
    words += [w for k, v in budget.to_json().items() for w in (f"--{k.replace('_', '-')}", f"{v}")]
    chosen = {"metric": task if isinstance(task, str) else None, "runtime": runtime,
              "weights": loaded.source.details.get("weights"), "threads": threads}  # fmt: skip
    chosen |= {k: v for k, v, plain in (("batch", batch, 1), ("length", length, 128),
               ("seed", seed, 0), ("confidence", confidence, 0.95)) if v != plain}  # fmt: skip
    words += [w for k, v in chosen.items() if v is not None for w in (f"--{k}", f"{v}")]
    settings = Settings(
        runtime, batch, length, threads, confidence, seed, recover=recover,
        command=shlex.join([*words, "-o", place.name]),
    )  # fmt: skip
    found = find(task, dataset, loaded)
    return _fit(
        loaded, dataset, place, found, budget, settings, calibration=tuned, overwrite=overwrite
    )


def result_of(artifact: Place) -> Result:
    """The result that an artifact holds."""
    return Result.from_json(json.loads((Path(artifact) / "results.json").read_text("utf-8")))
