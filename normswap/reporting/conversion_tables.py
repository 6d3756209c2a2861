"""What the report shows in pictures, in a few lines: for the terminal and the model card."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from rich.table import Table

from ..atomic import decoded
from ..records.report import LayerFit, SiteFit, StageMetrics, StreamError
from ..records.worst_images import Answer, WorstImage
from ..tables import number, table


def stages_table(stages: Sequence[StageMetrics], title: str | None = None) -> Table:
    """Return one row per stage: the before/after check in one look."""
    numbers = ["top-1 %", "top-5 %", "agreement %", "KL", "worst KL", "non-finite", "images"]
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


def bounds_line(fits: Sequence[SiteFit]) -> str:
    """Return how many norms have which bound, empty if none has one.

    >>> bounds_line([SiteFit("norm1", 9, 1.0, 1.0, bound="tight"), SiteFit("norm2", 9, 1.0, 1.0)])
    '1 tight, 1 none'
    """
    counts = Counter(fit.bound for fit in fits)
    names = [f"{count} {name}" for name, count in counts.most_common() if name != "none"]
    return ", ".join([*names, *([f"{counts['none']} none"] if counts["none"] else [])]) if names else ""


def stream_table(stream: Sequence[StreamError], every: bool = False) -> Table:
    """Return `stream_rows` as a table."""
    return table(STREAM_COLUMNS, stream_rows(stream, every), STREAM_TITLE, right=STREAM_COLUMNS[1:5])


def sites_table(fits: Sequence[SiteFit]) -> Table:
    """Return one row per norm: how much of LayerNorm's output an affine map of each channel explains."""
    numbers = ["tokens", "R2 same input", "of patches", "of prefix", "R2 original"]
    values = [(f, (f.r2, f.r2_patch, f.r2_prefix, f.r2_original)) for f in fits]
    rows = [[f.site, str(f.samples), *(number(r2, 4) for r2 in shares), f.bound] for f, shares in values]
    return table(["norm", *numbers, "bound"], rows, "norms", numbers)


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


WORST_TITLE = "the images that changed most"
WORST_COLUMNS = ("image", "label", "original", "converted", "KL")


def printable(value: Any) -> Any:
    """Return ``value`` with every character replaced that is not to be shown: control, direction, half a pair.

    File names and class names are others' text.
    """
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in decoded(value))
    if isinstance(value, Mapping):
        return {printable(k): printable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [printable(v) for v in value]
    return value


def fit_line(fits: Sequence[SiteFit]) -> str | None:
    """Return in one line how well BatchNorm stands in for the LayerNorms, None without any."""
    if not fits:
        return None
    worst = min(fits, key=lambda f: f.r2)
    line = f"R2 of the norms: median {median(f.r2 for f in fits):.3f}, lowest {worst.r2:.3f} ({worst.site})"
    prefix = [(f.r2_prefix, f.site) for f in fits if f.r2_prefix is not None]
    if prefix:
        lowest, site = min(prefix)
        line += f"; on prefix tokens median {median(r2 for r2, _ in prefix):.3f}, lowest {lowest:.3f} ({site})"
    return line


def worst_rows(images: Sequence[WorstImage], most: int | None = None) -> list[list[str]]:
    """Return one row of text per image, the columns being `WORST_COLUMNS`, at most ``most`` rows."""
    return [
        printable([i.name, "-" if i.label is None else i.label, _first(i.original), _first(i.converted), f"{i.kl:.3f}"])
        for i in images[:most]
    ]


def _first(answers: Sequence[Answer]) -> str:
    return f"{answers[0].name} {answers[0].percent:.1f} %" if answers else "not finite"
