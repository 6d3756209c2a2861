"""Records for the page: of a real small conversion, and one in which every text wants to break out."""

import copy
import json
from typing import Any

import torch

import normswap

from ..models import family, images

HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>\"'`|\u202e\x00\udcff"


def convert(name: str = "vit", **options: Any) -> normswap.Conversion:
    model = family(name)
    labels = torch.arange(40) % max(model.num_classes, 1)
    return normswap.convert(model, [(images(model, 40), labels)], **options)


def record_of(result: normswap.Conversion) -> dict[str, Any]:
    """Return what normswap.json would hold, through JSON as it is read back."""
    record = {
        "format": 1,
        "command": ["normswap", "convert"],
        "made": {"created": "2026-01-01 00:00 UTC", "device": "cpu"},
        "report": result.report.to_json(),
        "thumbnails": result._thumbnails,
    }
    return json.loads(json.dumps(record))


def hostile(record: Any) -> Any:
    """Return the record with every text that is not a number's name replaced by `HOSTILE`, verdicts too."""
    if isinstance(record, str):
        return HOSTILE
    if isinstance(record, dict):
        return {key: hostile(value) for key, value in record.items()}
    if isinstance(record, list):
        return [hostile(value) for value in record]
    return copy.copy(record)


def benchmark() -> dict[str, Any]:
    """Return a record in the form of ``normswap benchmark --json``; its numbers mean nothing."""

    def row(variant: str, batch: int, ms: float, ratio: float | None) -> dict[str, Any]:
        return {
            "model": "vit",
            "variant": variant,
            "engine": "eager",
            "infer_batch_size": batch,
            "infer_samples_per_sec": 1000 * batch / ms,
            "infer_step_time": ms,
            "infer_step_time_q25": 0.95 * ms,
            "infer_step_time_q75": 1.1 * ms,
            "ratio": ratio,
            "ratio_q25": None if ratio is None else ratio - 0.02,
            "ratio_q75": None if ratio is None else ratio + 0.02,
        }

    rows = [(("original", None), ("fused", 1.25), ("norm-free", 1.3)), (("original", None), ("fused", 1.01))]
    results = [
        row(variant, batch, 2.0 * batch / (ratio or 1.0), ratio)
        for batch, variants in zip((1, 64), rows, strict=True)
        for variant, ratio in variants
    ]
    settings = {"device": "cpu", "threads": 1, "rounds": 25}
    return {"model": "vit", "img_size": 32, "settings": settings, "notes": ["a note"], "results": results}
