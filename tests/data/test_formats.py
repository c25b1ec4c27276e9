"""Every format says the same samples; every bad file is one InputError that names the place."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from penjing.data import read
from penjing.errors import InputError, UsageError

TEXTS = ["one, two", 'a "quoted" line', "three\nlines"]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        import csv

        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(
                file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ","
            )
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_tables_agree(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": t, "label": c} for t, c in zip(TEXTS, ["sport", "arts", "sport"], strict=True)]
    dataset = read(write(tmp_path / f"d{suffix}", rows))
    assert dataset.kind == "text"
    assert dataset.samples == tuple(TEXTS)
    assert dataset.classes == ("arts", "sport")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_pairs_and_integer_labels(tmp_path: Path, suffix: str) -> None:
    pairs = [
        {"text_a": "x", "text_b": "y", "score": 0.5},
        {"text_a": "u", "text_b": "v", "score": 3},
    ]
    if suffix == ".parquet":
        pairs[1]["score"] = 3.0
    dataset = read(write(tmp_path / f"p{suffix}", pairs))
    assert dataset.kind == "pairs"
    assert dataset.samples == (("x", "y"), ("u", "v"))
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0.5, 3.0]
    whole = read(
        write(tmp_path / f"i{suffix}", [{"q": "a", "c": 10}, {"q": "b", "c": 2}]),
        text="q",
        label="c",
    )
    assert whole.labels is not None
    assert (whole.labels.tolist(), whole.classes) == ([10, 2], ())


def test_long_csv_field(tmp_path: Path) -> None:
    long = "word " * 50_000
    assert read(write(tmp_path / "d.csv", [{"text": long}])).samples == (long,)


def test_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "d.txt"
    path.write_bytes(b"one\ntwo\r\n\r\nthree\n \n\nfour\n")
    assert read(path).samples == ("one\ntwo", "three", "four")


def test_limit_is_spread_over_the_file(tmp_path: Path) -> None:
    rows = [{"text": str(i), "label": i // 5} for i in range(10)]
    dataset = read(write(tmp_path / "d.jsonl", rows), limit=4)
    assert dataset.samples == ("0", "2", "5", "7")
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(UsageError, match="limit"):
        read(tmp_path / "d.jsonl", limit=0)


BAD = {
    "line.jsonl": (b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
    "list.jsonl": (b"[1]\n", "line 1: not a JSON object"),
    "deep.jsonl": (b"[" * 200_000 + b"\n", "line 1: not JSON"),
    "bytes.jsonl": (b'{"text": "\xff"}\n', "line 1: not JSON"),
    "column.jsonl": (b'{"body": "a", "kind": 1}\n', "no column 'text'; got body, kind"),
    "later.jsonl": (
        b'{"text": "a"}\n{"body": "a"}\n',
        "line 2: no 'text' here, line 1 has one; got body; allowed: the same columns in every row",
    ),
    "unlabelled.jsonl": (
        b'{"text": "a", "label": 1}\n{"text": "b"}\n',
        "line 2: no 'label' here, line 1 has one",
    ),
    "half-pair.jsonl": (b'{"text": "\\ud800 a"}\n', "line 1: half of a surrogate pair"),
    "number.jsonl": (b'{"text": 5}\n', "line 1: text is not text; got int"),
    "null.jsonl": (b'{"text": "a", "label": null}\n', "line 1: not a label; got None"),
    "half.jsonl": (b'{"text": "a", "label": 0.5}\n', "line 1: not a label; got 0.5"),
    "nan.jsonl": (b'{"text": "a", "label": NaN}\n', "line 1: not a label; got nan"),
    "mixed.jsonl": (b'{"text":"a","label":1}\n{"text":"a","label":"x"}\n', "line 2: labels of two"),
    "some.jsonl": (b'{"text":"a"}\n{"text":"a","label":"x"}\n', "line 2: a label here, none at"),
    "score.csv": (b"text_a,text_b,score\na,b,high\n", "line 2: not a score; got 'high'"),
    "fields.csv": (b"text,label\na,1\nb\n", "line 3: malformed; got 1 fields; allowed: 2"),
    "quote.csv": (b'text\n"a\n', "malformed"),
    "latin.csv": (b"text\ncaf\xe9\n", "not UTF-8"),
    "twice.csv": (b"text,text\na,b\n", "a column name occurs twice"),
    "header.csv": (b"text,label\n", "no samples"),
    "blank.jsonl": (b"\n\n", "no samples"),
    "empty.jsonl": (b"", "no samples"),
    "empty.npz": (b"", "no samples"),
    "blank.txt": (b"\n \n", "no samples"),
    "junk.parquet": (b"PAR1 not really", "is not a Parquet file"),
    "junk.npz": (b"PK\x03\x04 not really", "cannot be read as .npz"),
    "pickle.npz": (b"\x80\x04K\x01.", "cannot be read as .npz"),
    "data.xyz": (b"a", "unknown format of data"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(tmp_path / name)
    assert message in str(caught.value)
    assert name in str(caught.value)


def test_missing_file_and_columns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such data file; got .*absent\.jsonl"):
        read(tmp_path / "absent.jsonl")
    path = write(tmp_path / "d.parquet", [{"body": "a", "text": "x"}])
    with pytest.raises(InputError, match="no column 'prose'; got body, text"):
        read(path, text="prose")
    with pytest.raises(InputError, match="no column 'genre'"):
        read(path, label="genre")


def test_npz(tmp_path: Path) -> None:
    pixels = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.savez(tmp_path / "d.npz", pixel_values=pixels, y=np.array(["b", "a"]))
    dataset = read(tmp_path / "d.npz")
    assert dataset.kind == "arrays"
    assert dataset.labels is not None
    assert (dataset.labels.tolist(), dataset.classes) == ([1, 0], ("a", "b"))
    np.testing.assert_array_equal(dataset.samples[1]["pixel_values"], pixels[1])
    assert set(dataset.samples[0]) == {"pixel_values"}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.array([{}, {}])}, "pickled objects are never loaded"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2, int)}, "got x 3, y 2"),
        ({"x": np.array([0.0, np.nan])}, "array x has NaN or Inf; got 1 values"),
        ({"x": np.zeros((2, 2)), "y": np.zeros((2, 2), int)}, "labels y; got shape (2, 2)"),
        ({"x": np.zeros((2, 2)), "y": np.array([0, 0.5])}, "label 2: not a label; got 0.5"),
        ({"x": np.zeros((0, 2))}, "no samples"),
        ({"y": np.zeros(2, int)}, "no array of samples"),
        ({"x": np.zeros(2, complex)}, "array x; got complex128"),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(InputError) as caught:
        read(tmp_path / "d.npz")
    assert message in str(caught.value)


def test_truncated_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).random((50, 50)))
    content = bytearray((tmp_path / "d.npz").read_bytes())
    content[500:600] = bytes(100)
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as \.npz"):
        read(tmp_path / "d.npz")


def picture(path: Path, mode: str = "RGB", colour: object = (9, 8, 7)) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.new(mode, (4, 3), colour).save(path)  # type: ignore[arg-type]
    return path


def test_image_folders(tmp_path: Path) -> None:
    for name in ("zebra/2.png", "zebra/1.jpg", "ant/deep/3.PNG"):
        picture(tmp_path / "c" / name)
    (tmp_path / "c" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "c" / "none").mkdir()
    dataset = read(tmp_path / "c")
    assert dataset.kind == "images"
    assert [p.name for p in dataset.samples] == ["3.PNG", "1.jpg", "2.png"]
    assert dataset.labels is not None
    assert (dataset.labels.tolist(), dataset.classes) == ([0, 1, 1], ("ant", "zebra"))
    flat = read(picture(tmp_path / "flat" / "a.png").parent)
    assert flat.labels is None
    for number in ("0", "10", "2"):
        picture(tmp_path / "n" / number / "a.png")
    numbered = read(tmp_path / "n").labels
    assert numbered is not None
    assert numbered.tolist() == [0, 10, 2]


def test_bad_image_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no samples"):
        read(tmp_path / "empty")
    picture(tmp_path / "both" / "c" / "a.png")
    picture(tmp_path / "both" / "b.png")
    with pytest.raises(InputError, match="both beside and inside"):
        read(tmp_path / "both")
    picture(tmp_path / "bad" / "a.png")
    (tmp_path / "bad" / "b.png").write_bytes(b"\x89PNG but no more")
    with pytest.raises(InputError, match=r"cannot read an image; got .*b\.png"):
        read(tmp_path / "bad")
