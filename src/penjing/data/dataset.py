"""Dataset: samples in a fixed order, with labels where there are any.

Two samples are the same when the SHA-256 of their content is, whatever their labels; a split
keeps equal samples on one side, so that nothing calibrated on is evaluated on.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from penjing.errors import InputError, UsageError

__all__ = ["Dataset", "Kind", "check_disjoint", "split"]

Kind = Literal["text", "pairs", "images", "arrays"]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples to calibrate or to evaluate on.

    Attributes:
        kind: what a sample is: `text` a str, `pairs` two str, `images` a path of an image file
            or a PIL image, `arrays` a dict of arrays without the batch dimension.
        samples: in the order of the file.
        labels: int64 [n] classes, float64 [n] scores of pairs, or None.
        classes: names of the labels 0, 1, ..., empty when labels were integers already.
        path: where the samples came from, as the user gave it.
    """

    kind: Kind
    samples: tuple[Any, ...]
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    path: str = ""

    def __post_init__(self) -> None:
        if not self.samples:
            raise InputError("no samples", got=self.path or "an empty dataset", next="add some")
        if self.labels is not None and len(self.labels) != len(self.samples):
            raise InputError(
                "labels and samples differ in number",
                got=f"{len(self.labels)} labels",
                allowed=f"{len(self.samples)}",
            )

    def __len__(self) -> int:
        return len(self.samples)

    def subset(self, indices: Iterable[int]) -> Dataset:
        """The samples at `indices`, in that order; the classes stay as they are."""
        chosen = [int(i) for i in indices]
        labels = None if self.labels is None else self.labels[chosen]
        samples = tuple(self.samples[i] for i in chosen)
        return dataclasses.replace(self, samples=samples, labels=labels)

    def spread(self, count: int) -> Dataset:
        """At most `count` samples, spread evenly: files are often sorted by class."""
        if count >= len(self):
            return self
        return self.subset(i * len(self) // count for i in range(count))

    def digests(self) -> tuple[str, ...]:
        """SHA-256 of each sample's content, labels left out.

        Raises:
            InputError: an image file that cannot be read.
        """
        return tuple(_digest(sample) for sample in self.samples)


def _digest(sample: Any) -> str:
    digest = hashlib.sha256()
    if isinstance(sample, str):
        digest.update(sample.encode("utf-8", "surrogatepass"))
    elif isinstance(sample, tuple):
        for text in sample:
            digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    elif isinstance(sample, Mapping):
        for name in sorted(sample):
            array = np.ascontiguousarray(sample[name])
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    elif isinstance(sample, Path):
        try:
            digest.update(sample.read_bytes())
        except OSError as error:
            raise InputError("cannot read an image", got=f"{sample} ({error.strerror})") from error
    else:
        digest.update(f"{sample.mode} {sample.size}".encode())
        digest.update(sample.tobytes())
    return digest.hexdigest()


def split(dataset: Dataset, calibration: int, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Take `calibration` samples at random off `dataset`; equal samples stay together.

    Returns:
        (calibration, evaluation), each in the order of `dataset`, sharing no content.

    Raises:
        UsageError: `calibration` is not between 1 and the number of samples less 1.
        InputError: equal samples leave nothing for one of the sides.
    """
    if not 1 <= calibration < len(dataset):
        raise UsageError(
            "calibration samples cannot be split off",
            got=calibration,
            allowed=f"1 to {len(dataset) - 1} of {len(dataset)} samples",
        )
    groups: dict[str, list[int]] = {}
    for index, digest in enumerate(dataset.digests()):
        groups.setdefault(digest, []).append(index)
    members = list(groups.values())
    taken: set[int] = set()
    for number in np.random.default_rng(seed).permutation(len(members)):
        if len(taken) + len(members[number]) <= calibration:
            taken.update(members[number])
    if not taken:
        raise InputError(
            "no calibration samples can be split off: equal samples stay together",
            got=f"{len(members)} distinct among {len(dataset)}",
            next="give calibration data of its own",
        )
    rest = [i for i in range(len(dataset)) if i not in taken]
    return dataset.subset(sorted(taken)), dataset.subset(rest)


def check_disjoint(calibration: Dataset, evaluation: Dataset) -> None:
    """Refuse calibration data that holds samples of the evaluation data.

    Raises:
        InputError: an overlap; the message has the count and the positions of one example.
    """
    places: dict[str, int] = {}
    for index, digest in enumerate(evaluation.digests()):
        places.setdefault(digest, index)
    shared = [(i, places[d]) for i, d in enumerate(calibration.digests()) if d in places]
    if shared:
        first, second = shared[0]
        raise InputError(
            "calibration and evaluation data overlap",
            got=f"{len(shared)} of {len(calibration)} calibration samples, e.g. calibration "
            f"sample {first + 1} is evaluation sample {second + 1}",
            allowed="no sample in both",
            next="remove them from one, or give no calibration data: it is then split off",
        )
