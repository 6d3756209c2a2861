"""What strangers bring as images: every command says in one line what it took, left, or cannot tell."""

import tarfile
from pathlib import Path

import pytest
from PIL import Image

from normswap.demo import FOLDER, MODEL

from .test_cli import one_object, run

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
FAST = ("-j", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """The validation images in folders called as the model calls its classes, with two files that are no images."""
    root, packed = (tmp_path_factory.mktemp(name) for name in ("named", "packed"))
    with tarfile.open(FOLDER / "validation.tar") as tar:
        tar.extractall(packed, filter="data")
    for path in packed.rglob("*.png"):
        target = root / NAMES[int(path.parent.name)] / path.name
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    (root / "notes.txt").write_text("x")
    (root / "zero" / "a.heic").write_bytes(b"x")
    return root


def test_labels_by_name_and_files_left_are_said(named):
    result = run("evaluate", "-m", MODEL, "--data-dir", named, *FAST, "--json")
    assert result.exit_code == 0, result.stderr
    plain = one_object(run("evaluate", "-m", MODEL, "--data-dir", FOLDER / "validation.tar", *FAST, "--json"))
    assert one_object(result)["top1"] == plain["top1"] > 90
    assert "its classes lie in another order than the model's" in result.stderr
    assert "360 .png read; not read: 1 .heic, 1 .txt" in result.stderr


def test_a_budget_holds_on_labels_by_name(named, tmp_path):
    options = ("--max-drop", 100, "--max-keep", 0, "--method", "channel", "--calib-samples", 40)
    result = run("convert", "-m", MODEL, "--data-dir", named, *FAST, *options, "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    assert record["before"]["top1"] > 90
    assert record["overlap"] == 40
    assert record["evaluation_data"].endswith("(40 of them also used for calibration or training)")
    assert result.stderr.count("go by name") == result.stderr.count("360 .png read") == 1


def test_overlap_of_two_splits_is_said_before_the_work(named, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(named)
    result = run("convert", "-m", MODEL, "--data-dir", tmp_path, *FAST, "--calib-samples", 40, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "40 of the 360 evaluation images are also used for calibration or training" in result.stderr


@pytest.mark.parametrize("command", ["convert", "evaluate"])
def test_what_cannot_be_told_is_asked_for_by_flag(tmp_path, command):
    for split in ("part_a", "part_b"):
        for c in range(10):
            (tmp_path / split / str(c)).mkdir(parents=True)
            Image.new("L", (8, 8)).save(tmp_path / split / str(c) / "a.png")
    dry = ("--dry-run",) if command == "convert" else ()
    result = run(command, "-m", MODEL, "--data-dir", tmp_path, *FAST, *dry)
    assert result.exit_code == 2
    assert "There are part_a, part_b: name one as --" in result.stderr
    told = ("--split", "part_b", *(("--train-split", "part_a") if dry else ()))
    result = run(command, "-m", MODEL, "--data-dir", tmp_path, *FAST, *dry, *told)
    assert result.exit_code == 0, result.stderr
    assert "10 images of" in result.stderr


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_archives_are_refused_in_one_line(tmp_path, name):
    path: Path = tmp_path / name
    path.write_bytes(b"x")
    result = run("evaluate", "-m", MODEL, "--data-dir", path, *FAST)
    assert result.exit_code == 1
    assert f"{path}: {name[1:]} is not taken; a folder or an uncompressed .tar is taken: unpack it" in result.stderr
