"""The record of corrupted images: JSON and back, which rows count, and what they come to."""

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normswap.records.json_types import plain
from normswap.records.stress import StressRecord, StressRow

SIZES = st.one_of(st.floats(0, 1e9), st.just(math.inf))
PERCENT = st.floats(0, 100)


def row(name: str = "fog 3", before: float | None = 80.0, after: float | None = 70.0, **changes) -> StressRow:
    """Return one row with plain numbers."""
    values = dict.fromkeys(
        ("largest_logit_original", "largest_logit", "largest_activation_original", "largest_activation"), 10.0
    )
    values |= {"corruption": "fog", "family": "noise", "strength": 3.0, "n": 50, "agreement": 90.0, "n_fp16": 50}
    values |= {"kl": 0.1, "worst_kl": 2.0, "cosine": 0.9}
    return StressRow(**{**values, "name": name, "top1_original": before, "top1": after, **changes})


def record(*rows: StressRow, reason: str = "") -> StressRecord:
    return StressRecord("50 images", 3, None if reason else row("clean", family="clean"), list(rows), reason)


@st.composite
def any_row(draw):
    labelled, classes = draw(st.booleans()), draw(st.booleans())
    top1 = (draw(PERCENT), draw(PERCENT)) if labelled and classes else (None, None)
    sizes = ("largest_logit_original", "largest_logit", "largest_activation_original", "largest_activation")
    divergences = {name: draw(SIZES) if classes else None for name in ("kl", "worst_kl")}
    return row(
        draw(st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=5)),
        *top1,
        family=draw(st.sampled_from(["noise", "frames"])),
        agreement=draw(PERCENT) if classes else None,
        cosine=draw(st.one_of(st.none(), st.floats(-1, 1))),
        non_finite_fp16=draw(st.integers(0, 50)),
        **divergences,
        **{name: draw(SIZES) for name in sizes},
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(any_row(), max_size=4), st.booleans())
def test_json_and_back(rows, measured):
    before = record(*rows) if measured else record(reason="no pixels")
    text = json.dumps(before.to_json(), allow_nan=False)
    assert plain(before.to_json()) == before.to_json()
    assert StressRecord.from_json(json.loads(text)) == before


def test_keys_of_later_versions_are_left_out():
    written = record(row()).to_json()
    written["rows"][0]["later"] = written["later"] = 1
    assert StressRecord.from_json(written) == record(row())


def test_rows_on_which_the_original_is_hardly_right_do_not_count():
    rows = [row("a", 80, 70), row("b", 20, 0), row("c", 19.9, 0), row("d", 60, 62)]
    result = record(*rows)
    assert [r.name for r in result.counted] == ["a", "b", "d"]
    assert result.mean_top1 == (pytest.approx(160 / 3), pytest.approx(44))
    assert result.drop == pytest.approx(28 / 3)
    assert result.worst == rows[1]
    assert result.to_json()["rows_counted"] == 3
    assert result.to_json()["worst"] == "b"


def test_without_labels_agreement_counts_and_frames_do_not():
    rows = [row("a", None, None, agreement=90.0), row("b", None, None, agreement=60.0)]
    black = row("black", None, None, agreement=0.0, family="frames")
    result = record(*rows, black)
    assert result.counted == rows
    assert (result.mean_top1, result.mean_agreement, result.drop) == (None, 75, 25)
    assert result.worst == rows[1]
    assert "agreement falls by 25.00 points" in result.problem(24.9)


def test_the_limit():
    result = record(row("a", 80, 70), row("b", 60, 55))
    assert result.problem(7.5) is None
    assert result.problem(7.4) == (
        "top-1 falls by 7.50 points (the mean over 2 rows of corrupted images), more than `max_stress_drop` 7.4"
    )
    assert record(row("a", 70, 80)).problem(-5) is None


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (record(row("a", 10, 10)), "the original is right on 20 % of the images in none of 1 rows"),
        (record(row("a", None, None, agreement=None)), "a model without classes has no accuracy to lose"),
        (record(reason="no pixels"), "no pixels"),
    ],
)
def test_a_limit_that_cannot_be_checked_does_not_hold(result, why):
    assert (result.drop, result.worst) == (None, None)
    assert result.problem(100) == f"`max_stress_drop` 100 cannot be checked: {why}"


def test_the_loss_of_a_row():
    assert row(before=80, after=70).loss == 10
    assert row(before=None, after=None).loss == 10  # agreement 90
    assert replace(row(before=None, after=None), agreement=None).loss is None
