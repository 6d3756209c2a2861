"""Draw docs/overview.png from what the other scripts measured: what is left of a model after each way to convert it.

python benchmarks/picture.py
"""

import json
from pathlib import Path
from statistics import mean

import click
import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend without a screen

_DOCS = Path(__file__).resolve().parents[1] / "docs"


def bars(calibration: dict, finetuning: dict) -> list[tuple[str, float, float]]:
    """Return label, top-1 and agreement in percent of each way, worst first."""
    found = []
    labels = {
        "moments": "mean and\nvariance\n(moments)",
        "channel": "affine by\nleast squares\n(channel)",
        "reconstruct": "adjacent\nlayers refitted\n(reconstruct)",
    }
    for method, label in labels.items():
        wanted = {"method": method, "images": 1500, "refine_steps": None}
        rows = [row for row in calibration["rows"] if wanted.items() <= row.items()]
        if rows:
            found.append((label, mean(r["top1"] for r in rows), mean(r["agreement"] for r in rows)))
    wanted = {"model": calibration["model"], "start": "reconstruct", "samples": 6000, "refine_steps": None}
    tuned = [r for r in finetuning["rows"] if wanted.items() <= r.items() and "top1" in r]
    if not tuned:
        raise click.ClickException("docs/finetuning.json has no run from the default calibration on 6,000 images")
    for epochs in sorted({row["epochs"] for row in tuned}):
        rows = [row for row in tuned if row["epochs"] == epochs]
        label = f"and\nfine-tuned\n({epochs} epochs)"
        found.append((label, mean(r["top1"] for r in rows), mean(r["agreement"] for r in rows)))
    return found


@click.command()
@click.option("--out", default=_DOCS / "overview.png", show_default=True, type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Draw the picture."""
    calibration = json.loads((_DOCS / "calibration.json").read_text())
    finetuning = json.loads((_DOCS / "finetuning.json").read_text())
    found = bars(calibration, finetuning)
    original = calibration["rows"][0]["original"]
    figure, axes = plt.subplots(figsize=(8, 3.6), dpi=110, layout="constrained")
    places = range(len(found))
    for shift, index, name, colour in (
        (-0.2, 1, "top-1", "#0072b2"),
        (0.2, 2, "top-1 agreement with the original", "#9aa5b1"),
    ):
        drawn = axes.bar([p + shift for p in places], [row[index] for row in found], 0.38, label=name, color=colour)
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the dashed line stays behind the figures
        axes.bar_label(drawn, fmt="%.1f", fontsize=8, bbox=paper, padding=1.5)
    axes.axhline(original, color="#333333", linewidth=1, linestyle="--")
    axes.text(-0.45, original + 1, f"original's top-1, {original:.1f}", fontsize=8)
    axes.set_xticks(list(places), [row[0] for row in found], fontsize=8)
    axes.set_ylim(0, 100)
    axes.set_ylabel("%")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.7))
    axes.set_title("ViT-S/14 without LayerNorm, 5,000 small photos of ten classes", fontsize=9)
    figure.savefig(out, metadata={"Software": None})
    click.echo(str(out))


if __name__ == "__main__":
    main()
