import hashlib

import numpy as np
import pytest

from penjing.data import Dataset, check_disjoint, split
from penjing.errors import InputError, UsageError


def texts(*samples: str) -> Dataset:
    return Dataset("text", samples, np.arange(len(samples)), path="here")


def test_digest_is_the_sha256_of_the_text() -> None:
    assert texts("é").digests() == (hashlib.sha256("é".encode()).hexdigest(),)


def test_digests_tell_samples_apart() -> None:
    arrays = [np.zeros(4, np.float32), np.zeros(4, np.float64), np.zeros((2, 2), np.float32)]
    dataset = Dataset("arrays", (*({"x": a} for a in arrays), {"y": arrays[0]}))
    assert len(set(dataset.digests())) == 4
    pairs = Dataset("pairs", (("ab", "c"), ("a", "bc"), ("c", "ab"), ("ab", "c")))
    first, *others = pairs.digests()
    assert [first == other for other in others] == [False, False, True]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_split_shares_nothing_and_loses_nothing(seed: int) -> None:
    samples = [str(i % 40) for i in range(50)]
    calibration, evaluation = split(texts(*samples), 12, seed)
    assert len(calibration) == 12
    assert sorted(calibration.samples + evaluation.samples) == sorted(samples)
    assert not set(calibration.samples) & set(evaluation.samples)
    check_disjoint(calibration, evaluation)
    for part in (calibration, evaluation):
        assert part.labels is not None
        assert [samples[i] for i in part.labels] == list(part.samples)
        assert (np.diff(part.labels) > 0).all()


def test_split_depends_on_the_seed_alone() -> None:
    dataset = texts(*map(str, range(30)))
    assert split(dataset, 10, 3)[0].samples == split(dataset, 10, 3)[0].samples
    assert split(dataset, 10, 3)[0].samples != split(dataset, 10, 4)[0].samples


def test_split_refuses() -> None:
    for calibration in (0, 2, 5):
        with pytest.raises(UsageError, match="cannot be split off"):
            split(texts("a", "b"), calibration)
    with pytest.raises(InputError, match="equal samples stay together; got 1 distinct among 3"):
        split(texts("a", "a", "a"), 2)


def test_overlap_is_refused_with_count_and_place() -> None:
    with pytest.raises(InputError) as caught:
        check_disjoint(texts("x", "b", "c"), texts("a", "b", "c", "d"))
    message = str(caught.value)
    assert "2 of 3" in message
    assert "calibration sample 2 is evaluation sample 2" in message


def test_bad_datasets() -> None:
    with pytest.raises(InputError, match="no samples"):
        Dataset("text", ())
    with pytest.raises(InputError, match="got 1 labels; allowed: 2"):
        Dataset("text", ("a", "b"), np.zeros(1, np.int64))
