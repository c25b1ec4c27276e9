"""Every command in the documents runs, every option, verb, file and heading in them is there."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

import penjing
from penjing import result
from penjing.cli import group
from penjing.registry import choices

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
TEXTS = {str(p.relative_to(ROOT)): p.read_text("utf-8") for p in PAGES}

# Their work takes minutes: the arguments are checked, the work is not done.
ONLY_PARSED = ("fit", "demo")
SETUP = (".venv/bin/pip", "python3")
_BLOCK = re.compile(r"(?:<!-- file: (\S+) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> Iterator[tuple[str, str, str | None]]:
    """(language, content, file) of every fenced block."""
    for match in _BLOCK.finditer(text):
        yield match[2], match[3], match[1]


def commands(shell: str) -> list[list[str]]:
    """Words of every command; comments, and variables that are set for it, left out."""
    lines = (shlex.split(line, comments=True) for line in shell.replace("\\\n", " ").splitlines())
    bare = (list(dropwhile(re.compile(r"[A-Z_]+=").match, words)) for words in lines)
    return [words for words in bare if words]


def options_of(verb: str) -> set[str]:
    """Option names that `--help` shows."""
    command = group.commands[verb]
    context = click.Context(command)
    shown = (p for p in command.params if not getattr(p, "hidden", False))
    names = {n for p in shown for n in (*p.opts, *p.secondary_opts) if n.startswith("-")}
    return names | set(command.get_help_option_names(context)) | {"-h", "--help"}


def all_options() -> set[str]:
    return {n for verb in group.commands for n in options_of(verb)} | {"--version"}


def wrong_names(text: str) -> list[str]:
    """Verbs and options in a document's code that the command does not have."""
    wrong = []
    prose = _BLOCK.sub("", text)
    pieces = [piece.replace("\n", " ") for piece in re.findall(r"`([^`]+)`", prose)]
    for language, content, _ in blocks(text):
        if language == "sh":
            pieces += [shlex.join(words) for words in commands(content)]
    for piece in pieces:
        words = piece.split()
        if not words:
            continue
        known = all_options()
        if words[0] in ("make", "sh", "python", "torchrun", "ray", *SETUP):
            continue
        if words[0] == "penjing" and len(words) > 1 and words[1] != "VERB":
            if words[1] not in group.commands:
                wrong.append(piece)
                continue
            known = options_of(words[1])
        wrong += [w for w in words if re.match(r"--?[a-z]", w) and w.split("=")[0] not in known]
    return wrong


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as hosts of Markdown make them."""
    heads = re.findall(r"^#+ (.+)$", _BLOCK.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in heads}


def broken_links(text: str, folder: Path) -> list[str]:
    """Links to files of the repository, or to headings, that are not there."""
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _BLOCK.sub("", text)):
        if link.startswith(("http:", "https:")):
            continue
        place, _, anchor = link.partition("#")
        target = folder / place if place else None
        there = target is None or target.exists()
        page = target.read_text("utf-8") if anchor and there and target else text
        if not there or (anchor and anchor not in anchors(page)):
            wrong.append(link)
    return wrong


def wrong_calls(code: str) -> list[str]:
    """`penjing.verb(...)` of verbs or keywords that the package does not have."""
    wrong = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("penjing."):
            continue
        verb = ast.unparse(node.func).removeprefix("penjing.")
        if verb not in penjing.__all__:
            wrong.append(verb)
            continue
        given = {k.arg: None for k in node.keywords if k.arg}
        try:
            inspect.signature(getattr(penjing, verb)).bind(*node.args, **given)
        except TypeError as error:
            wrong.append(f"{verb}: {error}")
    return wrong


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the documents name: a network, its data, weights, an artifact of fit."""
    import torch
    import transformers
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("docs")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=160,
    )  # fmt: skip
    network = folder / "my-model"
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(network)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(59))]
    (network / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(
        str(network / "vocab.txt"), model_max_length=160
    ).save_pretrained(network)  # fmt: skip
    decoder = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=64, max_position_embeddings=160,
    )  # fmt: skip
    transformers.LlamaForCausalLM(decoder).save_pretrained(folder / "my-decoder")
    transformers.BertTokenizer(
        str(network / "vocab.txt"), model_max_length=160
    ).save_pretrained(folder / "my-decoder")  # fmt: skip
    random = np.random.default_rng(0)

    def line(label: int | None) -> str:
        row: dict[str, object] = {"text": " ".join(f"w{i}" for i in random.integers(0, 59, 12))}
        return json.dumps(row if label is None else row | {"label": label})

    (folder / "eval.jsonl").write_text("\n".join(line(i % 2) for i in range(24)))
    (folder / "calibration.jsonl").write_text("\n".join(line(None) for _ in range(16)))
    np.save(folder / "params.npy", random.normal(size=(32, 64)).astype(np.float32))
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    save_file(net.state_dict(), folder / "net.safetensors")
    shutil.copytree(ROOT / "examples", folder / "examples")

    from penjing.recipe import Recipe
    from penjing.steps.cut import Cut
    from penjing.steps.quantize import Quantize

    recipe = Recipe((Cut(layers=1), Quantize(8, embeddings=4, embedding_group=32)))
    edited = penjing.apply(network, recipe, folder / "calibration.jsonl")
    penjing.save(edited, folder / "fitted", to=["onnx"], recipe=recipe)
    return folder


@pytest.fixture
def sandbox(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "work"
    shutil.copytree(prepared, place)
    monkeypatch.chdir(place)
    monkeypatch.setenv("PENJING_CACHE", str(tmp_path / "cache"))
    return place


def run(words: list[str]) -> None:
    """One command of a document, in this process."""
    if "executorch" in words:
        pytest.importorskip("executorch")
        pytest.importorskip("torchao")
    if words[0] == "make":
        rules = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(rules), words
    elif words[0] in SETUP:
        for word in words:
            assert not word.endswith((".txt", ".lock")) or (ROOT / word).exists(), words
    elif words[0] == "python":
        before, sys.argv = sys.argv, words[1:]
        try:
            runpy.run_path(words[1], run_name="__main__")
        finally:
            sys.argv = before
    elif words[0] == "sh":
        script = commands(Path(words[1]).read_text())
        assert len(script) > 1, words
        for inner in script:
            if inner[0] != "set":
                run(inner)
    elif words[0] == "ray":  # there is no cluster here
        cli = pytest.importorskip("ray.scripts.scripts").cli
        cli.commands[words[1]].make_context(words[1], words[2:])
    elif words[0] == "penjing" and (words[1] in ONLY_PARSED or "--ray" in words):
        group.commands[words[1]].make_context(words[1], words[2:])
    else:
        assert words[0] == "penjing", f"no way to check {shlex.join(words)}"
        done = CliRunner().invoke(group, words[1:])
        assert done.exit_code == 0, f"{shlex.join(words)}: {done.stderr}"
        if "-o" in words:
            assert Path(words[words.index("-o") + 1]).exists(), words


@pytest.mark.parametrize("page", TEXTS)
def test_commands_run(page: str, sandbox: Path) -> None:
    for language, content, file in blocks(TEXTS[page]):
        if file is not None:
            if (ROOT / file).exists():
                assert (ROOT / file).read_text("utf-8") == content
            Path(file).write_text(content)
        elif language == "sh":
            for words in commands(content):
                run(words)
        elif language == "python":
            assert not wrong_calls(content)
            if "penjing.fit(" not in content:
                exec(compile(content, page, "exec"), {})
        else:
            assert not language, f"{page}: a block of {language} is not checked"


@pytest.mark.slow
def test_the_fit_of_the_readme(sandbox: Path) -> None:
    text = TEXTS["README.md"]
    [fit] = [w for lang, c, _ in blocks(text) if lang == "sh" for w in commands(c) if w[1] == "fit"]
    output = Path(fit[fit.index("-o") + 1])
    done = CliRunner().invoke(group, [*fit[1:], "--threads", "1", "--overwrite"])
    assert done.exit_code in (0, 3), done.stderr
    met = json.loads((output / "results.json").read_text())["met"]
    assert done.exit_code == (0 if met else 3)


@pytest.mark.parametrize("page", TEXTS)
def test_names_are_there(page: str) -> None:
    assert not wrong_names(TEXTS[page])
    assert not broken_links(TEXTS[page], (ROOT / page).parent)


def test_every_verb_is_in_the_readme() -> None:
    listed = re.findall(r"^\| `penjing ([a-z]+)", TEXTS["README.md"], re.MULTILINE)
    missing = re.findall(r"^- `penjing ([a-z]+)`", TEXTS["README.md"], re.MULTILINE)
    assert sorted([*listed, *missing]) == sorted(group.commands)
    for verb in missing:
        done = CliRunner().invoke(group, [verb])
        assert "not there yet" in done.stderr


def code_words(text: str) -> set[str]:
    return {
        w
        for piece in re.findall(r"`([^`]+)`", _BLOCK.sub("", text))
        for w in re.findall(r"[\w-]+", piece)
    }


@pytest.mark.parametrize("kind", [result.Result, result.Measurement, result.Drop, result.Latency,
                                  result.Point, result.Unit])  # fmt: skip
def test_every_name_of_results_json_is_explained(kind: type) -> None:
    names = {field.name for field in dataclasses.fields(kind)}
    assert not names - code_words(TEXTS["docs/artifact.md"])


def test_every_option_of_a_step_is_explained() -> None:
    from penjing.api import STEPS

    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", TEXTS["docs/steps.md"], re.MULTILINE))
    del rows["do"]  # the heading
    assert set(rows) == set(STEPS)
    for name, step in STEPS.items():
        assert code_words(rows[name]) == {field.name for field in dataclasses.fields(step)}, name


@pytest.mark.parametrize(
    ("family", "page"),
    [("criteria", "docs/steps.md"), ("unitcriteria", "docs/steps.md"),
     ("constraints", "docs/steps.md"),
     ("quantizers", "docs/steps.md"), ("losses", "docs/steps.md"),
     ("features", "docs/transfer.md"), ("tasks", "docs/data.md")],
)  # fmt: skip
def test_every_leaf_is_explained(family: str, page: str) -> None:
    assert not set(choices(family)) - code_words(TEXTS[page])


def test_every_example_is_listed() -> None:
    files = {p.name for p in (ROOT / "examples").iterdir() if p.suffix in (".py", ".sh")}
    assert files == set(re.findall(r"\]\(([\w.]+)\)", TEXTS["examples/README.md"]))


def test_the_checks_catch_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong_names("run `penjing bonsai ./x`") == ["penjing bonsai ./x"]
    assert wrong_names("run `penjing cut ./x --sparsity 0.5`") == ["--sparsity"]
    assert wrong_names("```sh\npenjing tune ./x --device pi\n```\n") == ["--device"]
    assert wrong_names("with `--no-such-option` here") == ["--no-such-option"]
    assert wrong_names("with `--max-drop 1%` and `penjing cut ./x --layers 1`") == []
    assert broken_links("[a](nothing.md) [b](#none)\n# Some\n[c](#some)", tmp_path) == [
        "nothing.md", "#none",
    ]  # fmt: skip
    assert wrong_calls("penjing.bonsai(1)\npenjing.fit(m, d, o, max=2)\npenjing.cut(m, 2)") == [
        "bonsai",
        "fit: got an unexpected keyword argument 'max'",
    ]
    monkeypatch.chdir(tmp_path)
    for command in ("make bonsai", "rm -r x", "penjing inspect ./none"):
        with pytest.raises(AssertionError):
            run(shlex.split(command))
    with pytest.raises(click.UsageError):
        run(["penjing", "fit", "./x", "--max-drop", "1%", "--bonsai"])
    assert commands("a 'b c' \\\n  d  # e\n# f\n") == [["a", "b c", "d"]]
    assert os.getcwd() == str(tmp_path)
