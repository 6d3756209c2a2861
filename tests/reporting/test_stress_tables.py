"""What people see of corrupted images: line, table, card and heat map say the record's numbers, whatever they are."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normswap.reporting.stress_tables import (
    STRESS_COLUMNS,
    logit_chart,
    stress_chart,
    stress_line,
    stress_markdown,
    stress_rows,
    stress_table,
)
from normswap.reporting.svg_charts import Cell, heat_map
from normswap.tables import render

from ..records.test_stress import any_row, record, row
from .test_svg_charts import MANY, NAMES, check, parsed

WILD = row("fog 4", 50.0, 11.5, largest_logit=98039.4, non_finite_fp16=7, worst_kl=math.inf)


def test_the_line():
    result = record(row("fog 3", 72.4, 70.4), WILD, row("fog 5", 10.0, 0.0))
    assert stress_line(result) == (
        "mean top-1 61.2 -> 41.0 over 2 rows (the original is below 20 % in 1 more), worst row fog 4: 50.0 -> 11.5; "
        "largest logit 10.0 -> 98,039; 7 of 200 images not finite in FP16"
    )
    assert stress_line(record(row())) == (
        "mean top-1 80.0 -> 70.0 over 1 rows, worst row fog 3: 80.0 -> 70.0; largest logit 10.0 -> 10.0"
    )


def test_the_line_without_labels_or_classes_or_anything():
    assert stress_line(record(row(before=None, after=None))).startswith(
        "mean agreement 90.0 % over 1 rows, worst row fog 3: 90.0 %; largest logit"
    )
    headless = row(before=None, after=None, agreement=None, kl=None, worst_kl=None)
    assert stress_line(record(headless)).startswith("a model without classes has no accuracy to lose; largest logit")
    assert stress_line(record(reason="no pixels")) == "not measured: no pixels"


@settings(deadline=None, max_examples=30)
@given(st.lists(any_row(), max_size=4))
def test_a_row_has_every_column_whatever_the_numbers(rows):
    assert all(len(cells) == len(STRESS_COLUMNS) for cells in stress_rows(rows))
    assert stress_line(record(*rows))
    assert len(stress_markdown(record(*rows))) == 8 + len(rows)


def test_the_table():
    lines = render(stress_table(record(WILD))).splitlines()
    assert "original -> converted" in lines[0]
    assert lines[-2].split()[0] == "clean"
    expected = "fog 4 50.0 -> 11.5 90.0 0.10 infinite 10.0 -> 98,039 10.0 -> 10.0 7 of 50"
    assert " ".join(lines[-1].split()) == expected


def test_the_card_shows_the_rows_that_lost_most_in_their_order():
    rows = [row(f"fog {i}", 80.0, 80.0 - (i % 12)) for i in range(14)]
    lines = stress_markdown(record(*rows))
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert names == ["images", "clean", *(f"fog {i}" for i in range(2, 12))]
    assert "the 10 of 14 rows that lost most" in lines[2]
    assert "all rows" in stress_markdown(record(*rows[:3]))[2]
    assert stress_markdown(record(reason="no pixels")) == []


def test_the_heat_map_has_a_cell_per_row_and_a_line_per_kind():
    rows = [row("fog 1", 80, 79.9, strength=1.0), WILD, replace(WILD, corruption="black", family="frames")]
    svg = stress_chart(record(*rows))
    mild, wild, black = check(svg)
    assert [mark.get("class") for mark in (mild, wild, black)] == ["mark heat-0", "mark heat-4", "mark heat-4"]
    assert mild.get("y") == wild.get("y") != black.get("y")
    assert "98,039" in wild.find("title").text
    assert "top-1 50.0 -> 11.5 %" in wild.find("title").text
    texts = [text.text for text in parsed(svg).iter("text")]
    assert texts == ["fog", "\N{MINUS SIGN}0.1", "1", "\N{MINUS SIGN}38.5", "3", "black", "\N{MINUS SIGN}38.5"]
    assert stress_chart(record(reason="no pixels")) is None


@pytest.mark.parametrize(
    ("after", "style"),
    [(83, "gain"), (81, "gain"), (80.5, "0"), (79, "0"), (76, "1"), (72, "2"), (64, "3"), (63, "4"), (0, "4")],
)
def test_the_colour_says_how_much_was_lost(after, style):
    (mark,) = check(stress_chart(record(row(before=80, after=after))))
    assert mark.get("class") == f"mark heat-{style}"


@pytest.mark.parametrize(
    ("before", "after", "text", "style"),
    [
        (10, 11, "x 1.10", "0"),
        (10, 5, "x 0.50", "0"),
        (10, 14, "x 1.40", "1"),
        (10, 29, "x 2.90", "2"),
        (10, 99, "x 9.90", "3"),
        (10, 98000, "x 9,800", "4"),
        (10, math.inf, "x infinite", "4"),
        (math.inf, math.inf, "x infinite", "4"),
        (0, 1, "x infinite", "4"),
    ],
)
def test_logits_that_grew_are_coloured(before, after, text, style):
    svg = logit_chart(record(row(largest_logit_original=before, largest_logit=after)))
    (mark,) = check(svg)
    assert mark.get("class") == f"mark heat-{style}"
    assert text in [shown.text for shown in parsed(svg).iter("text")]
    assert logit_chart(record(reason="no pixels")) is None


def test_a_row_that_does_not_count_is_faint():
    svg = stress_chart(record(row(before=10, after=5), row(before=50, after=45)))
    faint, bold = (t for t in parsed(svg).iter("text") if t.text == "\N{MINUS SIGN}5.0")
    assert (faint.get("class"), bold.get("class")) == ("middle", "value middle")


@MANY
@given(st.lists(st.tuples(NAMES, st.lists(st.tuples(NAMES, NAMES.filter(bool)), max_size=5)), max_size=6))
def test_any_heat_map_lies_inside_its_view_box(rows):
    drawn = [(name, [Cell(text, title, "heat-1") for text, title in cells]) for name, cells in rows]
    assert len(check(heat_map(drawn, "heat"))) == sum(len(cells) for _, cells in rows)


@settings(deadline=None, max_examples=20)
@given(st.lists(any_row(), min_size=1, max_size=6))
def test_every_record_has_a_heat_map(rows):
    assert len(check(stress_chart(record(*rows)))) == len(check(logit_chart(record(*rows)))) == len(rows)
