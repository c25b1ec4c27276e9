"""What is kept off the terminal, and what comes out all the same."""

import logging
import os
import subprocess
import sys
import warnings

import pytest

from penjing.silence import hushed, unheard


def test_native_lines_are_held_back(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(2, b"before\n")
    with unheard():
        os.write(2, b"noise\n")
        print("python", file=sys.__stderr__)
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"


def test_a_failure_lets_them_out(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        os.write(2, b"the reason\n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), unheard():
        fail()
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "the reason\nafter\n"


def test_without_a_standard_error_the_body_runs() -> None:
    code = (
        "import os; from penjing.silence import unheard; os.close(2)\nwith unheard(): print('ran')"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"ran\n"


def test_python_is_hushed_in_the_body_alone(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with hushed():
        print("out")
        print("err", file=sys.stderr)
        warnings.warn("unwanted", stacklevel=1)
        logging.getLogger("torchao").error("unwanted")
    print("out again")
    logging.getLogger("torchao").error("wanted")
    assert capsys.readouterr().out == "out again\n"
    assert [record.message for record in caplog.records] == ["wanted"]


def test_networks_of_transformers_are_made_without_a_word() -> None:
    """Where torchao is installed, its import has more to say than anybody wants."""
    config = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9}
    code = f"from penjing.readers._transformers import empty; empty('BertModel', {config})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
