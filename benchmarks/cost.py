"""Measure what calibration costs on an architecture: passes, seconds and peak memory, with random weights and images.

    python benchmarks/cost.py -m vit_base_patch16_224 --images 1500 --threads 1

Cost does not depend on what the weights have learnt, so no checkpoint is needed. Prints one line of JSON.
"""

import json
import platform
import resource
import time
from datetime import date

import click
import timm
import torch

import normswap
from normswap.inputs.batches import BATCH_SIZE
from normswap.records.provenance import versions


def peak_gib() -> float:
    """Return the peak resident memory of this process so far, in GiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@click.command()
@click.option("-m", "--model", default="vit_base_patch16_224", show_default=True)
@click.option("--images", default=1500, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--memory-budget", default=None, type=float, help="GiB of activations in memory.")
def main(model: str, images: int, threads: int, memory_budget: float | None) -> None:
    """Convert random weights on random images and print what that took."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    original = timm.create_model(model, num_classes=10).eval()
    batches = torch.randn(images, *original.pretrained_cfg["input_size"]).split(BATCH_SIZE)
    swapped = normswap.swap_norms(original)

    def plain_pass() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            for batch in batches:
                original(batch)
        return time.perf_counter() - start

    passes, before = [plain_pass()], peak_gib()
    start = time.perf_counter()
    budget = None if memory_budget is None else int(memory_budget * 2**30)
    normswap.calibrate(swapped, batches, original=original, options=normswap.CalibrationOptions(memory_budget=budget))
    seconds = time.perf_counter() - start
    peak = peak_gib()
    passes.append(plain_pass())
    result = {
        "model": model,
        "images": images,
        "forward_pass": [round(t, 1) for t in passes],
        "calibrate": round(seconds, 1),
        "passes": round(2 * seconds / sum(passes), 2),
        "peak_gib_before": round(before, 2),
        "peak_gib": round(peak, 2),
        "memory_budget_gib": memory_budget,
        "machine": f"{platform.machine()}, {threads} thread(s) of {torch.backends.cpu.get_cpu_capability()}",
        "date": str(date.today()),
        "versions": versions(),
    }
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
