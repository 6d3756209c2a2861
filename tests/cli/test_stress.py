"""``evaluate --stress``: what it prints, its JSON, its limit, and what it asks for."""

import pytest

from normswap.demo import MODEL
from normswap.evaluation.stress import STRESS
from normswap.records.stress import StressRecord

from .test_cli import IMAGES, one_object, run

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
