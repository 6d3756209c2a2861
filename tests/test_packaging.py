"""The wheel holds the package, the command line under its installed name, the demo's data, and nothing else."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import normswap

ROOT = Path(__file__).resolve().parents[1]


def tracked():
    """Return the files that git knows, or would know after ``git add .``."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(name for name in listed.split("\0") if name and (ROOT / name).is_file())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tree, so that no build folder or egg-info is left in it, or taken from it."""
    folder = tmp_path_factory.mktemp("packaging")
    for name in tracked():
        (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "tree" / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", folder / "tree"]
    done = subprocess.run([str(argument) for argument in command], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (path,) = (folder / "dist").iterdir()
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    info = f"normswap-{normswap.__version__}.dist-info"
    expected = {f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt")}
    expected |= {f"{info}/licenses/LICENSE"}
    for name in tracked():
        top, _, rest = name.partition("/")
        if top in ("normswap", "cli"):
            expected.add(f"normswap_cli/{rest}" if top == "cli" else name)
    demo = {f"normswap/demo/{name}" for name in ("config.json", "model.safetensors", "train.tar", "validation.tar")}
    assert expected > demo | {"normswap/py.typed", "normswap/__init__.py", "normswap_cli/main.py"}
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(archive.namelist()) == sorted(expected)
        assert archive.read(f"{info}/top_level.txt").split() == [b"normswap", b"normswap_cli"]
        for name in demo:
            assert archive.read(name) == (ROOT / name).read_bytes()


def test_the_metadata(wheel):
    info = f"normswap-{normswap.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert wheel.name == f"normswap-{normswap.__version__}-py3-none-any.whl"
    assert metadata["Name"] == "normswap"
    assert metadata["Version"] == normswap.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload().startswith("# normswap")  # README.md, for the package index
    assert entry_points.split("\n")[:2] == ["[console_scripts]", "normswap = normswap_cli.main:cli"]


def test_the_wheel_runs(wheel, tmp_path):
    """The command line answers from the wheel alone, from its own files and with its own version."""
    script = (
        "import sys, importlib.metadata as m; sys.path.insert(0, sys.argv.pop(1)); sys.argv[0] = 'normswap'; "
        "from normswap_cli.main import cli; import normswap_cli; assert '.whl' in normswap_cli.__file__; cli()"
    )
    command = [sys.executable, "-c", script, wheel, "--version"]
    done = subprocess.run([str(argument) for argument in command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"normswap, version {normswap.__version__}\n"


def test_the_source_folder_of_the_command_line_is_no_module():
    """From the root of the repository ``import cli`` finds the folder, and says which name it goes by."""
    done = subprocess.run([sys.executable, "-c", "import cli"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "ImportError: import normswap_cli: cli/ is installed under that name"
