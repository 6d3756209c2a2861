"""Charts as inline SVG, without script: every mark carries its numbers as a title, and a value that is none, none.

Colours are classes, so that the page's style sheet sets them for light, dark and print. Text is escaped by the XML
writer of the standard library. Widths are those of a phone; a wider page scales them up a little.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

WIDTH = 420.0
_LABELS = 148.0  # of them for the names of rows
_LABEL_LETTERS = 21
_RIGHT = 14.0
_HUGE = 1e100  # what is larger cannot be told from infinity in a picture
_SIZE = 3.6  # of a mark: radius of a dot, half the diagonal of a diamond


class Svg(str):
    """SVG text that a template may insert as it is."""

    __slots__ = ()

    def __html__(self) -> str:
        return self


@dataclass(frozen=True)
class Step:
    """One bar of a waterfall.

    Attributes:
        name: under the bar.
        value: where it ends, in the chart's unit; None if it was not measured.
        total: whether the bar stands on zero instead of on the bar before.
    """

    name: str
    value: float | None
    total: bool = False


@dataclass(frozen=True)
class Series:
    """One value per row of a dot chart.

    Attributes:
        name: of the series, also as a word for screen readers.
        style: class of its marks; "prefix" draws diamonds, everything else dots.
        values: one per row, None where there is none.
        before: what it was before, drawn hollow; empty, or one per row.
    """

    name: str
    style: str
    values: Sequence[float | None]
    before: Sequence[float | None] = ()


@dataclass(frozen=True)
class Bar:
    """One bar of a bar chart.

    Attributes:
        name: above the bar.
        value: its length; None if it was not measured.
        low, high: ends of its whisker.
        style: class of the bar.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    style: str = "total"


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map.

    Attributes:
        text: in the cell.
        title: all its numbers.
        style: class of the cell, which gives its colour.
        faint: whether its number says little, so that it is not bold.
    """

    text: str
    title: str
    style: str
    faint: bool = False


@dataclass(frozen=True)
class Scale:
    """A straight map from values to pixels; what lies outside the values is drawn at their edge."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def holds(self, value: float) -> bool:
        slack = 1e-9 * (self.high - self.low)
        return self.low - slack <= value <= self.high + slack


def finite(value: object) -> float | None:
    """Return a number as it is, and None for anything that is none: NaN, infinity or almost so, text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < _HUGE else None


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers from ``low`` or just below to ``high`` or just above, about ``most`` of them.

    Both are `finite`; where they hardly differ, the numbers reach beyond.
    """
    span = high - low
    if span < 1e-9 * max(abs(low), abs(high), 1e-90):
        low, high = low - 0.5 * max(abs(low), 1.0), high + 0.5 * max(abs(high), 1.0)
        span = high - low
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next((m * power for m in (1, 2, 5, 10, 20, 50) if span / (m * power) <= most), 100 * power)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def waterfall(steps: Sequence[Step], title: str, unit: str = "%") -> Svg:
    """Draw what each step took or gave, on a scale from 0 to 100.

    Args:
        steps: in order; the first one and those marked so stand on zero.
        title: what is drawn, for screen readers.
        unit: of the values.
    """
    height, left, right, top, bottom = 236.0, 34.0, 6.0, 20.0, 34.0
    svg = _svg(height, title, "; ".join(f"{s.name} {_text(s.value)} {unit}" for s in steps))
    y = Scale(0.0, 100.0, height - bottom, top)
    for tick in (0, 25, 50, 75, 100):
        _line(svg, left, y(tick), WIDTH - right, y(tick), "grid")
        _words(svg, left - 5, y(tick) + 4, str(tick), "tick end")
    slot = (WIDTH - left - right) / max(len(steps), 1)
    thick = min(0.62 * slot, 62.0)
    before: float | None = None
    for i, step in enumerate(steps):
        centre, value = left + (i + 0.5) * slot, finite(step.value)
        _words(svg, centre, height - bottom + 17, _short(step.name, max(4, int(slot / 6.6))), "name middle", step.name)
        if value is None:
            _words(svg, centre, y(0) - 5, "not measured", "value middle")
            continue
        stands = step.total or before is None
        base = 0.0 if stands or before is None else before
        style = "total" if stands else "gain" if value >= base else "loss"
        ends = sorted((y(base), y(value)))
        length = max(ends[1] - ends[0], 1.5)
        at = min(ends[0], height - bottom - length)
        text = f"{value:.2f}" if stands else f"{value - base:+.2f}".replace("-", "\N{MINUS SIGN}")
        mark = _mark(svg, "rect", style, f"{step.name}: {value:.2f} {unit}" + ("" if stands else f" ({text})"))
        _set(mark, x=centre - thick / 2, y=at, width=thick, height=length, rx=1.5)
        _words(svg, centre, at - 5, text, "value middle")
        if i + 1 < len(steps):
            _line(svg, centre + thick / 2, y(value), min(centre + slot - thick / 2, WIDTH), y(value), "join")
        before = value
    return _done(svg)


def dots(
    rows: Sequence[str],
    series: Sequence[Series],
    title: str,
    axis: Scale | None = None,
    unit: str = "",
    digits: int = 3,
) -> Svg:
    """Draw one row per name, from top to bottom, and one mark per series in it; hollow marks show what was before.

    Args:
        rows: names, in the order of depth.
        series: at most two are told apart.
        title: what is drawn, for screen readers.
        axis: its ``low`` and ``high``; default: around all values. A value outside is drawn as a triangle at the edge.
        unit: behind every number.
        digits: of the numbers.
    """
    step = 19.0 if len(rows) <= 40 else 15.0
    top, bottom = 8.0, 26.0
    height = top + step * len(rows) + bottom
    known = [v for s in series for v in map(finite, (*s.values, *s.before)) if v is not None]
    marks = ticks(axis.low, axis.high) if axis else ticks(min(known, default=0.0), max(known, default=1.0))
    if axis:
        marks = [t for t in marks if axis.holds(t)]
    low, high = (axis.low, axis.high) if axis else (marks[0], marks[-1])
    x = Scale(low, high, _LABELS + _SIZE, WIDTH - _RIGHT)
    svg = _svg(height, title, _ranges(series, unit, digits))
    for tick in marks:
        _line(svg, x(tick), top, x(tick), height - bottom, "grid")
        _words(svg, x(tick), height - bottom + 15, f"{tick:.6g}", "tick middle")
    for i, row in enumerate(rows):
        centre = top + (i + 0.5) * step
        _line(svg, _LABELS, centre, WIDTH - _RIGHT, centre, "row")
        _words(svg, 0, centre + 4, _short(row, _LABEL_LETTERS), "name mono", row)
        for k, one in enumerate(series):
            at = centre + (3.2 * (2 * k - 1) if len(series) > 1 else 0.0)
            value, before = (finite(v[i]) if i < len(v) else None for v in (one.values, one.before))
            if value is None:
                continue
            if before is not None:
                _line(svg, x(before), at, x(value), at, f"join {one.style}")
                _dot(svg, x, before, at, f"{one.style} before", f"{row}, {one.name} before: {before:.{digits}f}{unit}")
            _dot(svg, x, value, at, one.style, f"{row}, {one.name}: {value:.{digits}f}{unit}")
            for beyond in (v for v in (value, before) if v is not None and not x.holds(v)):
                left = beyond < x.low
                words = f"{beyond:.3g}".replace("-", "\N{MINUS SIGN}")
                _words(
                    svg, x(beyond) + (9 if left else -9), at + 4, words, "tick beyond" if left else "tick beyond end"
                )
    return _done(svg)


def bars(rows: Sequence[Bar], title: str, unit: str, digits: int = 1) -> Svg:
    """Draw horizontal bars on a scale from zero, each with a whisker from ``low`` to ``high`` and its number."""
    step, bottom, numbers = 42.0, 26.0, 96.0
    height = step * len(rows) + bottom
    most = max((v for r in rows for v in map(finite, (r.value, r.high)) if v is not None), default=1.0)
    marks = ticks(0.0, most if most > 0 else 1.0, 4)
    x = Scale(marks[0], marks[-1], 2.0, WIDTH - numbers)
    svg = _svg(height, title, "; ".join(f"{r.name} {_text(r.value, digits)} {unit}" for r in rows))
    for tick in marks:
        _line(svg, x(tick), 4, x(tick), height - bottom, "grid")
        _words(svg, x(tick), height - bottom + 15, f"{tick:.6g}", "tick middle" if tick else "tick")
    for i, row in enumerate(rows):
        top, value = step * i, finite(row.value)
        _words(svg, 2, top + 14, _short(row.name, 60), "name", row.name)
        if value is None:
            _words(svg, 2, top + 31, "not measured", "value")
            continue
        low, high = finite(row.low), finite(row.high)
        spread = "" if low is None or high is None else f" ({low:.{digits}f} to {high:.{digits}f})"
        mark = _mark(svg, "rect", row.style, f"{row.name}: {value:.{digits}f} {unit}{spread}")
        _set(mark, x=x(0.0), y=top + 20, width=max(x(value) - x(0.0), 1.0), height=14.0, rx=1.5)
        edge = x(value)
        if low is not None and high is not None:
            for line in ((x(low), 27, x(high), 27), (x(low), 23, x(low), 31), (x(high), 23, x(high), 31)):
                _line(svg, line[0], top + line[1], line[2], top + line[3], "whisker")
            edge = max(edge, x(high))
        _words(svg, edge + 6, top + 31, f"{value:.{digits}f} {unit}", "value")
    return _done(svg)


def heat_map(rows: Sequence[tuple[str, Sequence[Cell]]], title: str) -> Svg:
    """Draw one row of cells per name, as many in each as it has; what the columns are, the texts say.

    Args:
        rows: names and their cells, from left to right.
        title: what is drawn, for screen readers.
    """
    step, gap = 36.0, 2.0
    columns = max((len(cells) for _, cells in rows), default=1)
    width = (WIDTH - _LABELS) / max(columns, 1)
    told = "; ".join(f"{name}: {', '.join(cell.title for cell in cells)}" for name, cells in rows)
    svg = _svg(step * max(len(rows), 1), title, told)
    for i, (name, cells) in enumerate(rows):
        top = step * i
        _words(svg, 0, top + step / 2 + 4, _short(name, _LABEL_LETTERS), "name", name)
        for k, cell in enumerate(cells):
            left = _LABELS + width * k
            mark = _mark(svg, "rect", cell.style, cell.title)
            _set(mark, x=left, y=top, width=width - gap, height=step - gap, rx=1.5)
            head, _, rest = cell.text.partition("\n")
            style = "middle" if cell.faint else "value middle"
            _words(svg, left + (width - gap) / 2, top + (14 if rest else 21), head, style)
            if rest:
                _words(svg, left + (width - gap) / 2, top + 28, rest, "middle")
    return _done(svg)


def _svg(height: float, title: str, description: str) -> ET.Element:
    svg = ET.Element("svg", {"viewBox": f"0 0 {WIDTH:g} {height:g}", "role": "img", "aria-label": title})
    ET.SubElement(svg, "title").text = title
    ET.SubElement(svg, "desc").text = description
    return svg


def _done(svg: ET.Element) -> Svg:
    return Svg(ET.tostring(svg, encoding="unicode"))


def _set(element: ET.Element, **numbers: float) -> None:
    for name, number in numbers.items():
        element.set(name, f"{number:.2f}".rstrip("0").rstrip("."))


def _line(svg: ET.Element, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
    _set(ET.SubElement(svg, "line", {"class": style}), x1=x1, y1=y1, x2=x2, y2=y2)


def _words(svg: ET.Element, x: float, y: float, text: str, style: str, full: str = "") -> None:
    element = ET.SubElement(svg, "text", {"class": style})
    _set(element, x=x, y=y)
    element.text = text
    if full not in ("", text):
        ET.SubElement(element, "title").text = full


def _mark(svg: ET.Element, tag: str, style: str, title: str) -> ET.Element:
    mark = ET.SubElement(svg, tag, {"class": f"mark {style}"})
    ET.SubElement(mark, "title").text = title
    return mark


def _dot(svg: ET.Element, x: Scale, value: float, y: float, style: str, title: str) -> None:
    at, r = x(value), _SIZE
    if not x.holds(value):
        tip = -r if value < x.low else r
        shape: tuple[tuple[float, float], ...] = ((at + tip, y), (at - tip, y - r), (at - tip, y + r))
        style += " outside"
    elif style.split()[0] == "prefix":
        shape = ((at - r, y), (at, y - r), (at + r, y), (at, y + r))
    else:
        _set(_mark(svg, "circle", style, title), cx=at, cy=y, r=r * 0.9)
        return
    mark = _mark(svg, "polygon", style, title)
    mark.set("points", " ".join(f"{px:.2f},{py:.2f}" for px, py in shape))


def _short(text: str, letters: int) -> str:
    """Return the text, its middle left out where it has more than so many letters."""
    if len(text) <= letters:
        return text
    head = (letters - 1) // 2
    return f"{text[:head]}\N{HORIZONTAL ELLIPSIS}{text[len(text) - (letters - 1 - head) :]}"


def _text(value: object, digits: int = 2) -> str:
    number = finite(value)
    return "not measured" if number is None else f"{number:.{digits}f}"


def _ranges(series: Sequence[Series], unit: str, digits: int) -> str:
    """Say from where to where each series goes."""
    parts = []
    for one in series:
        known = [v for v in map(finite, one.values) if v is not None]
        if known:
            parts.append(f"{one.name}: {len(known)} values, {min(known):.{digits}f} to {max(known):.{digits}f}{unit}")
    return "; ".join(parts)
