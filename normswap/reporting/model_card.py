"""The model card that goes into an output folder: how the model was made, what it cost, and the line that loads it."""

import inspect
from collections.abc import Mapping
from html import escape
from typing import Any

from huggingface_hub import ModelCardData

from ..layers import TokenBound
from ..records.report import LOAD_WITH, ConversionReport, Finetuning, StageMetrics
from ..tables import markdown, number, sentence
from .budget_tables import BUDGET_COLUMNS, budget_line, budget_rows, budget_title
from .conversion_tables import (
    STREAM_COLUMNS,
    STREAM_TITLE,
    WORST_COLUMNS,
    WORST_TITLE,
    bounds_line,
    fit_line,
    kept_layers,
    stream_rows,
    worst_rows,
)
from .stress_tables import stress_markdown

_STOCK = """Plain timm loads it; normswap is not needed:

```python
import timm, torch

model = timm.create_model("local-dir:PATH", pretrained=True, norm_layer=torch.nn.Identity)
```
"""

_BOUNDED = """Plain timm loads it; normswap is not needed. bounds.safetensors has a range for each channel where a
LayerNorm was, and this class clamps to it:

```python
from functools import partial
from typing import Any

import timm, torch
from safetensors import safe_open
from torch import nn


{source}

model = timm.create_model(
    "local-dir:PATH", pretrained=True, norm_layer=partial(TokenBound, file="PATH/bounds.safetensors")
)
```

With `norm_layer=torch.nn.Identity` the same weights load without the bounds. On images like those of the calibration
the outputs are nearly the same then; on noisy, covered or blank ones nothing limits them.
"""

_OWN = """Plain timm cannot build it ({reason}); normswap can:

```python
import normswap

model = normswap.load("PATH")
```
"""

_INTO = """timm cannot rebuild it ({reason}); normswap loads it into a model of your own:

```python
import normswap

model = ...  # your {kind}, made as before the conversion, with its LayerNorms
model = normswap.load_into(model, "PATH")
```
"""


# timm's licences that the Hub knows by name, and the usual ones; any other is "other" there, with its name beside it.
_HUB_LICENSES = set(
    "apache-2.0 mit bsd-2-clause bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 cc-by-nc-sa-4.0 gpl-3.0 "
    "apple-ascl apple-amlr gemma fair-noncommercial-research-license openrail unknown other".split()
)


def metadata(config: Mapping[str, Any]) -> ModelCardData:
    """Return what the Hub reads at the head of a model card.

    Args:
        config: timm's ``pretrained_cfg`` of the original. It tells the licence, which a conversion does not change,
            and where the weights came from, if that is on the Hub.
    """
    name = config.get("license")
    known = name is None or name in _HUB_LICENSES
    return ModelCardData(
        library_name="timm",
        pipeline_tag="image-classification",
        tags=["image-classification", "timm", "normswap"],
        license=name if known else "other",
        license_name=None if known else name,
        base_model=config.get("hf_hub_id") if config.get("source") == "hf-hub" else None,
    )


def model_card(report: ConversionReport, config: Mapping[str, Any], page: bool = False, kind: str = "model") -> str:
    """Return the text of README.md.

    Args:
        report: what was measured.
        config: as in `metadata`.
        page: whether report.html lies beside it.
        kind: class of the model.
    """
    sites = report.sites
    verdicts = ", ".join(f"{sites[k]} {k}" for k in ("fold-forward", "fold-backward", "affine", "keep") if sites[k])
    fit, bounds = fit_line(report.fits), bounds_line(report.fits)
    stock = _BOUNDED if report.bounded else _STOCK
    text = stock if report.stock_timm is None else _INTO if report.load_with == LOAD_WITH[2] else _OWN
    load = text.format(reason=report.stock_timm, kind=kind, source=_source() if text is _BOUNDED else "")
    lines = [
        "---",
        metadata(config).to_yaml(),
        "---",
        "",
        f"# {report.architecture} {'with fewer LayerNorms' if report.stayed else 'without LayerNorm'}",
        "",
        f"normswap {report.versions['normswap']} replaced LayerNorm by BatchNorm and folded it into the neighbouring",
        f"weights: {sites['total']} LayerNorms, {verdicts}. Converted from `{_short(report.model)}`.",
        "",
        f"- calibration: `{report.method}` on {report.calibration_data}{_views(report)}, without labels{_cost(report)}",
        *([f"- bounds where the LayerNorms were: {bounds}"] if bounds else []),
        *([f"- {_trained(report.finetuning)}"] if report.finetuning is not None else []),
        *([f"- {fit}"] if fit else []),
        *(f"- LayerNorm stays at `{site}`: {reason}" for site, reason in report.stayed.items()),
        *(f"- {line}" for line in kept_layers(report.layers)),
        f"- BatchNorm between the FFN's linear layers: {report.ffn_bn} ({sites['ffn_bn']} inserted, folded as well)",
        f"- fused against unfused, largest difference of an output: {report.fold_max_abs_err:.2e}",
        *([f"- {report.fold_warning}"] if report.fold_warning else []),
        f"- measured on {report.evaluation_data}",
        "",
        *_stage_rows(report.stages),
        "",
        *_budget(report),
        *_stream(report),
        *_worst_images(report),
        *([] if report.stress is None else stress_markdown(report.stress)),
        "## Loading",
        "",
        load,
        "normswap.json holds the plan, the numbers and the versions in full"
        + ("; report.html shows them with pictures." if page else "."),
        "",
    ]
    return "\n".join(lines)


def _source() -> str:
    """Return the lines of `TokenBound`, or those that import it where no source is at hand."""
    try:
        return inspect.getsource(TokenBound).strip()
    except OSError:
        return "from normswap import TokenBound"


def _short(model: str) -> str:
    source, separator, path = model.rpartition("local-dir:")
    return f"local-dir:{path.rstrip('/').rpartition('/')[2]}" if separator and not source else model


def _stage_rows(stages: list[StageMetrics]) -> list[str]:
    columns = ["stage", "top-1 %", "top-5 %", "top-1 agreement %", "KL", "non-finite", "images"]
    rows = [
        [s.name, number(s.top1), number(s.top5), number(s.agreement), number(s.kl, 4), str(s.non_finite), str(s.n)]
        for s in stages
    ]
    return markdown(columns, rows)


def _trained(finetuning: Finetuning) -> str:
    labels = "without labels" if float(finetuning.options.get("labels", "0")) == 0 else "with labels"
    return f"fine-tuned on {finetuning.images} images, {labels}: {finetuning.line()}"


def _budget(report: ConversionReport) -> list[str]:
    if report.budget is None:
        return []
    title, line = budget_title(report.budget), budget_line(report.budget)
    table = markdown(BUDGET_COLUMNS, budget_rows(report.budget), right=BUDGET_COLUMNS[:-1])
    text = "The LayerNorms that stay were chosen on the images of this table, so its figures are slightly optimistic."
    return ["## Accuracy budget", "", f"{title}: {line}.", "", *table, "", text, ""]


def _views(report: ConversionReport) -> str:
    return f", with {100 * report.views:.0f} % as many corrupted copies" if report.views else ""


def _cost(report: ConversionReport) -> str:
    passes = report.calibration_passes
    return "" if passes is None else f"; it took as long as {passes:.1f} forward passes over the images"


def _stream(report: ConversionReport) -> list[str]:
    if not report.stream:
        return []
    title = f"{sentence(STREAM_TITLE)}, before and after the layer named was re-solved"
    table = markdown(STREAM_COLUMNS, stream_rows(report.stream), right=STREAM_COLUMNS[1:5])
    return ["## Where the error arises", "", f"{title}:", "", *table, ""]


def _worst_images(report: ConversionReport) -> list[str]:
    if not report.worst:
        return []
    rows = [[_cell(cell) for cell in cells] for cells in worst_rows(report.worst, 3)]
    return [f"## {sentence(WORST_TITLE)}", "", *markdown(WORST_COLUMNS, rows, right=WORST_COLUMNS[-1:]), ""]


def _cell(text: str) -> str:
    """Return text for a cell of a Markdown table: a file name may hold anything."""
    return "".join(f"&#{ord(c)};" if c in "|`*_[]\\" else c for c in escape(text, quote=False))
