"""Draw top-1 against learning rate."""

import math
import statistics
from pathlib import Path

import click

from report import NAMES, Row, distinct, known, pick  # isort: skip  # beside this file

# Okabe and Ito's colours, told apart by those who do not see red and green; a shape each besides.
LOOKS = {
    "layernorm": ("#000000", "o"),
    "batchnorm": ("#D55E00", "s"),
    "pre-act": ("#0072B2", "^"),
    "post-act": ("#009E73", "v"),
}


def plot(runs: list[Row], path: Path) -> None:
    """Draw top-1 against learning rate, one panel per depth, every run a mark, on white for light and dark pages."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise click.ClickException("--report draws with matplotlib: pip install matplotlib") from error
    rates, depths = distinct(runs, "lr"), distinct(runs, "depth")
    figure = Figure(figsize=(9, 4.5), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots(1, len(depths), sharey=True, squeeze=False)[0]
    for panel, depth in zip(axes, depths, strict=True):
        for i, (name, (colour, shape)) in enumerate(LOOKS.items()):
            # Side by side, or marks of the same accuracy would hide each other.
            places = [rate + 0.12 * (i - 1.5) for rate in range(len(rates))]
            means = []
            for place, lr in zip(places, rates, strict=True):
                rows = pick(runs, depth=depth, variant=name, lr=lr)
                finished = known(rows, "top1")
                means.append(statistics.fmean(finished) if finished else math.nan)
                panel.plot(
                    [place] * len(finished), finished, shape, color=colour, markersize=4, markerfacecolor="white"
                )
                lost = len(rows) - len(finished)
                panel.plot([place] * bool(lost), [2] * bool(lost), "x", color=colour, markersize=8, markeredgewidth=2)
            panel.plot(places, means, "-", color=colour, marker=shape, markersize=7, label=NAMES[name])
        panel.axhline(10, color="#666666", linestyle=":", linewidth=1)
        panel.set_title(f"depth {depth}")
        panel.set_xticks(range(len(rates)), [f"{lr:g}" for lr in rates])
        panel.set_xlabel("learning rate")
        panel.set_xlim(-0.5, len(rates) - 0.5)
        panel.set_ylim(0, 100)
        panel.grid(axis="y", color="#DDDDDD")
        panel.set_axisbelow(True)
    axes[0].set_ylabel("top-1 %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(NAMES), frameon=False)
    figure.suptitle("Line: mean. Small mark: one run. Cross at 2: crashed. Dotted: guessing.", fontsize="medium")
    figure.savefig(path)
