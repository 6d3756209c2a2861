"""What the report shows in pictures, in a few lines: for the terminal and the model card."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from .report import SiteFit
from .worst import Answer, WorstImage

WORST_TITLE = "the images that changed most"
WORST_COLUMNS = ("image", "label", "original", "converted", "KL")


def printable(value: Any) -> Any:
    """Return ``value`` with every character replaced that is not to be shown: control, direction, half a pair.

    File names and class names are others' text.
    """
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)
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
