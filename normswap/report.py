"""What was done and what it cost: one record per step, as a table or as JSON.

Accuracy and agreement are in percent, as timm prints them; times in seconds; divergences in nats.
"""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table

from .provenance import versions
from .trade import Trade
from .worst import WorstImage


@dataclass(frozen=True)
class StageMetrics:
    """One model measured on one set of images.

    Attributes:
        name: original, swapped, calibrated, fused, ... or the model's name.
        n: how many images.
        top1: percent of images whose label is the highest logit; None without labels.
        top5: percent of images whose label is among the five highest; None without labels.
        agreement: percent of images where the highest logit is the original's; None for headless models.
        kl: mean over images of KL(original || model) of the softmax, in nats; None for headless models.
        worst_kl: the largest of them; infinite if a logit is not finite.
        cosine: mean cosine similarity of the output vector with the original's.
        non_finite: number of images with a NaN or infinite output.
    """

    name: str
    n: int
    top1: float | None
    top5: float | None
    agreement: float | None
    kl: float | None
    worst_kl: float | None
    cosine: float
    non_finite: int

    def accuracy_line(self) -> str | None:
        """Return the line timm's validate.py prints, None without labels."""
        if self.top1 is None or self.top5 is None:
            return None
        return f" * Acc@1 {self.top1:.3f} ({100 - self.top1:.3f}) Acc@5 {self.top5:.3f} ({100 - self.top5:.3f})"


@dataclass(frozen=True)
class SiteFit:
    """How well one calibrated norm reproduces the LayerNorm it stands for.

    Attributes:
        site: module path.
        samples: how many tokens were seen.
        r2: share of the variance of the LayerNorm's output on the same input that the BatchNorm explains, at most 1.
        r2_original: the same for what the original model has there: what is left after the drift of all sites before.
        r2_patch, r2_prefix: r2 of patch and of prefix tokens, both about the mean over all; None where there are none.
    """

    site: str
    samples: int
    r2: float
    r2_original: float
    r2_patch: float | None = None
    r2_prefix: float | None = None


@dataclass(frozen=True)
class LayerFit:
    """How well one re-solved linear layer gives the original's activations.

    Attributes:
        layer: module path.
        role: "reader" of a norm, or "writer" to the residual stream.
        samples: how many rows (tokens, patches) were seen.
        r2_before: share of the wanted output's variance explained with the weights it had.
        r2: the same with the weights it has now; both on all images.
        penalty: relative ridge penalty, chosen on images held out; None if the layer keeps its weights.
        refined: what gradient steps left of the held-out error at the end of the branch; 1 where they were not
            needed or did not help.
        reason: why it keeps its weights; empty otherwise.
        inputs: how many it has; a writer with fewer than 10 rows for each can make other images blow up.
    """

    layer: str
    role: str
    samples: int
    r2_before: float | None = None
    r2: float | None = None
    penalty: float | None = None
    refined: float = 1.0
    reason: str = ""
    inputs: int = 0


@dataclass(frozen=True)
class StreamError:
    """How far the residual stream is from the original's where a layer has written to it.

    Each number is the mean over tokens of |converted - original| / |original - its mean over channels|. Measured on
    the first batches only.

    Attributes:
        after: the layer that wrote.
        patch_before, prefix_before: with the weights the layer had, for patch and for prefix tokens (class and
            register tokens); None where a model has none.
        patch, prefix: with the weights it has now.
    """

    after: str
    patch_before: float
    patch: float
    prefix_before: float | None = None
    prefix: float | None = None


@dataclass
class Calibration:
    """What `calibrate` found out.

    Attributes:
        sites: one entry per norm, in execution order.
        layers: one entry per layer around the norms that could be re-solved; empty for methods that do not.
        stream: the residual stream's error after each writer.
        refine_steps: gradient steps meant for every attention; None for methods without.
    """

    sites: list[SiteFit] = field(default_factory=list)
    layers: list[LayerFit] = field(default_factory=list)
    stream: list[StreamError] = field(default_factory=list)
    refine_steps: int | None = None


@dataclass(frozen=True)
class Finetuning:
    """What `finetune` did.

    Attributes:
        options: every option, as text.
        images, held_out: how many were trained on, and how many measured the rest.
        steps: how many were tried; ``dropped`` of them gave numbers that were not finite.
        loss_first, loss_last: mean training loss of the first and of the last tenth of the steps.
        kl_before, kl_after: mean KL (or relative squared error, without classes) from the original, images held out.
        kl_gain_error: standard error of the mean of kl_before - kl_after over these images.
        agreement_before, agreement_after: percent of them with the original's answer.
        taken: False if it was not closer by two standard errors, and got its old weights back.
        seconds: wall time of the training.
    """

    options: dict[str, str]
    images: int
    held_out: int
    steps: int
    dropped: int
    loss_first: float | None
    loss_last: float | None
    kl_before: float
    kl_after: float
    kl_gain_error: float
    agreement_before: float | None
    agreement_after: float | None
    taken: bool
    seconds: float

    def line(self) -> str:
        """Return what it did in one line."""
        same = ""
        if self.agreement_before is not None and self.agreement_after is not None:
            same = f", same answer {self.agreement_before:.1f} to {self.agreement_after:.1f} %"
        end = "" if self.taken else "; no sure gain, so the weights before it stay"
        steps = f"{self.steps} steps" + (f" ({self.dropped} dropped)" if self.dropped else "")
        kl = f"KL {self.kl_before:.4f} to {self.kl_after:.4f} (+-{self.kl_gain_error:.4f})"
        return f"{steps} in {self.seconds:.0f} s; {kl}{same} on {self.held_out} images held out{end}"


@dataclass
class ConversionReport:
    """Everything `convert` found out; `to_json` is what ``--json`` prints and normswap.json keeps."""

    model: str
    architecture: str
    method: str
    ffn_bn: str
    calib_samples: int
    sites: dict[str, int]
    plan: list[dict[str, Any]]
    ffns: list[dict[str, Any]]
    calibration_data: str
    evaluation_data: str
    reconstruct: str | None = None
    refine_steps: int | None = None
    out: str | None = None
    fits: list[SiteFit] = field(default_factory=list)
    layers: list[LayerFit] = field(default_factory=list)
    stream: list[StreamError] = field(default_factory=list)
    finetuning: Finetuning | None = None
    budget: Trade | None = None
    stages: list[StageMetrics] = field(default_factory=list)
    fold_max_abs_err: float | None = None
    created_biases: list[str] = field(default_factory=list)
    stock_timm: str | None = None
    worst: list[WorstImage] = field(default_factory=list)
    skipped_images: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def top1_drop(self) -> float | None:
        """Top-1 of the original minus top-1 of the last stage, in points; None without labels."""
        if not self.stages or self.stages[0].top1 is None or self.stages[-1].top1 is None:
            return None
        return self.stages[0].top1 - self.stages[-1].top1

    @property
    def stayed(self) -> dict[str, str]:
        """Why each LayerNorm that is still there is there, by module path."""
        return {site["path"]: site["reason"] for site in self.plan if site["verdict"] == "keep"}

    @property
    def calibration_passes(self) -> float | None:
        """What calibration cost, in plain forward passes of the original over the same images."""
        calibrate, forward = self.seconds.get("calibrate"), self.seconds.get("forward_pass")
        return calibrate / forward if calibrate is not None and forward else None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; the keys are a contract and only grow."""
        record = asdict(self)
        first, last = (self.stages[0], self.stages[-1]) if self.stages else (None, None)
        record["before"] = _accuracy(first)
        record["after"] = _accuracy(last)
        record["agreement"] = last.agreement if last else None
        record["kl"] = last.kl if last else None
        record["kept"] = list(self.stayed)
        record["non_finite"] = last.non_finite if last else 0
        record["calibration_passes"] = self.calibration_passes
        return plain(record)


def plain(value: Any) -> Any:
    """Return ``value`` with every NaN and infinity as None, since JSON has no words for them."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _accuracy(stage: StageMetrics | None) -> dict[str, Any]:
    if stage is None:
        return {"top1": None, "top5": None, "n": 0}
    return {"top1": stage.top1, "top5": stage.top5, "n": stage.n}


def number(value: float | int | None, digits: int = 2) -> str:
    """Return a number for a table; a dash stands for what was not measured."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, right: Iterable[str] = ()
) -> Table:
    """Return a rich table; the columns named in ``right`` are aligned to the right."""
    result = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        result.add_column(column, justify="right" if column in set(right) else "left", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def stages_table(stages: Sequence[StageMetrics], title: str | None = None) -> Table:
    """Return one row per stage: the before/after check in one look."""
    numbers = ["top-1 %", "top-5 %", "same answer %", "KL", "worst KL", "non-finite", "images"]
    rows = [
        [
            stage.name,
            number(stage.top1),
            number(stage.top5),
            number(stage.agreement),
            number(stage.kl, 4),
            number(stage.worst_kl, 4),
            str(stage.non_finite),
            str(stage.n),
        ]
        for stage in stages
    ]
    return table(["stage", *numbers], rows, title, right=numbers)


def stream_rows(stream: Sequence[StreamError], every: bool = False) -> list[list[str]]:
    """Return one row per block, or one for ``every`` layer that writes: it shows where the model was lost.

    The columns are `STREAM_COLUMNS`, errors in percent, "before" with the weights that the layer had. The mark is on
    the rows where the error rises most.
    """
    shown = [e for i, e in enumerate(stream) if every or i + 1 == len(stream) or not _same_block(e, stream[i + 1])]
    error = [0.0] + [max(e.patch, e.prefix or 0.0) for e in shown]
    rises = [now - before for before, now in pairwise(error)]
    most = min(_MARKED, len(shown) // 4)
    marked = {rise for rise in sorted(rises, reverse=True)[:most] if rise > 0}
    rows = []
    for e, rise in zip(shown, rises, strict=True):
        errors = (_percent(v) for v in (e.patch_before, e.patch, e.prefix_before, e.prefix))
        rows.append([e.after, *errors, "rises most" if rise in marked else ""])
    return rows


# Rows per input of a writer to the residual stream; with fewer, single images can be far off (docs/calibration.md).
SAFE_ROWS = 10
STREAM_COLUMNS = ("residual stream after", "patches before", "patches", "prefix before", "prefix", "")
STREAM_TITLE = "error of the residual stream, % of the original's size"
_MARKED = 3  # at most; one row in four of a short table


def _same_block(a: StreamError, b: StreamError) -> bool:
    return _block(a.after) == _block(b.after)


def _block(path: str) -> str:
    """Return the path up to its last number, as blocks.3 of blocks.3.mlp.fc2; the path itself if it has none."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else path


def _percent(value: float | None) -> str:
    return number(None if value is None else 100 * value, 1)


def stream_table(stream: Sequence[StreamError], every: bool = False) -> Table:
    """Return `stream_rows` as a table."""
    return table(STREAM_COLUMNS, stream_rows(stream, every), STREAM_TITLE, right=STREAM_COLUMNS[1:5])


def sites_table(fits: Sequence[SiteFit]) -> Table:
    """Return one row per norm: how much of LayerNorm's output an affine map of each channel explains."""
    numbers = ["tokens", "R2 same input", "of patches", "of prefix", "R2 original"]
    values = [(f, (f.r2, f.r2_patch, f.r2_prefix, f.r2_original)) for f in fits]
    rows = [[f.site, str(f.samples), *(number(r2, 4) for r2 in shares)] for f, shares in values]
    return table(["norm", *numbers], rows, "norms", numbers)


def layers_table(layers: Sequence[LayerFit]) -> Table:
    """Return one row per layer that could be re-solved."""
    numbers = ["rows", "R2 before", "R2", "penalty", "refined to"]
    rows = [
        [
            f.layer,
            f.role,
            str(f.samples),
            number(f.r2_before, 4),
            number(f.r2, 4),
            "-" if f.penalty is None else f"{f.penalty:g}",
            number(None if f.reason else f.refined),
            f"kept: {f.reason}" if f.reason else "",
        ]
        for f in layers
    ]
    return table(["layer", "role", *numbers, "weights"], rows, "layers", right=numbers)


def kept_layers(layers: Sequence[LayerFit], most: int = 3) -> list[str]:
    """Return lines that say how many layers kept their weights and why, at most ``most`` of them by name."""
    kept = [f for f in layers if f.reason]
    if not kept:
        return []
    lines = [f"{len(kept)} of {len(layers)} layers kept their weights"]
    lines += [f"{f.layer}: {f.reason}" for f in kept[:most]]
    return [*lines, f"and {len(kept) - most} more"] if len(kept) > most else lines


def scarce_rows(layers: Sequence[LayerFit]) -> str | None:
    """Return a line that says that more images are wanted and how many times as many; None if there are enough."""
    short = [f for f in layers if f.role == "writer" and not f.reason and f.samples < SAFE_ROWS * f.inputs]
    if not short:
        return None
    worst = max(short, key=lambda f: f.inputs / max(f.samples, 1))
    times = SAFE_ROWS * worst.inputs / max(worst.samples, 1)
    return (
        f"{len(short)} of {len(layers)} layers were solved from fewer than {SAFE_ROWS} rows per input ({worst.layer}: "
        f"{worst.samples} rows, {worst.inputs} inputs): look at worst KL, or give {times:.1f} times the images"
    )


def render(renderable: Table, width: int = 120) -> str:
    """Return a table as plain text of at most ``width`` columns."""
    console = Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())
