"""Measure fine-tuning: where it starts, how it trains, what it wins, and whether it ever makes a model worse.

    python benchmarks/finetuning.py -m local-dir:../shared/models/vits14_cifar10 --data-dir ../shared/data/cifar10 \
        --samples 6000 --epochs 3 --start reconstruct --start channel --start moments

Every combination of the repeatable options is one row, written to the output file as soon as it is known; a run that
is stopped goes on where it was. No labels are used in training. One image in ten, at most 512, is held out of
calibration and training and decides whether training was a gain; accuracy is measured on the validation split.
"""

import copy
import json
import platform
import time
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path

import click
import torch

import normswap
from normswap.calibration.options import SHARE
from normswap.finetuning.holdout import held_out_of
from normswap.inputs.dataset import ImageSet, load_splits
from normswap.progress import Progress
from normswap.records.provenance import versions
from normswap.records.report import StageMetrics

SAY_EVERY = 20  # seconds
RESULTS = {"top1": ".2f", "agreement": ".2f", "kl": ".3f"}


@dataclass(frozen=True)
class Start:
    """A calibrated model, and the images to go on with."""

    swapped: torch.nn.Module
    train: list
    held_out: list
    evaluation: list
    before: StageMetrics
    seconds: float


def start_of(original: torch.nn.Module, images: ImageSet, evaluation: list, row: dict, calibrate: int | None) -> Start:
    """Calibrate as the row says."""
    held = held_out_of(row["samples"])
    train = list(images.draw(row["samples"] - held, row["seed"]))
    held_out = list(images.draw(held, row["seed"], row["samples"] - held))
    swapped = normswap.swap_norms(original, ffn_bn=row["ffn_bn"])
    begun = time.perf_counter()
    batches = [batch for batch, _ in train]
    if calibrate is not None:
        batches = [torch.cat(batches)[:calibrate]]
    normswap.calibrate(
        swapped,
        batches,
        original=original,
        options=normswap.CalibrationOptions(method=row["start"], refine_steps=row["refine_steps"]),
    )
    seconds = time.perf_counter() - begun
    click.echo(f"calibrated in {seconds:.0f} s", err=True)
    _, before = normswap.evaluate_models({"original": original, "before": swapped.eval()}, evaluation)
    return Start(swapped, train, held_out, evaluation, before, seconds)


def measure(original: torch.nn.Module, start: Start, row: dict) -> dict:
    """Return ``row`` with what came out."""
    swapped, before = copy.deepcopy(start.swapped), start.before
    options = normswap.FinetuneOptions(
        epochs=row["epochs"],
        lr=row["lr"],
        opt=row["opt"],
        bn_mode=row["bn_mode"],
        batch_size=row["batch_size"],
        hflip=row["hflip"],
        scale=row["scale"],
        views=row["views"],
        amp_dtype=torch.bfloat16 if row["amp"] else None,
        seed=row["seed"],
    )
    try:
        found = normswap.finetune(swapped, start.train, original, options, held_out=start.held_out, progress=told())
    except normswap.CalibrationError as error:
        return row | {"stopped": str(error), "top1_before": before.top1, "agreement_before": before.agreement}
    fused = normswap.fold_norms(swapped.eval())
    first, after = normswap.evaluate_models({"original": original, "after": fused}, start.evaluation)
    return row | {
        "original": first.top1,
        "top1_before": before.top1,
        "top1": after.top1,
        "agreement_before": before.agreement,
        "agreement": after.agreement,
        "kl_before": before.kl,
        "kl": after.kl,
        "worst_kl": after.worst_kl,
        "non_finite": after.non_finite,
        "evaluated": after.n,
        "held_out_kl": [found.kl_before, found.kl_after, found.kl_gain_error],
        "taken": found.taken,
        "steps": found.steps,
        "dropped": found.dropped,
        "seconds": {"calibrate": round(start.seconds, 1), "finetune": found.seconds},
    }


def told() -> Progress:
    """Return a progress that says now and then how far it is."""
    last = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last > SAY_EVERY:
            last = time.monotonic()
            click.echo(f"{what}, {done} of {total}", err=True)

    return progress


def machine_of(device: str, threads: int) -> str:
    """Return what computed."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {threads} thread(s) of {torch.backends.cpu.get_cpu_capability()}"


def _steps(row: dict) -> str:
    if row["start"] != "reconstruct":
        return "-"
    return "default" if row["refine_steps"] is None else str(row["refine_steps"])


def settings_of(row: dict) -> dict[str, str]:
    """Return what was set, as the columns of a table."""
    return {
        "start": row["start"],
        "refine steps": _steps(row),
        "FFN BN": row["ffn_bn"],
        "BN mode": row["bn_mode"],
        "lr": f"{row['lr']:g}",
        "batch": str(row["batch_size"]),
        "images": str(row["samples"]),
        "epochs": str(row["epochs"]),
        "mirror and crop": "yes" if row["hflip"] or row["scale"] < 1 else "no",
        "corrupted": f"{row.get('views', 0.0):g}",
        "seed": str(row["seed"]),
        "on": row["device"],
    }


def results_of(row: dict) -> dict[str, str]:
    """Return what came out, as the columns of a table."""
    names = ("original (%)", "top-1 (%) before, after", "top-1 agreement (%) before, after", "KL before, after")
    if "stopped" in row:
        cells = ["-", f"{row['top1_before']:.2f}, -", f"{row['agreement_before']:.2f}, -", "-"]
        return {"steps": "-", **dict(zip(names, cells, strict=True)), "KL held out before, after": "-", "taken": "NaN"}
    before, after, *error = row["held_out_kl"]
    cells = [
        f"{row['original']:.2f}",
        *(f"{row[f'{name}_before']:{form}}, {row[name]:{form}}" for name, form in RESULTS.items()),
    ]
    held_out = f"{before:.3f}, {after:.3f}" + "".join(f" +-{value:.3f}" for value in error)
    found = {"KL held out before, after": held_out, "taken": "yes" if row["taken"] else "no"}
    return {"steps": str(row["steps"]), **dict(zip(names, cells, strict=True)), **found}


def tables(rows: list[dict]) -> str:
    """Return the rows as Markdown, a table for each model and BN mode; what all of its rows share stands above it."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["bn_mode"]), []).append(row)
    parts = []
    for group in groups.values():
        settings = [settings_of(row) for row in group]
        shared = {name for name in settings[0] if len({s[name] for s in settings}) == 1}
        told = ", ".join(f"{name} {settings[0][name]}" for name in settings[0] if name in shared)
        lines = [
            {name: cell for name, cell in {**s, **results_of(row)}.items() if name not in shared}
            for s, row in zip(settings, group, strict=True)
        ]
        head = [list(lines[0]), ["---"] * len(lines[0])]
        parts += [f"All of: {told}.", "", *(f"| {' | '.join(c)} |" for c in [*head, *(x.values() for x in lines)]), ""]
    return "\n".join(parts)


@click.command()
@click.option("-m", "--model", required=True)
@click.option("--data-dir", required=True, type=click.Path(exists=True))
@click.option("--start", "starts", multiple=True, default=("reconstruct",), show_default=True)
@click.option("--ffn-bn", "positions", multiple=True, default=("pre-act",), show_default=True)
@click.option("--bn-mode", "modes", multiple=True, default=("frozen",), show_default=True)
@click.option("--lr", "rates", multiple=True, type=float, default=(normswap.FinetuneOptions.lr,), show_default=True)
@click.option("--seed", "seeds", multiple=True, type=int, default=(42,), show_default=True)
@click.option("--opt", default=normswap.FinetuneOptions.opt, show_default=True)
@click.option("--hflip", default=normswap.FinetuneOptions.hflip, show_default=True)
@click.option("--scale", default=normswap.FinetuneOptions.scale, show_default=True)
@click.option("--views", default=SHARE, show_default=True, help="Share of the training images that are corrupted.")
@click.option("--batch-size", default=normswap.FinetuneOptions.batch_size, show_default=True)
@click.option("--samples", default=6000, show_default=True, help="Training images, with those held out.")
@click.option("--calibrate", type=int, help="Calibrate on so many of them [all but those held out].")
@click.option("--refine-steps", type=click.IntRange(0), help="Of the calibration.  [as `convert` does]")
@click.option("--epochs", default=3, show_default=True)
@click.option("--eval-samples", type=int, help="Evaluate on a random part [all of validation].")
@click.option("--amp", is_flag=True, help="Train in bfloat16.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--workers", default=0, show_default=True, help="Processes that read images.")
@click.option("--threads", default=1, show_default=True)
@click.option("--out", default="docs/finetuning.json", show_default=True, type=click.Path(path_type=Path))
def main(
    model: str,
    data_dir: str,
    starts: tuple[str, ...],
    positions: tuple[str, ...],
    modes: tuple[str, ...],
    rates: tuple[float, ...],
    seeds: tuple[int, ...],
    opt: str,
    hflip: float,
    views: float,
    scale: float,
    batch_size: int,
    samples: int,
    calibrate: int | None,
    refine_steps: int | None,
    epochs: int,
    eval_samples: int | None,
    amp: bool,
    device: str,
    workers: int,
    threads: int,
    out: Path,
) -> None:
    """Measure what is missing in the output file and print the tables."""
    if device != "cpu" and not torch.cuda.is_available():
        raise click.UsageError(f"--device {device}: torch finds no GPU here")
    torch.set_num_threads(threads)
    original = normswap.load_model(model).to(device).eval()
    images, validation = load_splits(original, data_dir, "train", "validation", workers=workers)
    evaluation = list(validation.draw(eval_samples, 42) if eval_samples else validation)
    record = json.loads(out.read_text()) if out.exists() else {"rows": []}
    machine = machine_of(device, threads)
    last, begin = None, None
    for start, ffn_bn, seed, mode, lr in product(starts, positions, seeds, modes, rates):
        row = {
            "model": model,
            "start": start,
            "refine_steps": refine_steps,
            "ffn_bn": ffn_bn,
            "bn_mode": mode,
            "lr": lr,
            "seed": seed,
        }
        row |= {
            "opt": opt,
            "hflip": hflip,
            "views": views,
            "scale": scale,
            "samples": min(samples, len(images)),
            "epochs": epochs,
            "batch_size": batch_size,
            "device": torch.device(device).type,
            "amp": amp,
        }
        if any(row.items() <= known.items() for known in record["rows"]):
            continue
        of = {name: row[name] for name in ("start", "ffn_bn", "seed")}
        if of != last:  # rows of one start follow each other
            last, begin = of, start_of(original, images, evaluation, row, calibrate)
        found = measure(original, begin, row)
        record["rows"].append(found | {"machine": machine, "date": str(date.today()), "versions": versions()})
        out.write_text(json.dumps(record, indent=1) + "\n")
        click.echo(json.dumps(found), err=True)
    click.echo(tables(record["rows"]))


if __name__ == "__main__":
    main()
