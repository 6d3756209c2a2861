"""Measure what views and bounds are worth: clean accuracy, and all rows of the stress test, against seed and options.

    python benchmarks/robustness.py -m local-dir:../shared/models/vits14_cifar10 --data-dir ../shared/data/cifar10

Each row is written to the output file as soon as it is known, so a run that is stopped keeps what it measured, and one
that is started again goes on. With ``--without FAMILY`` calibration sees no corruption of that family, and only
that family is tested.
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
from calibration import plain_pass

import normswap
from normswap.calibration.options import AUTO, BOUNDS
from normswap.calibration.views import viewed
from normswap.evaluation.corruptions import FAMILIES, without
from normswap.evaluation.stress import STRESS
from normswap.inputs.batches import BATCH_SIZE, ImageBatches
from normswap.inputs.dataset import load_splits
from normswap.inputs.normalisation import Normalisation
from normswap.records.provenance import versions
from normswap.records.stress import StressRecord

_SHOWN = ("images", "bound", "views", "without")


def measure(
    original: torch.nn.Module, train: Any, validation: list, images_of_rows: Any, key: dict, fp16: float, answers: dict
) -> dict:
    """Convert with the options in ``key`` and return what was measured; ``answers`` are the original's, once known."""
    images = train.draw(key["images"], key["seed"])
    batches = ImageBatches(images, next(original.parameters()))
    seen = without(key["without"]) if key["without"] else without()
    corrupted = viewed(batches, Normalisation.of(images, original), key["views"], seen)
    swapped = normswap.swap_norms(original)
    pixels = torch.cat(list(batches))
    before = plain_pass(original, pixels)
    start = time.perf_counter()
    options = normswap.CalibrationOptions(bound=key["bound"], views=0.0)  # the batches have their views already
    found = normswap.calibrate(swapped, corrupted, original=original, options=options)
    seconds = time.perf_counter() - start
    passes = sorted([before, plain_pass(original, pixels)])
    fused = normswap.fold_norms(swapped.eval())
    first, last = normswap.evaluate_models({"original": original, "fused": fused}, validation, answers=answers)
    rows = [case for case in STRESS if key["without"] in (None, case.corruption.family)]
    record = normswap.stress_models(original, fused, images_of_rows, rows, fp16=fp16)
    return {
        "original": first.top1,
        "top1": last.top1,
        "agreement": last.agreement,
        "kl": last.kl,
        "worst_kl": last.worst_kl,
        "evaluated": last.n,
        "seconds": seconds,
        "passes": seconds / mean(passes),
        "bounds": [fit.bound for fit in found.sites],
        "stress": record.to_json(),
    }


def table(rows: list[dict]) -> str:
    """Return the rows as Markdown, the mean over the seeds."""
    lines = [
        "| images | bound | views | without | seeds | lost points | agreement % | KL | passes | corrupted: top-1 %, "
        "original and converted | agreement % | lowest | most points lost in a row | largest logit | worst KL |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in _SHOWN), []).append(row)
    for key, group in groups.items():
        records = [StressRecord.from_json(row["stress"]) for row in group]
        every = [row for record in records for row in record.rows]
        counted = [row for record in records for row in record.counted]

        def of(name: str, digits: int, group: list[dict] = group) -> str:
            return f"{mean(row[name] for row in group):.{digits}f}"

        lost = mean(row["original"] - row["top1"] for row in group)
        top1 = [mean(values) for values in zip(*(record.mean_top1 or (0, 0) for record in records), strict=True)]
        worst = max(counted, key=lambda row: row.loss or 0)
        logits = max(every, key=lambda row: row.largest_logit)
        originals = max(row.largest_logit_original for row in every)
        cells = [
            *("-" if value is None else str(value) for value in key),
            str(len(group)),
            f"{lost:.2f}",
            *(of("agreement", 1), of("kl", 3), of("passes", 1)),
            f"{top1[0]:.1f}, {top1[1]:.1f}",
            f"{mean(record.mean_agreement or 0 for record in records):.1f}",
            f"{min(row.agreement or 0 for row in counted):.1f}",
            f"{worst.loss:.1f} ({worst.name})",
            f"{logits.largest_logit:.1f} (original {originals:.1f})",
            f"{max(row.worst_kl or 0 for row in every):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@click.command()
@click.option("-m", "--model", required=True)
@click.option("--data-dir", required=True, type=click.Path(exists=True))
@click.option("--images", "sizes", multiple=True, type=int, default=(1500,))
@click.option("--seed", "seeds", multiple=True, type=int, default=(42, 0, 1))
@click.option("--bound", "bounds", multiple=True, type=click.Choice([AUTO, *BOUNDS]), default=(AUTO,))
@click.option("--views", multiple=True, type=float, default=(0.5,))
@click.option("--without", "families", multiple=True, type=click.Choice(FAMILIES[:-1]))
@click.option("--evaluate", "evaluated", default=5000, show_default=True, help="clean validation images")
@click.option("--stress", default=200, show_default=True, help="validation images of each stress row")
@click.option("--fp16", default=0.0, show_default=True, help="share of them that run in half precision, too")
@click.option("--threads", default=1, show_default=True)
@click.option("--out", default="docs/robustness.json", show_default=True, type=click.Path(path_type=Path))
def main(
    model: str,
    data_dir: str,
    sizes: tuple[int, ...],
    seeds: tuple[int, ...],
    bounds: tuple[str, ...],
    views: tuple[float, ...],
    families: tuple[str, ...],
    evaluated: int,
    stress: int,
    fp16: float,
    threads: int,
    out: Path,
) -> None:
    """Measure what is missing in the output file and print the table."""
    torch.set_num_threads(threads)
    original = normswap.load_model(model).eval()
    train, validation = load_splits(original, data_dir, "train", "validation")
    validation = validation.draw(evaluated, seed=0)
    clean, answers = list(validation), {}
    records = json.loads(out.read_text()) if out.exists() else {}
    name = model.rstrip("/").rpartition("/")[2]
    record = records.setdefault(name, {"rows": []})
    machine = f"{platform.machine()}, {threads} thread of {torch.backends.cpu.get_cpu_capability()}"
    record |= {"machine": machine, "date": str(date.today()), "batch": BATCH_SIZE, "versions": versions()}
    for seed, size, bound, share, family in product(seeds, sizes, bounds, views, families or (None,)):
        key = {"images": size, "seed": seed, "bound": bound, "views": share, "without": family}
        if any(key.items() <= row.items() for row in record["rows"]):
            continue
        images = validation.draw(stress, seed)
        record["rows"].append(key | measure(original, train, clean, images, key, fp16, answers))
        known = json.loads(out.read_text()) if out.exists() else {}  # another process may measure another model
        out.write_text(json.dumps(known | {name: record}, indent=1) + "\n")
    click.echo(table(record["rows"]))


if __name__ == "__main__":
    main()
