"""What ``normswap benchmark --json`` printed, as the report shows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from .svg_charts import Bar, Svg, bars, finite

_RATE, _TIME, _BATCH = "infer_samples_per_sec", "infer_step_time", "infer_batch_size"
_ORIGINAL, _FUSED = "original", "fused"
_STYLES = {_ORIGINAL: "total", _FUSED: "gain"}


@dataclass(frozen=True)
class Case:
    """One engine with one batch size.

    Attributes:
        name: of the case.
        finding: what the ratio of fused to original allows to say; empty if there is none.
        chart: images/s of each variant, with the quartiles over the rounds.
        rows: variant, images/s, its quartiles, milliseconds per step, ratio to the original and its quartiles; as text.
    """

    name: str
    finding: str
    chart: Svg
    rows: list[list[str]]


@dataclass(frozen=True)
class Speed:
    """Measured speed.

    Attributes:
        cases: one per engine and batch size.
        about: what was measured on what, (name, text) each.
        notes: what the benchmark itself has to say.
    """

    cases: list[Case]
    about: list[tuple[str, str]]
    notes: list[str]

    @classmethod
    def of(cls, record: Any) -> "Speed":
        """Return what a benchmark's record says.

        Raises:
            CheckpointError: it is no such record.
        """
        found = record.get("results") if isinstance(record, Mapping) else None
        if not isinstance(found, list) or not found or not all(isinstance(r, Mapping) and _RATE in r for r in found):
            raise CheckpointError(f"no benchmark: it has no 'results' with '{_RATE}' (normswap benchmark --json)")
        cases: dict[str, list[Mapping[str, Any]]] = {}
        for row in found:
            engine, batch = row.get("engine"), row.get(_BATCH)
            name = ", ".join(t for t in (engine and str(engine), batch and f"batch {batch}") if t)
            cases.setdefault(name, []).append(row)
        notes = record.get("notes")
        return cls(
            [_case(name, rows) for name, rows in cases.items()],
            _about(record),
            [str(note) for note in notes] if isinstance(notes, list) else [],
        )


def _case(name: str, rows: Sequence[Mapping[str, Any]]) -> Case:
    drawn = [Bar(_variant(r), finite(r[_RATE]), *_rates(r), style=_STYLES.get(_variant(r), "other")) for r in rows]
    texts = [
        [
            _variant(r),
            _text(finite(r[_RATE]), 1),
            _range(*_rates(r), digits=1),
            _text(finite(r.get(_TIME)), 2),
            _text(finite(r.get("ratio")), 3),
            _range(finite(r.get("ratio_q25")), finite(r.get("ratio_q75")), digits=3),
        ]
        for r in rows
    ]
    chart = bars(drawn, f"images per second, {name}: median, whiskers are the quartiles over the rounds", "images/s")
    return Case(name, _finding(next((r for r in rows if _variant(r) == _FUSED), {})), chart, texts)


def _variant(row: Mapping[str, Any]) -> str:
    return str(row.get("variant") or row.get("model") or "model")


def _rates(row: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Return the quartiles of images/s, from those of the time of a step in milliseconds."""
    batch, slow, fast = (finite(row.get(key)) for key in (_BATCH, f"{_TIME}_q75", f"{_TIME}_q25"))
    if batch is None or not slow or not fast:
        return None, None
    return 1000 * batch / slow, 1000 * batch / fast


def _finding(row: Mapping[str, Any]) -> str:
    ratio, low, high = (finite(row.get(key)) for key in ("ratio", "ratio_q25", "ratio_q75"))
    if ratio is None or low is None or high is None:
        return ""
    text = f"fused gives {ratio:.3f} times the original's images/s, quartiles {low:.3f} to {high:.3f}"
    return f"{text}: no difference that could be told from the spread" if low <= 1 <= high else text


def _text(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _range(low: float | None, high: float | None, digits: int) -> str:
    return "-" if low is None or high is None else f"{_text(low, digits)} to {_text(high, digits)}"


def _about(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the plain values beside the results, as model, device and versions."""
    about = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            about += (
                _about(value) if key == "settings" else [(str(key), ", ".join(f"{k} {v}" for k, v in value.items()))]
            )
        elif isinstance(value, str | int | float) and value != "" and value is not False:
            about.append((str(key).replace("_", " "), "yes" if value is True else str(value)))
    return about
