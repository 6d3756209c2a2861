"""The road: each module imports only from its left, and stays short."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The order in which the data flows.
ROAD = (
    "errors",
    "atomic",
    "state",
    "provenance",
    "worst",
    "trade",
    "report",
    "summary",
    "norm",
    "graph",
    "trace",
    "weights",
    "verdict",
    "plan",
    "checkpoint",
    "stream",
    "data",
    "swap",
    "distributed",
    "moments",
    "estimate",
    "gram",
    "spill",
    "lockstep",
    "route",
    "refine",
    "reconstruct",
    "calibrate",
    "distil",
    "fade",
    "recipe",
    "augment",
    "training",
    "finetune",
    "fold",
    "evaluate",
    "rank",
    "budget",
    "charts",
    "speedbars",
    "page",
    "card",
    "save",
    "swapped",
    "push",
    "timing",
    "throughput",
    "variants",
    "engines",
    "benchmark",
    "inventory",
    "onnxfile",
    "fp16",
    "int8",
    "export",
    "trials",
    "pipeline",
    "continuation",
    "demo",
)


def _file(module: str) -> Path:
    path = ROOT / "normswap" / f"{module}.py"
    return path if path.exists() else path.with_suffix("") / "__init__.py"


def _imported(source: str) -> Iterator[str]:
    """Yield the names of normswap's own modules that the source imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "normswap" if node.level else node.module or ""
            base += f".{node.module}" if node.level and node.module else ""
            names = [base] if "." in base else [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (n.split(".")[1] for n in names if n.startswith("normswap.") and n.split(".")[1] in ROAD)


def test_every_module_has_its_place():
    names = {p.stem for p in (ROOT / "normswap").glob("*.py")} | {
        p.parent.name for p in ROOT.glob("normswap/*/__init__.py")
    }
    assert names - {"__init__"} == set(ROAD)


@pytest.mark.parametrize("module", ROAD)
def test_imports_look_back_only(module):
    ahead = [m for m in _imported(_file(module).read_text()) if ROAD.index(m) >= ROAD.index(module)]
    assert not ahead, f"normswap/{module}.py imports {ahead}, which come after it"


@pytest.mark.parametrize(
    "line",
    [
        "from .fold import x",
        "from . import fold",
        "from normswap.fold import x",
        "from normswap import fold",
        "import normswap.fold",
        "def f():\n    import normswap.fold as f",
    ],
)
def test_every_spelling_of_an_import_is_seen(line):
    assert list(_imported(line)) == ["fold"]


def test_the_library_knows_nothing_of_the_command_line():
    for path in ROOT.glob("normswap/**/*.py"):
        text = path.read_text()
        assert "import click" not in text, path
        assert "normswap_cli" not in text, path


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("normswap/**/*.py"), *ROOT.glob("cli/*.py"), *ROOT.glob("tests/*.py")])
)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) < 400
