"""Each layer imports only lower ones, and siblings do not import each other."""

import ast
from pathlib import Path

import penjing

ROOT = Path(penjing.__file__).parent

# Lowest first; names on one line are siblings. A package's own files may import each other
# only where the package is listed in TOGETHER.
LAYERS = [
    ["errors"],
    ["units", "registry", "files", "packing", "scheme", "codebooks", "ggufnames",
     "processor", "rotation", "cache", "indices", "together", "silence",
     "profiles"],
    ["scales", "bitmask", "sharding", "workers"],
    ["stored"],
    ["planes", "result"],
    ["sparsecodes"],
    ["recipe"],
    ["model"],
    ["linalg", "grids", "masks", "meter", "statistics", "progress", "histogram", "migration",
     "equalize", "norms", "divergence", "patches", "tensorsets", "labels", "shapes",
     "lagrangian", "gating", "substitutes", "convolutions", "checkpoint", "optimizers",
     "similarity", "strips"],
    ["criteria", "unitcriteria", "pruners", "quantizers", "losses", "features", "observers",
     "neurons", "kernels", "constraints"],
    ["graph", "data", "weightfiles", "packed", "packedlayers"],
    ["rounding", "storededits"],
    ["edits", "batching", "calls", "channels", "residual", "layerstats", "axes",
     "detour", "hiddens"],
    ["meeting", "pausing", "gradients"],
    ["layerrules"],
    ["axisrules", "coupling"],
    ["proof"],
    ["channelmap"],
    ["calibrate", "tasks", "sensitivity", "training", "objective", "front"],
    ["steps", "readers", "writers", "runtimes"],
    ["load"],
    ["inspect", "evaluate", "apply", "export", "weights"],
    ["measure", "learning", "transferring"],
    ["sizing", "verify", "recover"],
    ["given"],
    ["report"],
    ["fit"],
    ["tune"],
    ["structure"],
    ["transfer"],
    ["judging"],
    ["api"],
    ["demo"],
    ["cli"],
    ["__init__"],
    ["__main__"],
]  # fmt: skip
TOGETHER = {"readers", "steps", "fit", "report", "cli", "data", "writers", "runtimes",
            "transferring", "tune", "workers"}  # fmt: skip
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "penjing":
            parts = node.module.split(".")
            found |= {".".join([*parts, alias.name]) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "penjing"}
    return found


def test_layers() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        own = parts[0]
        assert own in RANK, f"{path} has no layer; give it one in {__file__}"
        for name in imports(path):
            place = name.split(".")
            other = place[1] if len(place) > 1 else "__init__"
            other = other if other in RANK else "__init__"
            same = (
                other == own
                and (
                    own in TOGETHER
                    or (len(parts) > 1 and "__init__" in (parts[1], *place[2:3]))
                    # `_name.py` is a private piece that the leaves of its package share.
                    or any(part.startswith("_") for part in place[2:3])
                )
            )
            if RANK[other] >= RANK[own] and not same:
                wrong.append(f"{'/'.join(parts)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_check_catches_an_upward_import(tmp_path: Path) -> None:
    file = tmp_path / "planes.py"
    file.write_text("from penjing.fit import solve\nimport penjing.model\n")
    assert {RANK[n.split(".")[1]] > RANK["planes"] for n in imports(file)} == {True}
