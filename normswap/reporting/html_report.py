"""report.html: what normswap.json holds, as one page with pictures, for people; it loads nothing and runs nothing.

The page is made of the record alone, so it can be made again at any time, with a benchmark that came later.
"""

import importlib.util
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError, MissingExtraError
from ..records.report import LayerFit, SiteFit, StageMetrics, StreamError
from ..records.stress import StressRecord
from ..tables import number, sentence
from .benchmark_charts import Speed
from .conversion_tables import STREAM_COLUMNS, kept_layers, printable, scarce_rows, stream_rows
from .stress_tables import STRESS_COLUMNS, logit_chart, stress_chart, stress_line, stress_rows
from .svg_charts import Scale, Series, Step, Svg, dots, finite, ticks, waterfall

T = TypeVar("T")

# A chart reaches so many times the upper quartile of its errors; what is beyond is drawn as a triangle at the edge.
_REACH_ERROR, _REACH_R2 = 4.0, 10.0
_CONTROL = "control"
_PICTURES = ("data:image/png;base64,", "data:image/jpeg;base64,")
_VERDICTS = ("fold-forward", "fold-backward", "affine", "keep")


@dataclass(frozen=True)
class Metric:
    """What the stages are compared by.

    Attributes:
        key: of `StageMetrics`.
        name: for people.
        factor: to percent.
    """

    key: str
    name: str
    factor: float = 1.0


_METRICS = (
    Metric("top1", "top-1 accuracy"),
    Metric("agreement", "top-1 agreement with the original"),
    Metric("cosine", "cosine similarity of the output with the original's", 100.0),
)


def can_render() -> bool:
    """Return whether the ``report`` extra is installed."""
    return importlib.util.find_spec("jinja2") is not None


def check_extra() -> None:
    """Raise `MissingExtraError` if it is not."""
    if not can_render():
        raise MissingExtraError('report.html needs jinja2: pip install "normswap[report]"')


def render_page(record: Mapping[str, Any], benchmark: Mapping[str, Any] | None = None, source: str = "") -> str:
    """Return report.html.

    Args:
        record: what normswap.json holds.
        benchmark: what ``normswap benchmark --json`` printed.
        source: where the record comes from, for error messages.

    Raises:
        MissingExtraError: the ``report`` extra is not installed.
        CheckpointError: the record or the benchmark is not what it should be.
    """
    check_extra()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("normswap"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value, digits=2: number(finite(value), digits)
    template = environment.get_template("report.html")
    speed = None if benchmark is None else Speed.of(printable(benchmark))
    try:
        return template.render(_content(printable(record)) | {"speed": speed})
    except (KeyError, TypeError, ValueError, AttributeError, jinja2.UndefinedError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{source or 'normswap.json'}: no page can be made of it ({problem})") from error


def _content(record: Mapping[str, Any]) -> dict[str, Any]:
    report = record["report"]
    stages = [_known(StageMetrics, s) for s in report["stages"]]
    fits = [_known(SiteFit, f) for f in report["fits"]]
    layers = [_known(LayerFit, f) for f in report["layers"]]
    stream = [_known(StreamError, e) for e in report["stream"]]
    metric = next((m for m in _METRICS if stages and finite(getattr(stages[0], m.key)) is not None), _METRICS[-1])
    kept = kept_layers(layers)
    scarce = scarce_rows(layers)
    return {
        "report": report,
        "stages": stages,
        "first": stages[0] if stages else None,
        "last": stages[-1] if stages else None,
        "metric": metric,
        "control": any(s.name == _CONTROL for s in stages),
        "waterfall": _waterfall(stages, metric),
        "stage_rows": [_stage_row(s) for s in stages],
        "gone": report["sites"]["total"] - report["sites"]["keep"],
        "verdicts": [(report["sites"][v], v) for v in _VERDICTS if report["sites"][v]],
        "known_verdicts": _VERDICTS,
        "fits": fits,
        "fit_rows": [_fit_row(f) for f in fits],
        "fit_chart": _fit_chart(fits),
        "outside": "A triangle stands for a number beyond the scale.",
        "has_prefix": any(f.r2_prefix is not None for f in fits),
        "stream": stream_rows(stream, every=True),
        "stream_columns": [*STREAM_COLUMNS[:-1], "note"],
        "stream_chart": _stream_chart(stream),
        "stream_prefix": any(e.prefix is not None for e in stream),
        "layers": layers,
        "layer_rows": [_layer_row(f) for f in layers],
        "notes": [*kept, *([scarce] if scarce else [])],
        "worst": _worst(record),
        **_stress(report.get("stress")),
        "provenance": _provenance(record),
        "seconds": [(name, finite(s)) for name, s in report["seconds"].items()],
        "benchmark_command": _benchmark_command(report),
    }


def _known(cls: type[T], values: Mapping[str, Any]) -> T:
    """Return a record of another version: what it has more is left out, what it has less is the default."""
    return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})  # type: ignore[arg-type]


def _stage_row(s: StageMetrics) -> list[str]:
    shares = [number(finite(v)) for v in (s.top1, s.top5, s.agreement)]
    return [s.name, *shares, number(finite(s.kl), 4), _kl(s), str(s.non_finite), f"{s.n:,}"]


def _kl(s: StageMetrics) -> str:
    """Return the worst KL; the record has None both for an infinite one and for a model without classes."""
    return "infinite" if s.kl is None and s.agreement is not None else number(finite(s.worst_kl), 4)


def _fit_row(f: SiteFit) -> list[str]:
    values = (f.r2, f.r2_patch, f.r2_prefix, f.r2_original)
    return [f.site, f"{f.samples:,}", *(number(finite(v), 4) for v in values), f.bound]


def _layer_row(f: LayerFit) -> list[str]:
    penalty = finite(f.penalty)
    shares = [number(finite(v), 4) for v in (f.r2_before, f.r2)]
    kept = f"kept: {f.reason}" if f.reason else "re-solved"
    return [f.layer, f.role, f"{f.samples:,}", *shares, "-" if penalty is None else f"{penalty:g}", kept]


def _waterfall(stages: Sequence[StageMetrics], metric: Metric) -> Svg | None:
    # Only what was measured on the same images differs by the step alone.
    chain = [s for s in stages if s.name != _CONTROL and s.n == stages[0].n]
    if not chain:
        return None
    values = [finite(getattr(s, metric.key)) for s in chain]
    steps = [
        Step(s.name, None if v is None else metric.factor * v, total=i in (0, len(chain) - 1))
        for i, (s, v) in enumerate(zip(chain, values, strict=True))
    ]
    return waterfall(steps, f"{metric.name}, percent, from stage to stage")


def _fit_chart(fits: Sequence[SiteFit]) -> Svg | None:
    if not fits:
        return None
    patches = [f.r2 if f.r2_patch is None else f.r2_patch for f in fits]
    series = [Series("patch tokens", "patch", patches)]
    if any(f.r2_prefix is not None for f in fits):
        series.append(Series("prefix tokens", "prefix", [f.r2_prefix for f in fits]))
    known = [1 - v for s in series for v in map(finite, s.values) if v is not None]
    axis = Scale(ticks(1 - _reach(known, _REACH_R2), 1.0)[0], 1.0, 0, 1)
    return dots([f.site for f in fits], series, "R squared of each norm, from first to last", axis, digits=4)


def _reach(errors: Sequence[float], times: float) -> float:
    """Return the largest of the errors, or so many times their upper quartile if that is less; above 0."""
    upper = sorted(errors)[3 * len(errors) // 4] if errors else 0.0
    return max(min(max(errors, default=0.0), times * upper), 1e-3)


def _stream_chart(stream: Sequence[StreamError]) -> Svg | None:
    if not stream:
        return None

    def percent(name: str) -> list[float | None]:
        values = [finite(getattr(e, name)) for e in stream]
        return [None if v is None else 100 * v for v in values]

    series = [Series("patch tokens", "patch", percent("patch"), percent("patch_before"))]
    if any(e.prefix is not None for e in stream):
        series.append(Series("prefix tokens", "prefix", percent("prefix"), percent("prefix_before")))
    known = [v for s in series for v in (*s.values, *s.before) if v is not None]
    axis = Scale(0.0, ticks(0.0, _reach(known, _REACH_ERROR))[-1], 0, 1)
    title = "error of the residual stream after each layer that writes to it, from first to last"
    return dots([e.after for e in stream], series, title, axis, unit=" %", digits=1)


def _worst(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the images with their pictures; only ``data:`` URIs of pictures are taken for one."""
    pictures = [str(t) if str(t).startswith(_PICTURES) else None for t in record.get("thumbnails") or ()]
    images = record["report"].get("worst") or []
    pictures += [None] * (len(images) - len(pictures))
    return [{**image, "thumbnail": picture} for image, picture in zip(images, pictures, strict=False)]


def _stress(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what the page shows of corrupted images; records of 0.1 have none."""
    if record is None:
        return {"stress": None}
    stress = StressRecord.from_json(record)
    rows = stress_rows([*([] if stress.clean is None else [stress.clean]), *stress.rows])
    return {
        "stress": sentence(stress_line(stress)),
        "stress_images": stress.images,
        "stress_columns": STRESS_COLUMNS,
        "stress_rows": rows,
        "stress_charts": [chart for chart in (stress_chart(stress), logit_chart(stress)) if chart is not None],
    }


def _provenance(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    report, made = record["report"], record.get("made") or {}
    command = record.get("command")
    rows = [
        ("command", shlex.join(command) if command else "called from Python"),
        ("model", report["model"]),
        ("architecture", report["architecture"]),
        ("method", report["method"] + (f" ({report['reconstruct']})" if report.get("reconstruct") else "")),
        ("BatchNorm in the FFN", report["ffn_bn"]),
        ("calibration images", report["calibration_data"]),
        ("evaluation images", report["evaluation_data"]),
        *((name, str(value)) for name, value in made.items()),
        ("versions", ", ".join(f"{name} {version}" for name, version in report["versions"].items())),
    ]
    if report.get("skipped_images"):
        rows.append(("images that could not be read", ", ".join(report["skipped_images"])))
    if report.get("created_biases"):
        rows.append(("layers that got a bias", ", ".join(report["created_biases"])))
    return rows


def _benchmark_command(report: Mapping[str, Any]) -> str:
    out = report.get("out") or "OUT"
    names = [shlex.quote(str(text)) for text in (report["model"], f"local-dir:{out}", f"{out}/benchmark.json")]
    return "normswap benchmark -m {} --against {} --json > {}".format(*names)


def read_benchmark(path: Path) -> dict[str, Any]:
    """Return what ``normswap benchmark --json`` printed into a file.

    Raises:
        CheckpointError: it cannot be read, or is nothing of the kind.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        Speed.of(record)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return record
