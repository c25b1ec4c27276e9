"""The ExecuTorch session against numpy, and its errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from penjing.errors import InputError, UsageError
from penjing.model import Model, Source

pytest.importorskip("executorch")
pytest.importorskip("torchao")

from penjing.runtimes import executorch as runtime
from penjing.runtimes._remote import Remote
from penjing.writers import executorch as writer


class Square(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x + 1


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "model.pte"
    model = Model(Square(), "tensor", {"x": torch.ones(2, 3)}, Source("factory", "tiny", "0"))
    writer.write(model, path)
    return path


def test_runs_row_by_row_and_gives_its_own_array(program: Path) -> None:
    session = runtime.open(program, threads=1)
    assert session.inputs == {"x": (None, 3)}
    first = session.run({"x": np.array([[1, 2, 3], [4, 5, 6]], np.float64), "surplus": np.ones(1)})
    session.run({"x": np.zeros((1, 3), np.float32)})
    np.testing.assert_array_equal(first, [[2, 5, 10], [17, 26, 37]])


def test_a_process_of_its_own_has_no_transformers(program: Path) -> None:
    with Remote(program, "executorch", threads=2) as session:
        got = session.run({"x": np.full((2, 3), 2, np.float32)})
        modules = session.modules()
    np.testing.assert_array_equal(got, np.full((2, 3), 5))
    assert "executorch" in modules
    assert not {"transformers", "onnxruntime", "torchao"} & set(modules)


def test_wrong_inputs_are_told(program: Path) -> None:
    session = runtime.open(program, threads=1)
    with pytest.raises(InputError, match="x is missing"):
        session.run({"y": np.ones((1, 3))})
    for shape in ((1, 4), (3,), (0, 3)):
        with pytest.raises(InputError, match="shape of input x"):
            session.run({"x": np.ones(shape)})


def test_files_that_are_no_program_are_told(tmp_path: Path, program: Path) -> None:
    with pytest.raises(InputError, match="no such"):
        runtime.open(tmp_path / "none.pte", threads=1)
    whole = program.read_bytes()
    for content in (b"", b"\0" * 64, whole[:100], b"no program at all" * 100):
        (tmp_path / "model.pte").write_bytes(content)
        with pytest.raises(InputError, match="cannot load"):
            runtime.open(tmp_path / "model.pte", threads=1)


def test_one_number_of_threads_a_process(program: Path) -> None:
    session = runtime.open(program, threads=1)
    with pytest.raises(UsageError, match="threads"):
        runtime.open(program, threads=2)
    assert session.inputs
