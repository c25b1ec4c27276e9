"""Results for the tests: a realistic one and the awkward ones."""

from __future__ import annotations

from dataclasses import replace

from penjing.result import Drop, Latency, Measurement, Point, Result, Unit

RECIPE = """seed = 0

[[step]]
do = "cut"
targets = ["encoder.layer.*"]
layers = 3
criterion = "angle"
patch = "linear"

[[step]]
do = "quantize"
targets = ["*"]
bits = 8
activations = 8
method = "gptq"
"""
COMMAND = (
    "penjing fit sentence-transformers/all-MiniLM-L6-v2 --data bbc.csv --task retrieval "
    "--max-drop 1% --max-size 15MB --max-latency 5ms -o fitted"
)

_FRONT = (
    (22.9e6, 4.9, 0.957, True, "int8"),
    (17.6e6, 4.1, 0.9566, True, "int8, cut 1"),
    (15.9e6, 3.4, 0.9558, True, "int8, cut 2"),
    (13.4e6, 2.6, 0.9549, True, "int8, cut 3"),
    (12.1e6, 2.3, 0.9531, True, "int8, cut 3, narrower 0.75"),
    (10_812_410, 1.9, 0.951, True, "int4 embeddings, int8, cut 4"),
    (9.9e6, 1.8, 0.9462, True, "int4, cut 4"),
    (9.1e6, 1.5, 0.9403, True, "int4, cut 4, narrower 0.75"),
    (8.4e6, 1.2, 0.9214, True, "int4, cut 5"),
    (45.4e6, 8.9, 0.957, True, "fp16"),
    (31.0e6, 5.9, 0.9567, False, "int8 weights only"),
    (11.6e6, 2.9, 0.9478, False, "int4 linears, cut 3"),
    (19.8e6, 3.9, 0.9522, False, "prune 2:4"),
)
_UNITS = (
    ("embeddings", "int4, group 32", "half of the bytes; error 0.4 %, no measured drop"),
    ("encoder.layer.0", "int8", "largest effect of all blocks: 6.1 points when cut"),
    ("encoder.layer.1", "shrunk to 9 of 12 heads, int8", "three heads weigh 1.1 % of the output"),
    ("encoder.layer.2", "cut", "linear patch; 0.21 points when cut alone"),
    ("encoder.layer.3", "cut", "linear patch; 0.08 points when cut alone"),
    ("encoder.layer.4", "cut", "linear patch; 0.11 points when cut alone"),
    ("encoder.layer.5", "cut", "linear patch; 0.15 points when cut alone"),
    ("pooler", "kept", "not used by this task, and not understood: frozen"),
)


def minilm() -> Result:
    """The main job as it is meant to end."""
    return Result(
        task="retrieval",
        metric="label retrieval accuracy",
        runtime="onnxruntime",
        threads=2,
        before=Measurement(
            90_870_123, 22_713_216, 32.006, Latency(10.3, 11.8, 1, 128), 312_500_000, 0.957,
            131.4, Latency(243.1, 251.7, 32, 128),
        ),
        after=Measurement(
            10_812_410, 14_901_888, 5.8046, Latency(1.9, 2.3, 1, 128), 96_300_000, 0.951,
            702.9, Latency(45.2, 47.9, 32, 128),
        ),
        drop=Drop(0.006, 0.0012, 0.0108, 0.95, 1669, False),
        budget={"max_drop": 0.01, "max_size": 15_000_000, "max_latency": 0.005, "within": None},
        met=True,
        why=None,
        front=tuple(Point(s, t, q, "[[step]]", m, n) for s, t, q, m, n in _FRONT),
        units=tuple(Unit(*u) for u in _UNITS),
        notes=(
            "No calibration data was given: 256 of 1925 samples were split off for it.",
            "int8 with OpenVINO was slower here (2.4 ms); onnxruntime was chosen by measurement.",
        ),
        versions={"penjing": "0.1.0", "torch": "2.13.0", "onnxruntime": "1.32.0", "onnx": "1.20.0"},
    )  # fmt: skip


def language() -> Result:
    """Perplexity, lower is better, relative drop, budget missed, 100 long-named units."""
    units = tuple(
        Unit(
            f"model.layers.{i // 7}.a_module_with_a_very_long_name_{'x' * 90}.{i % 7}.weight",
            ("int4", "int8", "kept", "2:4 sparse", "int3", "shrunk 0.5")[i % 6],
            "because " * (i % 9 + 1),
        )
        for i in range(100)
    )
    front = tuple(
        Point(538e6 / (1 + k / 8), 61.0 / (1 + k / 14), 17.2 * 1.09 ** (k * k / 9), "", k % 5 > 0)
        for k in range(40)
    )
    return replace(
        minilm(),
        task="perplexity",
        metric="perplexity",
        higher_is_better=False,
        before=Measurement(538_090_000, 134_515_008, 32.0, Latency(61, 64.5, 1, 64), 10**9, 17.213),
        after=Measurement(94_000_000, 134_515_008, 5.59, Latency(70.4, 82, 1, 64), 4 * 10**8, 20.9),
        drop=Drop(0.2142, 0.191, 0.2387, 0.95, 240, True),
        budget={"max_drop": "10%", "max_size": "100MB"},
        met=False,
        why="the drop of perplexity is 21.42 %, above the 10 % allowed, at every size below 100 MB",
        units=units,
        front=front,
        notes=(),
    )


def bare() -> Result:
    """Nothing but a size and a latency."""
    one = Measurement(4_000, 1_000, 32.0, Latency(0.02, 0.03, 1, None), 50_000_000)
    return Result(
        task="fidelity", metric="cosine", runtime="torch", threads=1, before=one,
        after=replace(one, size_bytes=1_040), drop=None, budget={}, met=True, why=None,
    )  # fmt: skip
