"""The stress record as a table, a line, Markdown for the model card and a heat map for the page."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby

from rich.table import Table

from ..records.stress import FRAMES, RIGHT, StressRecord, StressRow
from ..tables import markdown, number, sentence, table
from .svg_charts import Cell, Svg, heat_map

STRESS_COLUMNS = (
    "images",
    "top-1 %",
    "agreement %",
    "KL",
    "worst KL",
    "largest logit",
    "largest activation",
    "not finite in FP16",
)
STRESS_TITLE = "corrupted images: original -> converted"
# Beyond each of them a cell gets the next colour: points lost, and times the original's logit.
_HEAT_LOSS, _HEAT_LOGIT = (1.0, 4.0, 8.0, 16.0), (1.1, 1.5, 3.0, 10.0)
_ROWS_IN_CARD = 10


def stress_rows(rows: Sequence[StressRow]) -> list[list[str]]:
    """Return the cells of each row under `STRESS_COLUMNS`."""
    return [
        [
            row.name,
            _change(row.top1_original, row.top1, 1),
            number(row.agreement, 1),
            _size(row.kl),
            _size(row.worst_kl),
            f"{_size(row.largest_logit_original)} -> {_size(row.largest_logit)}",
            f"{_size(row.largest_activation_original)} -> {_size(row.largest_activation)}",
            f"{row.non_finite_fp16} of {row.n_fp16}" if row.n_fp16 else "-",
        ]
        for row in rows
    ]


def stress_table(record: StressRecord) -> Table:
    """Return one row per corruption and strength, behind the images as they are."""
    return table(STRESS_COLUMNS, stress_rows(_all(record)), STRESS_TITLE, right=STRESS_COLUMNS[1:])


def stress_line(record: StressRecord) -> str:
    """Return what the rows come to, in one line."""
    if record.reason:
        return f"not measured: {record.reason}"
    parts = [_means(record)]
    worst = record.worst
    if worst is not None:
        change = f"{worst.agreement:.1f} %" if worst.drop is None else _change(worst.top1_original, worst.top1, 1)
        parts[0] += f", worst row {worst.name}: {change}"
    rows = _all(record)
    logits = [
        max((getattr(row, name) for row in rows), default=0.0) for name in ("largest_logit_original", "largest_logit")
    ]
    parts.append(f"largest logit {_size(logits[0])} -> {_size(logits[1])}")
    lost = sum(row.non_finite_fp16 for row in rows)
    if lost:
        parts.append(f"{lost} of {sum(row.n_fp16 for row in rows)} images not finite in FP16")
    return "; ".join(parts)


def stress_markdown(record: StressRecord) -> list[str]:
    """Return a section of the model card: the line, and the rows that lost most behind the clean images."""
    if record.reason or record.clean is None:
        return []
    ranked = sorted(record.rows, key=lambda row: (row.counts, row.loss or 0.0, row.largest_logit), reverse=True)
    shown = ranked[:_ROWS_IN_CARD]
    rows = [record.clean, *(row for row in record.rows if row in shown)]
    what = (
        "all rows" if len(shown) == len(record.rows) else f"the {len(shown)} of {len(record.rows)} rows that lost most"
    )
    return [
        "## Corrupted images",
        "",
        f"{sentence(stress_line(record))}. On {record.images}; {what}:",
        "",
        *markdown(STRESS_COLUMNS, stress_rows(rows), right=STRESS_COLUMNS[1:]),
        "",
    ]


def stress_chart(record: StressRecord) -> Svg | None:
    """Return a heat map of the points lost, one line per kind of corruption from mild to severe, the strengths below.

    None if nothing was measured.
    """
    labelled = any(row.drop is not None for row in record.rows)
    return _chart(record, _lost, f"points of {'top-1' if labelled else 'agreement'} lost on corrupted images")


def logit_chart(record: StressRecord) -> Svg | None:
    """Return the same map of how many times the original's largest logit the converted model's is."""
    return _chart(record, _grown, "largest logit on corrupted images, in times the original's")


def _chart(record: StressRecord, look: Callable[[StressRow], tuple[str, str]], title: str) -> Svg | None:
    if not record.rows:
        return None
    kinds = groupby(record.rows, lambda row: row.corruption)
    return heat_map([(kind, [_cell(row, *look(row)) for row in rows]) for kind, rows in kinds], title)


def _all(record: StressRecord) -> list[StressRow]:
    return [*([] if record.clean is None else [record.clean]), *record.rows]


def _means(record: StressRecord) -> str:
    counted, rest = len(record.counted), len(record.rows) - len(record.counted)
    over = f"over {counted} rows"
    if record.mean_top1 is not None:
        over += f" (the original is below {RIGHT:g} % in {rest} more)" if rest else ""
        return f"mean top-1 {record.mean_top1[0]:.1f} -> {record.mean_top1[1]:.1f} {over}"
    if record.mean_agreement is not None:
        return f"mean agreement {record.mean_agreement:.1f} % {over}"
    return record.no_rows


def _change(before: float | None, after: float | None, digits: int) -> str:
    return "-" if before is None else f"{number(before, digits)} -> {number(after, digits)}"


def _size(value: float | None) -> str:
    """Return a number that may be anything from a rounding to what overflowed."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else "infinite"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _lost(row: StressRow) -> tuple[str, str]:
    """Return text and class of a cell."""
    if row.loss is None:
        return number(row.cosine, 2), "heat-none"
    text = f"{-row.loss:+.1f}".replace("-", "\N{MINUS SIGN}")
    gained = row.loss <= -_HEAT_LOSS[0]
    style = "heat-gain" if gained else f"heat-{sum(row.loss > edge for edge in _HEAT_LOSS)}"
    return "0.0" if text[1:] == "0.0" else text, style


def _grown(row: StressRow) -> tuple[str, str]:
    """Return text and class of a cell; a logit that is not finite is infinitely many times any other."""
    before, after = row.largest_logit_original, row.largest_logit
    times = after / before if math.isfinite(after) and before > 0 else math.inf
    return f"x {_size(times)}", f"heat-{sum(times > edge for edge in _HEAT_LOGIT)}"


def _cell(row: StressRow, text: str, style: str) -> Cell:
    strength = "" if row.family == FRAMES else f"{row.strength:g}".replace("-", "\N{MINUS SIGN}")
    _, top1, agreement, _, worst_kl, logit, _, half = stress_rows([row])[0]
    told = f"{row.name}: top-1 {top1} %, agreement {agreement} %, worst KL {worst_kl}, largest logit {logit}"
    told += f", not finite in FP16 {half}"
    return Cell(f"{text}\n{strength}", told, style, faint=not row.counts)
