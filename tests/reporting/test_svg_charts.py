"""The charts: every mark lies inside the view box whatever the numbers, and a value that is none has no mark."""

import math
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normswap.reporting.svg_charts import WIDTH, Bar, Scale, Series, Step, bars, dots, finite, ticks, waterfall

# Anything that a record may hold where a number should be: JSON knows NaN and infinity in Python, and text.
VALUES = st.one_of(st.none(), st.floats(), st.floats(-5, 5), st.integers(), st.just("<script>"))
NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=40)
MANY = settings(deadline=None, max_examples=40)


def parsed(svg):
    """Return the root; whatever was not escaped would not parse, or would add elements."""
    root = ET.fromstring(svg)
    known = {"svg", "title", "desc", "line", "text", "rect", "circle", "polygon"}
    assert {element.tag for element in root.iter()} <= known
    return root


def marks(root):
    return [element for element in root.iter() if "mark" in element.get("class", "").split()]


def points(element):
    """Yield the corners of an element."""

    def at(name):
        return float(element.get(name, "nan"))

    if element.tag == "rect":
        yield at("x"), at("y")
        yield at("x") + at("width"), at("y") + at("height")
    elif element.tag == "circle":
        for sign in (-1, 1):
            yield at("cx") + sign * at("r"), at("cy") + sign * at("r")
    elif element.tag == "polygon":
        for pair in element.get("points").split():
            yield tuple(map(float, pair.split(",")))
    elif element.tag == "line":
        yield at("x1"), at("y1")
        yield at("x2"), at("y2")
    elif element.tag == "text":
        yield at("x"), at("y")


def check(svg):
    """Assert that everything lies inside the view box, and return the marks."""
    root = parsed(svg)
    _, _, width, height = map(float, root.get("viewBox").split())
    assert width == WIDTH
    for element in root.iter():
        for x, y in points(element):
            assert -0.01 <= x <= width + 0.01, ET.tostring(element)
            assert -0.01 <= y <= height + 0.01, ET.tostring(element)
    assert root.get("role") == "img"
    assert root.find("title").text
    assert all(mark.find("title").text for mark in marks(root))
    return marks(root)


def known(values):
    return sum(finite(value) is not None for value in values)


@MANY
@given(st.lists(st.tuples(NAMES, VALUES, st.booleans()), max_size=8))
def test_a_waterfall_has_one_mark_per_measured_step(steps):
    found = check(waterfall([Step(*step) for step in steps], "accuracy"))
    assert len(found) == known(value for _, value, _ in steps)


@MANY
@given(st.lists(st.tuples(NAMES, VALUES, VALUES, VALUES), max_size=12), st.booleans())
def test_dots_have_one_mark_per_value_and_hollow_ones_for_before(rows, fixed):
    names, patch, prefix, before = zip(*rows, strict=True) if rows else ((), (), (), ())
    series = [Series("patches", "patch", patch, before), Series("prefix", "prefix", prefix)]
    found = check(dots(names, series, "fit", Scale(-1, 1, 0, 1) if fixed else None))
    hollow = [mark for mark in found if "before" in mark.get("class").split()]
    assert len(hollow) == sum(
        finite(p) is not None and finite(b) is not None for p, b in zip(patch, before, strict=True)
    )
    assert len(found) - len(hollow) == known(patch) + known(prefix)
    assert sum(mark.get("class").split()[1] == "prefix" for mark in found) == known(prefix)


@MANY
@given(st.lists(st.tuples(NAMES, VALUES, VALUES, VALUES), max_size=8))
def test_bars_have_one_mark_per_value_and_a_whisker_per_spread(rows):
    svg = bars([Bar(*row) for row in rows], "speed", "images/s")
    assert len(check(svg)) == known(value for _, value, *_ in rows)
    spreads = sum(known(row[1:]) == 3 for row in rows)
    assert sum(line.get("class") == "whisker" for line in parsed(svg).iter("line")) == 3 * spreads


@MANY
@given(st.floats(-1e99, 1e99), st.floats(-1e99, 1e99))
def test_ticks_hold_what_they_are_asked_to(a, b):
    low, high = sorted((a, b))
    found = ticks(low, high)
    assert 2 <= len(found) <= 9
    assert all(map(math.isfinite, found))
    assert found == sorted(set(found))
    slack = 1e-6 * max(abs(low), abs(high))
    assert found[0] <= low + slack
    assert found[-1] >= high - slack


@MANY
@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_a_scale_keeps_order_and_ends(low, span, a, b):
    scale = Scale(low, low + span, 10, 90)
    assert (scale(low), scale(low + span)) == (10, pytest.approx(90))
    small, large = sorted((a, b))
    assert 10 <= scale(small) <= scale(large) <= 90
    assert not scale.holds(low - span)
    assert scale.holds(low + span / 2)


def test_the_bars_of_a_waterfall_stand_where_the_numbers_say():
    steps = [Step("original", 80), Step("swapped", 20), Step("calibrated", 70), Step("fused", 70, total=True)]
    first, drop, gain, last = check(waterfall(steps, "top-1"))

    def height(mark):
        return float(mark.get("height"))

    assert height(drop) == pytest.approx(height(first) * 60 / 80, abs=0.02)
    assert height(gain) == pytest.approx(height(first) * 50 / 80, abs=0.02)
    assert float(drop.get("y")) == pytest.approx(float(first.get("y")))
    assert float(gain.get("y")) == pytest.approx(float(last.get("y")))
    assert [mark.get("class") for mark in (first, drop, gain, last)] == [
        f"mark {c}" for c in ("total", "loss", "gain", "total")
    ]
    assert drop.find("title").text == "swapped: 20.00 % (\N{MINUS SIGN}60.00)"


def test_what_lies_beyond_the_axis_is_a_triangle_at_its_edge_and_keeps_its_number():
    svg = dots(["a", "b"], [Series("patches", "patch", [-30.0, 0.5])], "R2", Scale(-1, 1, 0, 1))
    outside, inside = check(svg)
    assert outside.tag == "polygon"
    assert "outside" in outside.get("class").split()
    assert "-30.000" in outside.find("title").text
    assert inside.tag == "circle"


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -float("inf"), "1", True, 10**400, [1]])
def test_what_is_no_number_is_none(value):
    assert finite(value) is None


def test_long_names_are_shortened_and_kept_as_a_title():
    name = "layers.2.blocks.17.attn.proj"
    texts = list(parsed(dots([name], [Series("p", "patch", [1.0])], "R2")).iter("text"))
    (shown,) = [text for text in texts if "mono" in text.get("class").split()]
    assert shown.text.startswith("layers.2")
    assert len(shown.text) < len(name)
    assert shown.find("title").text == name


def test_text_cannot_break_out():
    root = parsed(waterfall([Step("<script>alert(1)</script>", 5), Step('"onload="x', 7)], "<b>&"))
    assert root.find("title").text == "<b>&"
    assert all(not key.startswith("on") for element in root.iter() for key in element.keys())  # noqa: SIM118
