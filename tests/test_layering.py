"""The road: packages import only from packages to their left, files inside one only from files to their left."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "normswap"
# The order in which the data flows. A file at the top has no files inside; a package lists its own, in order.
ROAD: dict[str, tuple[str, ...]] = {
    "errors": (),
    "progress": (),
    "tables": (),
    "distributed": (),
    "atomic": (),
    "ambient": (),
    "layers": (),
    "model_utils": (),
    "module_state": (),
    "records": ("json_types", "provenance", "worst_images", "budget", "stress", "report"),
    "inputs": (
        "ranges",
        "forms",
        "batches",
        "shards",
        "checkpoint",
        "image_files",
        "labels",
        "splits",
        "stream",
        "dataset",
        "overlap",
        "normalisation",
    ),
    "planning": ("options", "graph", "channels", "operands", "foldability", "ffn", "plan"),
    "surgery": ("swap", "fold"),
    "evaluation": ("worst_images", "evaluate", "corruptions", "stress"),
    "calibration": (
        "options",
        "moments",
        "estimators",
        "ridge",
        "activation_store",
        "lockstep",
        "solvable_layers",
        "attention_refinement",
        "reconstruction",
        "bounds",
        "views",
        "calibrate",
    ),
    "finetuning": (
        "options",
        "norm_blending",
        "augment",
        "losses",
        "holdout",
        "batch_norm_statistics",
        "run_state",
        "trainer",
        "finetune",
    ),
    "search": ("budget", "sensitivity", "trials"),
    "reporting": (
        "conversion_tables",
        "budget_tables",
        "svg_charts",
        "stress_tables",
        "model_card",
        "benchmark_charts",
        "html_report",
    ),
    "outputs": ("options", "rebuild", "bounds_file", "save", "swapped_checkpoint", "hub"),
    "exporting": ("options", "layernorm_search", "onnx_file", "fp16", "int8", "export"),
    "benchmarking": ("options", "timing", "results", "variants", "engines", "benchmark"),
    "pipeline": (
        "open_model",
        "options",
        "conversion",
        "checks",
        "first_look",
        "stress_check",
        "resumption",
        "work",
        "steps",
        "convert",
        "from_swapped",
    ),
    "demo": (),
}
ORDER = [(room, "") if not files else (room, file) for room, files in ROAD.items() for file in files or ("",)]


def _path(room: str, file: str) -> Path:
    if file:
        return LIBRARY / room / f"{file}.py"
    path = LIBRARY / f"{room}.py"
    return path if path.exists() else LIBRARY / room / "__init__.py"


def _place(names: list[str]) -> tuple[str, str] | None:
    """Return the room and file of a dotted name below normswap, None for what is not the library's own."""
    if not names or names[0] not in ROAD:
        return None
    return names[0], names[1] if len(names) > 1 and names[1] in ROAD[names[0]] else ""


def _imported(source: str, package: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Yield room and file of everything of normswap that the source imports, wherever in it.

    Args:
        source: text of a file.
        package: the packages below normswap in which it lies, for relative imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            dotted = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ["normswap", *package][: len(package) + 2 - node.level] if node.level else []
            base = [*base, *(node.module or "").split(".")] if node.module else base
            dotted = [[*base, alias.name] for alias in node.names]
        else:
            continue
        places = (_place(names[1:]) for names in dotted if names[0] == "normswap")
        yield from (place for place in places if place is not None)


def test_every_file_has_its_place():
    there = {path.relative_to(LIBRARY).with_suffix("").parts for path in LIBRARY.rglob("*.py")}
    files = {parts for parts in there if parts[-1] != "__init__"}
    packages = {parts[0] for parts in there if len(parts) > 1}
    assert files == {
        (room, file) if file else (room,) for room, file in ORDER if not _path(room, file).match("__init__.py")
    }
    assert packages == {room for room in ROAD if (LIBRARY / room).is_dir()}


@pytest.mark.parametrize(("room", "file"), ORDER)
def test_imports_look_back_only(room, file):
    here = ORDER.index((room, file))
    package = (room,) if file else ()
    found = set(_imported(_path(room, file).read_text(), package))
    ahead = [place for place in found if ORDER.index(place) >= here]
    assert not ahead, f"normswap/{room}/{file} imports {ahead}, which come after it"


@pytest.mark.parametrize("package", [room for room, files in ROAD.items() if files])
def test_a_package_says_what_it_does_and_what_it_never_does(package):
    tree = ast.parse((LIBRARY / package / "__init__.py").read_text())
    text = ast.get_docstring(tree)
    assert len(tree.body) == 1, "it holds nothing else, so that importing one file imports no other"
    assert text is not None
    assert " never " in text


@pytest.mark.parametrize(
    "line",
    [
        "from .fold import x",
        "from . import fold",
        "from ..surgery.fold import x",
        "from ..surgery import fold",
        "from normswap.surgery.fold import x",
        "from normswap.surgery import fold",
        "import normswap.surgery.fold",
        "def f():\n    import normswap.surgery.fold as f",
    ],
)
def test_every_spelling_of_an_import_is_seen(line):
    assert list(_imported(line, ("surgery",))) == [("surgery", "fold")]


def test_what_the_command_line_reads_imports_no_torch():
    names = [f"{room}.options" for room, files in ROAD.items() if "options" in files]
    assert len(names) > 5
    lines = [f"import normswap.{name}" for name in [*names, "search.budget", "records.report"]]
    code = "; ".join(["import sys", *lines, "assert 'torch' not in sys.modules and 'timm' not in sys.modules"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_library_knows_nothing_of_the_command_line():
    for path in LIBRARY.rglob("*.py"):
        text = path.read_text()
        assert "import click" not in text, path
        assert "normswap_cli" not in text, path


@pytest.mark.parametrize(
    "path",
    sorted([*LIBRARY.rglob("*.py"), *ROOT.glob("cli/*.py"), *ROOT.glob("tests/**/*.py")]),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) < 400


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each function's name and its lines of code: without signature, docstring, comments and blank lines."""
    source = path.read_text()
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            start = node.body[0].end_lineno if ast.get_docstring(node) is not None else node.body[0].lineno - 1
            code = [line.strip() for line in lines[start : node.end_lineno]]
            yield node.name, sum(bool(line) and not line.startswith("#") for line in code)


@pytest.mark.parametrize("folder", ["normswap", "cli", "benchmarks", "examples"])
def test_functions_fit_a_screen(folder):
    """Their complexity is held by ruff (C901)."""
    found = [(path, *function) for path in (ROOT / folder).rglob("*.py") for function in _functions(path)]
    assert found
    assert [entry for entry in found if entry[2] > 60] == []


def test_convert_takes_few_arguments():
    (convert,) = [
        node
        for node in ast.parse((LIBRARY / "pipeline" / "convert.py").read_text()).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(convert.args.args) + len(convert.args.kwonlyargs) <= 10
