"""Names in any script: files are UTF-8 wherever they are written, and no terminal ends a run that has finished."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import normswap
from normswap.atomic import write_text
from normswap.demo import FOLDER

from ..child import ONE_THREAD

NAMES = ["ноль", "один", "два", "три", "четыре", "пять", "шесть", "семь", "восемь", "девять"]
# A system that knows ASCII and nothing else; Python's own ways out of it are off.
ASCII = {**ONE_THREAD, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
FLAGS = ("-j", "0", "--device", "cpu")


# Runs one command after the other; all but the last must succeed.
SCRIPT = """
import sys
from itertools import groupby
from normswap_cli.main import cli
*first, last = [list(words) for between, words in groupby(sys.argv[1:], "then".__eq__) if not between]
for arguments in first:
    assert not cli(arguments, "normswap", standalone_mode=False), arguments
cli(last, "normswap")
"""


def run(environment: dict[str, str], *commands: tuple) -> subprocess.CompletedProcess:
    """Run commands in one new process, as most of the time goes into its start."""
    words = [str(word) for command in commands for word in ("then", *command)]
    return subprocess.run([sys.executable, "-c", SCRIPT, *words], env=environment, capture_output=True, check=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    """Return images in folders with Cyrillic names, and the demo model with the same names as labels."""
    folder = tmp_path_factory.mktemp("digits")
    with tarfile.open(FOLDER / "train.tar") as tar:
        members = sorted((m for m in tar.getmembers() if m.name.endswith(".png")), key=lambda m: m.name)
        for digit, name in enumerate(NAMES):
            (folder / "images" / name).mkdir(parents=True)
            for number, member in enumerate([m for m in members if m.name.split("/")[-2] == str(digit)][:4]):
                (folder / "images" / name / f"картинка {number}.png").write_bytes(tar.extractfile(member).read())
    (folder / "model").mkdir()
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    config["label_names"] = NAMES
    (folder / "model/config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    (folder / "model/model.safetensors").write_bytes((FOLDER / "model.safetensors").read_bytes())
    return folder / "images", folder / "model"


@pytest.mark.parametrize("with_labels", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_conversion_where_only_ascii_is_known(data, tmp_path, with_labels):
    images, model = data
    out = tmp_path / "вывод"
    flags = ("--data-dir", images, *FLAGS, *(() if with_labels else ("--no-labels",)))
    method = ("--method", "moments", "--no-stress", "--save-swapped", tmp_path / "swapped")
    commands = [("convert", "-m", f"local-dir:{model}", *flags, "-o", out, *method)]
    if with_labels:  # else they would never see a label
        commands += [("report", out), ("push", out, "user/digits", "--dry-run")]
        commands += [("fuse", "-m", tmp_path / "swapped", "-o", tmp_path / "fused")]
    done = run(ASCII, *commands)
    assert done.returncode == 0, done.stderr
    done.stdout.decode("ascii")
    done.stderr.decode("ascii")
    # Every text file is UTF-8, whole, and has the names as they are written.
    texts = {path.name: path.read_text(encoding="utf-8") for path in out.iterdir() if path.suffix != ".safetensors"}
    assert {"README.md", "config.json", "normswap.json", "report.html"} <= set(texts)
    assert "картинка" in texts["normswap.json"]
    assert "картинка" in texts["README.md"]
    for name in ("normswap.json", "README.md", "report.html"):
        assert re.search("|".join(NAMES), texts[name]), name
    assert not any("\ufffd" in text or re.search("[\ud800-\udfff]", text) for text in texts.values())
    assert json.loads(texts["config.json"])["label_names"] == NAMES
    normswap.load(out)


def test_other_code_pages(data, tmp_path):
    """What Windows has by default knows more letters, but not these."""
    images, model = data
    environment = {**ONE_THREAD, "PYTHONIOENCODING": "cp1252"}
    command = ("evaluate", "-m", f"local-dir:{model}", "--data-dir", images, *FLAGS)
    done = run(environment, command, ("inspect", "-m", f"local-dir:{tmp_path / 'нет'}"))
    assert done.returncode == 2, done.stderr
    assert b"\\u043d\\u0435\\u0442" in done.stderr


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("девять\r\n", "девять\r\n"),
        (os.fsdecode("девять".encode()), "девять"),
        ("девять".encode().decode("ascii", "surrogateescape"), "девять"),
        (b"caf\xe9".decode("ascii", "surrogateescape"), "caf\ufffd"),
        ("half \ud83d of it", "half \ufffd of it"),
    ],
)
def test_written_text_is_utf8_whatever_is_in_it(tmp_path, text, written):
    write_text(tmp_path / "file", text)
    assert (tmp_path / "file").read_bytes() == written.encode()


@pytest.mark.parametrize("folder", ["normswap", "cli"])
def test_every_text_file_is_opened_with_its_encoding(folder):
    root = Path(__file__).resolve().parents[2] / folder
    found = [
        f"{path.name}: {line.strip()}"
        for path in root.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\.(read_text|write_text)\(|(?<![\w.])open\(", line) and "encoding" not in line
    ]
    assert not found
