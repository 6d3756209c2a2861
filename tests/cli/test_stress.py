"""``evaluate --stress`` and the short check of every ``convert``: what they print, their JSON and their limit."""

import pytest

import normswap
from normswap.demo import MODEL
from normswap.evaluation.stress import BRIEF, STRESS
from normswap.records.stress import StressRecord
from normswap.reporting.stress_tables import stress_line

from .test_cli import DEMO, IMAGES, one_object, run

STRESSED = ("--stress", "--stress-samples", 8)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("stressed") / "out"
    done = run("convert", "-m", MODEL, *IMAGES, "--calib-samples", 32, "--method", "channel", "-o", out, "-q")
    assert done.exit_code == 0, done.stderr
    return f"local-dir:{out}"


def test_the_record_is_in_the_json_and_the_line_on_stderr(converted):
    done = run("evaluate", "-m", converted, "--against", MODEL, *IMAGES, *STRESSED, "--json")
    assert done.exit_code == 0, done.stderr
    found = one_object(done)
    assert {"stages", "top1", "agreement", "stress"} <= set(found)
    record = StressRecord.from_json(found["stress"])
    assert [row.name for row in record.rows] == [case.label for case in STRESS]
    assert record.clean.n == 8
    assert record.images.startswith("8 of ")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("stress ")]
    assert "largest logit" in line


def test_the_table_is_shown_before_the_stages(converted):
    done = run("evaluate", "-m", converted, "--against", MODEL, *IMAGES, *STRESSED)
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("corrupted images")
    starts = [next(i for i, line in enumerate(lines) if line.startswith(name)) for name in ("clean", "black", "stage")]
    assert starts == sorted(starts)


@pytest.mark.parametrize(("limit", "code"), [(-1000, 4), (1000, 0)])
def test_the_limit_fails_behind_the_result(converted, limit, code):
    labels = ("--no-labels",)
    arguments = ("evaluate", "-m", converted, "--against", MODEL, *IMAGES, *STRESSED, *labels, "--json")
    done = run(*arguments, "--max-stress-drop", limit)
    assert done.exit_code == code, done.stderr
    assert one_object(done)["stress"]["mean_agreement"] is not None
    error = done.stderr.splitlines()[-1]
    assert (f"more than --max-stress-drop {limit}" in error) is (code == 4)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--stress",), "--stress compares two models: name the original with --against."),
        (("--against", MODEL, "--max-stress-drop", 1), "--max-stress-drop requires --stress."),
    ],
)
def test_what_is_missing_is_a_usage_error(arguments, error):
    done = run("evaluate", "-m", MODEL, *IMAGES, *arguments)
    assert done.exit_code == 2
    assert done.stderr.splitlines()[-1] == f"Error: {error}"


@pytest.fixture(scope="module")
def checked_conversion(tmp_path_factory, with_stress):
    """A conversion with its short check on corrupted images."""
    out = tmp_path_factory.mktemp("stress") / "out"
    words = ("convert", *DEMO, "--method", "channel", "--stress-samples", 32, "-o", out)
    done = run(*words, "--save-swapped", out.parent / "swapped", "--json")
    assert done.exit_code == 0, done.stderr
    return out, one_object(done), done.stderr


def test_every_conversion_makes_a_short_check(checked_conversion):
    out, record, said = checked_conversion
    stress = record["stress"]
    assert [row["name"] for row in stress["rows"]] == [case.label for case in BRIEF]
    assert stress["clean"]["n"] == 32
    assert stress["clean"]["top1_original"] > 80
    line = stress_line(StressRecord.from_json(stress))
    assert f"stress     {line}" in said
    assert "seconds" in record
    assert record["seconds"]["stress"] > 0
    assert "## Corrupted images" in (out / "README.md").read_text(encoding="utf-8")
    page = (out / "report.html").read_text(encoding="utf-8")
    assert '<section id="stress">' in page
    assert all(case.label in page for case in BRIEF)
    assert normswap.load_swapped(out.parent / "swapped").report.stress == StressRecord.from_json(stress)


def test_it_can_be_left_out(tmp_path, with_stress):
    result = run("convert", *DEMO, "--method", "channel", "--no-stress", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert one_object(result)["stress"] is None
    assert "stress" not in result.stderr
    assert "Corrupted" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_limit_on_it_is_a_gate(tmp_path, with_stress):
    words = ("convert", *DEMO, "--method", "channel", "--stress-samples", 16, "--max-stress-drop", -200)
    result = run(*words, "-o", tmp_path / "out")
    assert result.exit_code == 4
    assert "more than --max-stress-drop -200: not saved" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    refused = run("convert", *DEMO, "--no-stress", "--max-stress-drop", 3, "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert "--max-stress-drop 3 needs" in refused.stderr
