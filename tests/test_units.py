"""Units against hand-written values."""

import pytest

from penjing.errors import UsageError
from penjing.units import format_size, format_time, parse_ratio, parse_size, parse_time


@pytest.mark.parametrize(
    ("text", "size"),
    [("25MB", 25_000_000), ("25 MiB", 26_214_400), ("1.5kb", 1500), (7, 7), ("2e3", 2000)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("20ms", 0.02), ("30m", 1800), ("2h", 7200), ("5", 5), ("3us", 3e-6), (".5 s", 0.5)],
)
def test_times(text: str, seconds: float) -> None:
    assert parse_time(text) == pytest.approx(seconds)


@pytest.mark.parametrize(("text", "ratio"), [("1%", 0.01), ("0.01", 0.01), (0.5, 0.5), ("100%", 1)])
def test_ratios(text: str | float, ratio: float) -> None:
    assert parse_ratio(text) == pytest.approx(ratio)


@pytest.mark.parametrize("parse", [parse_size, parse_time, parse_ratio])
@pytest.mark.parametrize(
    "text", ["", "abc", "-1", "nan", "inf", "1e999", "1 2", "3 parsecs", "1%%"]
)
def test_nonsense_is_a_usage_error(parse: object, text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)  # type: ignore[operator]


def test_formats() -> None:
    assert [format_size(n) for n in (999, 25_000_000, 1_500, 5e12)] == [
        "999 B",
        "25.0 MB",
        "1.5 KB",
        "5000.0 GB",
    ]
    assert [format_time(s) for s in (5e-6, 0.02, 1.26, 90, 3600, 8000)] == [
        "5 us",
        "20.0 ms",
        "1.3 s",
        "1 min 30 s",
        "1 h 0 min",
        "2 h 13 min",
    ]
