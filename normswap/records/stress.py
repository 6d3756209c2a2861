"""How two models answer on corrupted images: one row per corruption and strength, and what they come to.

Accuracy and agreement are in percent, differences in points, divergences in nats.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from statistics import fmean
from typing import Any

from .json_types import plain

RIGHT = 20.0  # an original that is right less often than that has no accuracy to lose
FRAMES = "frames"  # the family that shows no image at all
# Always measured, so that JSON's null can only stand for infinity.
_SIZES = ("largest_logit_original", "largest_logit", "largest_activation_original", "largest_activation")


@dataclass(frozen=True)
class StressRow:
    """Both models on the same images, corrupted one way.

    Attributes:
        name: of the row.
        corruption: its kind.
        family: of kinds: noise, blur, tone, digital, occlusion, frames; "clean" for the images as they are.
        strength: in the unit that ``name`` shows.
        n: how many images.
        top1_original, top1: percent of images whose label is the highest logit; None without labels.
        agreement: percent of images where both models answer alike; None for headless models, as the next two.
        kl: mean over images of KL(original || converted) of the softmax.
        worst_kl: the largest of them; infinite if a logit is not finite.
        cosine: mean cosine similarity of the two output vectors; None if an output is not finite.
        largest_logit_original, largest_logit: largest absolute output; infinite if one is not finite.
        largest_activation_original, largest_activation: the same over the outputs of all modules.
        non_finite_original, non_finite: images with a NaN or infinite output.
        n_fp16: of how many images it is known whether the converted model has a finite output in half precision; 0
            where that was not asked for, or cannot run.
        non_finite_fp16: how many of them have none.
    """

    name: str
    corruption: str
    family: str
    strength: float
    n: int
    top1_original: float | None
    top1: float | None
    agreement: float | None
    kl: float | None
    worst_kl: float | None
    cosine: float | None
    largest_logit_original: float
    largest_logit: float
    largest_activation_original: float
    largest_activation: float
    non_finite_original: int = 0
    non_finite: int = 0
    n_fp16: int = 0
    non_finite_fp16: int = 0

    @property
    def drop(self) -> float | None:
        """Points of top-1 that the converted model is below the original; None without labels."""
        return None if self.top1_original is None or self.top1 is None else self.top1_original - self.top1

    @property
    def loss(self) -> float | None:
        """Points lost: of top-1, without labels of agreement; None for headless models."""
        return self.drop if self.drop is not None else None if self.agreement is None else 100 - self.agreement

    @property
    def counts(self) -> bool:
        """Whether there is accuracy to lose: the original is right on `RIGHT` percent; without labels, an image."""
        return self.family != FRAMES if self.top1_original is None else self.top1_original >= RIGHT


@dataclass(frozen=True)
class StressRecord:
    """What `stress_models` measured.

    Attributes:
        images: which ones, for people.
        seed: of the corruptions.
        clean: the images as they are.
        rows: the same images corrupted.
        reason: why nothing was measured; empty if it was.
    """

    images: str
    seed: int
    clean: StressRow | None
    rows: list[StressRow] = field(default_factory=list)
    reason: str = ""

    @property
    def counted(self) -> list[StressRow]:
        """The rows that means and the worst row are taken over, see `StressRow.counts`."""
        return [row for row in self.rows if row.counts]

    @property
    def mean_top1(self) -> tuple[float, float] | None:
        """Top-1 of original and converted, mean over the rows that count; None without labels or such rows."""
        pairs = [(r.top1_original, r.top1) for r in self.counted if r.top1_original is not None and r.top1 is not None]
        return (fmean(p[0] for p in pairs), fmean(p[1] for p in pairs)) if pairs else None

    @property
    def mean_agreement(self) -> float | None:
        """Mean over the rows that count; None for headless models and without such rows."""
        known = [r.agreement for r in self.counted if r.agreement is not None]
        return fmean(known) if known else None

    @property
    def drop(self) -> float | None:
        """Points lost, mean over the rows that count: of top-1, or of agreement without labels."""
        known = [r.loss for r in self.counted if r.loss is not None]
        return fmean(known) if known else None

    @property
    def worst(self) -> StressRow | None:
        """The row of those that count that lost most; None if no row counts."""
        known = [(r.loss, r) for r in self.counted if r.loss is not None]
        return max(known, key=lambda pair: pair[0])[1] if known else None

    def problem(self, max_stress_drop: float) -> str | None:
        """Say why a limit on `drop` does not hold, None if it does.

        Args:
            max_stress_drop: points.
        """
        if self.drop is None:
            return f"`max_stress_drop` {max_stress_drop:g} cannot be checked: {self.reason or self.no_rows}"
        if self.drop <= max_stress_drop:
            return None
        what = "top-1" if self.mean_top1 else "agreement"
        where = f"the mean over {len(self.counted)} rows of corrupted images"
        return f"{what} falls by {self.drop:.2f} points ({where}), more than `max_stress_drop` {max_stress_drop:g}"

    @property
    def no_rows(self) -> str:
        """Why no row counts."""
        if any(row.top1_original is None and row.agreement is None for row in self.rows):
            return "a model without classes has no accuracy to lose"
        return f"the original is right on {RIGHT:g} % of the images in none of {len(self.rows)} rows"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; the keys are a contract and only grow."""
        mean = self.mean_top1
        return {
            "images": self.images,
            "seed": self.seed,
            "reason": self.reason,
            "mean_top1_original": mean[0] if mean else None,
            "mean_top1": mean[1] if mean else None,
            "mean_agreement": self.mean_agreement,
            "drop": self.drop,
            "rows_counted": len(self.counted),
            "worst": self.worst.name if self.worst else None,
            "clean": None if self.clean is None else plain(asdict(self.clean)),
            "rows": [plain(asdict(row)) for row in self.rows],
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "StressRecord":
        """Return what `to_json` wrote; keys of other versions are left out."""
        clean = record.get("clean")
        rows = [_row(r) for r in record.get("rows", ())]
        clean_row = None if clean is None else _row(clean)
        return cls(record["images"], record["seed"], clean_row, rows, record.get("reason", ""))


def _row(record: Mapping[str, Any]) -> StressRow:
    known = {f.name: record[f.name] for f in fields(StressRow) if f.name in record}
    infinite = [*_SIZES, *(("kl", "worst_kl") if known["agreement"] is not None else ())]
    known |= {name: math.inf for name in infinite if known[name] is None}
    return StressRow(**known)
