"""Measure calibration: top-1, agreement and cost against method, number of images and seed.

    python benchmarks/calibration.py -m local-dir:../shared/models/vits14_cifar10 --data-dir ../shared/data/cifar10

Each row is written to the output file as soon as it is known, so a run that is stopped keeps what it measured, and one
that is started again goes on. The cost is the time of `calibrate` in passes: divided by the time of one plain pass of
the original over the same images, measured right before and after it in the same process.
"""

import json
import platform
import time
from datetime import date
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch

import normswap
from normswap.inputs.batches import BATCH_SIZE
from normswap.inputs.dataset import load_splits
from normswap.records.provenance import versions


class Recorded(torch.nn.Module):
    """The original, which answers the same evaluation batches again and again, run once."""

    def __init__(self, model: torch.nn.Module, batches: list) -> None:
        super().__init__()
        self.model = model
        with torch.no_grad():
            self.outputs = [model(images) for images, _ in batches]
        self.at = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the answers `[B, K]` to the next batch."""
        output = self.outputs[self.at % len(self.outputs)]
        self.at += 1
        return output


def plain_pass(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Return the seconds that the model takes for all images `[N, C, H, W]`."""
    start = time.perf_counter()
    with torch.no_grad():
        for batch in images.split(BATCH_SIZE):
            model(batch)
    return time.perf_counter() - start


def measure(model: torch.nn.Module, recorded: Recorded, images: torch.Tensor, evaluation: list, **options: Any) -> dict:
    """Return one row of the table."""
    swapped = normswap.swap_norms(model)
    before = plain_pass(model, images)
    start = time.perf_counter()
    normswap.calibrate(
        swapped, images.split(BATCH_SIZE), original=model, options=normswap.CalibrationOptions(**options)
    )
    seconds = time.perf_counter() - start
    passes = sorted([before, plain_pass(model, images)])
    fused = normswap.fold_norms(swapped.eval())
    original, stage = normswap.evaluate_models({"original": recorded, "fused": fused}, evaluation)
    return {
        "original": original.top1,
        "top1": stage.top1,
        "agreement": stage.agreement,
        "kl": stage.kl,
        "worst_kl": stage.worst_kl,
        "evaluated": stage.n,
        "seconds": seconds,
        "passes": seconds / mean(passes),
        "passes_range": [seconds / passes[1], seconds / passes[0]],
    }


def table(rows: list[dict]) -> str:
    """Return the rows as Markdown, the mean over the seeds and their spread."""
    lines = [
        "| method | images | seeds | top-1 (%) | lost points | top-1 agreement (%) | KL | worst KL | cost in passes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, int, int], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["images"], row["refine_steps"] or 0), []).append(row)
    for (method, count, steps), group in sorted(groups.items()):
        method += f", {steps} steps" if steps else ""

        def span(key: str, digits: int, group: list[dict] = group) -> str:
            found = [row[key] for row in group]
            text = f"{mean(found):.{digits}f}"
            spread = f" ({min(found):.{digits}f} to {max(found):.{digits}f})"
            return text + (spread if len(found) > 1 else "")

        lost = mean(row["original"] - row["top1"] for row in group)
        worst = max(row["worst_kl"] for row in group)
        lines.append(
            f"| {method} | {count} | {len(group)} | {span('top1', 2)} | {lost:.2f} | {span('agreement', 2)} | "
            f"{span('kl', 3)} | {worst:.1f} | {span('passes', 1)} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("-m", "--model", required=True)
@click.option("--data-dir", required=True, type=click.Path(exists=True))
@click.option("--method", "methods", multiple=True, default=("reconstruct", "readers", "channel", "moments"))
@click.option("--images", "sizes", multiple=True, type=int, default=(128, 512, 1500, 5000))
@click.option("--seed", "seeds", multiple=True, type=int, default=(42, 0, 1))
@click.option("--refine-steps", "steps", multiple=True, type=click.IntRange(1), help="[as `convert` does]")
@click.option("--threads", default=1, show_default=True)
@click.option("--out", default="docs/calibration.json", show_default=True, type=click.Path(path_type=Path))
def main(
    model: str,
    data_dir: str,
    methods: tuple[str, ...],
    sizes: tuple[int, ...],
    seeds: tuple[int, ...],
    steps: tuple[int, ...],
    threads: int,
    out: Path,
) -> None:
    """Measure what is missing in the output file and print the table."""
    torch.set_num_threads(threads)
    original = normswap.load_model(model)
    train, validation = load_splits(original, data_dir, "train", "validation")
    record = json.loads(out.read_text()) if out.exists() else {"rows": []}
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread of {torch.backends.cpu.get_cpu_capability()}"
    record |= {"model": model, "machine": machine, "date": str(date.today()), "versions": versions()}
    evaluation = list(validation)
    recorded = Recorded(original.eval(), evaluation)
    for size in sizes:
        for seed in seeds:
            images = None
            for count, method in product(steps or (None,), methods):
                key = {"method": method, "images": size, "seed": seed, "refine_steps": count}
                if any(key.items() <= row.items() for row in record["rows"]):
                    continue
                if images is None:
                    images = torch.cat([batch for batch, _ in train.draw(size, seed)])
                options = {"method": "reconstruct", "reconstruct": "readers"} if method == "readers" else {}
                # The methods alone: benchmarks/robustness.py measures what views and bounds add.
                options = {**(options or {"method": method}), "refine_steps": count, "views": 0.0, "bound": "none"}
                found = measure(original, recorded, images, evaluation, **options)
                record["rows"].append(key | found)
                out.write_text(json.dumps(record, indent=1) + "\n")
                click.echo(json.dumps(key | found), err=True)
    click.echo(table(record["rows"]))


if __name__ == "__main__":
    main()
