"""``normswap report``, and what ``convert`` says of report.html."""

import json

import pytest

from normswap.demo import FOLDER, MODEL

from ..reporting.page import benchmark
from .test_cli import one_object, run

CONVERT = ("convert", "-m", MODEL, "--data-dir", FOLDER, "--eval-samples", 16, "--calib-samples", 16, "-j", 0)
FAST = ("--method", "channel", "--device", "cpu")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "out"
    result = run(*CONVERT, *FAST, "-o", out, "--worst-images", 2)
    assert result.exit_code == 0, result.stderr
    return out, result


def test_convert_writes_it_and_shows_the_same_in_short(converted):
    out, result = converted
    assert "README.md, report.html" in result.stderr
    assert "R2 of the norms: median" in result.stderr
    record = json.loads((out / "normswap.json").read_text())
    assert len(record["thumbnails"]) == 2
    assert "the images that changed most" in result.stdout
    assert record["report"]["worst"][0]["name"] in result.stdout
    assert record["report"]["worst"][0]["name"] in (out / "report.html").read_text()
    assert {"created", "device", "platform", "threads"} <= record["made"].keys()


def test_the_record_is_enough_to_make_it_again(converted):
    out, _ = converted
    before = (out / "report.html").read_text()
    (out / "report.html").unlink()
    record = one_object(run("report", out, "--json", "-q"))
    assert record == {"report": str(out / "report.html"), "bytes": len(before.encode()), "benchmark": None}
    assert (out / "report.html").read_text() == before


def test_a_benchmark_comes_in_by_name_or_lies_in_the_folder(converted, tmp_path):
    out, _ = converted
    (tmp_path / "speed.json").write_text(json.dumps(benchmark()))
    result = run("report", out, "--benchmark", tmp_path / "speed.json")
    assert result.exit_code == 0
    assert result.stdout == f"{out / 'report.html'}\n"
    with_speed = (out / "report.html").read_text()
    assert "eager, batch 64" in with_speed
    run("report", out)
    assert "Not measured" in (out / "report.html").read_text()
    (out / "benchmark.json").write_text(json.dumps(benchmark()))
    assert one_object(run("report", out, "--json"))["benchmark"] == str(out / "benchmark.json")
    assert (out / "report.html").read_text() == with_speed
    (out / "benchmark.json").unlink()


@pytest.mark.parametrize(
    ("files", "code", "said"),
    [
        ({}, 2, "no normswap.json in it, so normswap did not write this folder"),
        ({"normswap.json": "{"}, 1, "normswap.json: cannot be read (JSONDecodeError"),
        ({"normswap.json": "[]"}, 1, "normswap.json: cannot be read (TypeError"),
        ({"normswap.json": '{"format": 9}'}, 1, "format 9; this normswap reads formats 1 and 2"),
        ({"normswap.json": '{"format": 1}'}, 1, "normswap.json: no page can be made of it (KeyError: 'report')"),
    ],
)
def test_a_folder_that_is_none(tmp_path, files, code, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    result = run("report", tmp_path, "-q")
    assert result.exit_code == code
    (line,) = result.stderr.splitlines()
    assert said in line
    assert {path.name for path in tmp_path.iterdir()} == set(files)


def test_a_page_that_cannot_be_written_leaves_the_old_one(converted):
    out, _ = converted
    (out / "report.html").rename(out / "kept")
    (out / "report.html").mkdir()
    try:
        result = run("report", out, "-q")
        assert result.exit_code == 2
        assert "report.html: is not a file" in result.stderr
        assert not list(out.glob(".report*"))
    finally:
        (out / "report.html").rmdir()
        (out / "kept").rename(out / "report.html")


def test_without_the_extra_it_is_said_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("normswap.reporting.html_report.can_render", lambda: False)
    monkeypatch.setattr("normswap.outputs.save.can_render", lambda: False)
    result = run(*CONVERT, *FAST, "-o", tmp_path / "out")
    assert result.exit_code == 0
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("report")]
    assert "pip install 'normswap[report]'" in line
    assert not (tmp_path / "out" / "report.html").exists()
    for arguments in ((*CONVERT, *FAST, "-o", tmp_path / "other", "--report"), ("report", tmp_path / "out")):
        result = run(*arguments, "-q")
        assert result.exit_code == 1
        assert result.stderr == 'Error: report.html needs jinja2: pip install "normswap[report]"\n'
    assert not (tmp_path / "other").exists()


def test_no_report_writes_none(tmp_path):
    result = run(*CONVERT, *FAST, "-o", tmp_path / "out", "--no-report", "--worst-images", 0)
    assert result.exit_code == 0
    assert not (tmp_path / "out" / "report.html").exists()
    assert "normswap[report]" not in result.stderr
    assert json.loads((tmp_path / "out" / "normswap.json").read_text())["thumbnails"] == []
