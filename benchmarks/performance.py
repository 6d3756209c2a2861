"""Measure speed without LayerNorm on six architectures and write docs/performance.md.

    python benchmarks/performance.py --device cpu --threads 1 --clock cpu
    python benchmarks/performance.py --device cuda
    python benchmarks/performance.py --render --add elsewhere.json

Speed does not depend on what the weights have learnt, so they are random, and each fused model is set from a few random
images. Every case is added to the results as soon as it is known; a run that is started again skips what is there, so
results of several machines and runs add up. Compiling takes most of a GPU's time, so one process per model may prepare
while another is timed: give each its own ``--out`` and all the same ``--lock``, then put their results together.
"""

import fcntl
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import click
import timm
import torch

import normswap
from normswap.benchmarking.benchmark import benchmark_models
from normswap.benchmarking.options import EAGER, ONNXRUNTIME
from normswap.benchmarking.variants import stand_in
from normswap.errors import BenchmarkError

from performance_document import GPU_BATCHES, GPU_ENGINES, GPU_PRECISIONS, MODELS, document  # isort: skip


def processor() -> str:
    """Return the processor's name as Linux tells it, or the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def key(record: dict[str, Any]) -> list[Any]:
    """Return what makes two measurements the same case."""
    settings = record["settings"]
    row = record["results"][0]
    names = ("device", "precision", "threads", "clock")
    return [record["machine"], record["model"], row["engine"], row["infer_batch_size"], *(settings[n] for n in names)]


@contextmanager
def locked(path: Path | None) -> Iterator[None]:
    """Wait for a lock file, and hold it."""
    if path is None:
        yield
        return
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measure(name: str, cases: list[tuple[str, str, int]], options: dict[str, Any], records: list, path: Path) -> None:
    """Measure the cases (precision, engine, batch size) of one model that are not known yet."""
    built: list[torch.nn.Module] = []
    for precision, engine, batch_size in cases:
        device = options["device"]
        known = [
            options["machine"],
            name,
            engine,
            batch_size,
            "cpu" if device == "cpu" else torch.cuda.get_device_name(device),
            precision,
            torch.get_num_threads(),
            options["clock"] if device == "cpu" else "cuda events",
        ]
        if known in [key(record) for record in records]:
            continue
        if not built:
            torch.manual_seed(0)
            original = timm.create_model(name).eval()
            built = [original, stand_in(original, bound="none")]
        try:
            result = benchmark_models(
                *built,
                batch_sizes=[batch_size],
                engines=[engine],
                rounds=options["rounds"],
                device=device,
                dtype=getattr(torch, precision),
                clock=options["clock"],
                name=name,
                alone=lambda: locked(options["lock"]),
            )
        except BenchmarkError as error:
            click.echo(f"{name}, {engine}, batch {batch_size}, {precision}: {error}", err=True)
            continue
        when = str(date.today())
        record = {"machine": options["machine"], "date": when, "shared": options["shared"], **result.to_json()}
        records.append(record)
        path.write_text(json.dumps(records, indent=1) + "\n")
        click.echo("\n".join([f"{name}, {precision}", *result.lines()[1:]]), err=True)


@click.command()
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda")
@click.option("-m", "--models", default=",".join(MODELS.values()), help="timm's names, with commas between")
@click.option("--engines", help="of eager, compile, onnxruntime [cpu: eager; cuda: eager,compile]")
@click.option("-b", "--batch-sizes", help="with commas between [cpu: 1; cuda: 1,128]")
@click.option("--precisions", help="with commas between [cpu: float32; cuda: float32,bfloat16]")
@click.option("--rounds", type=click.IntRange(3), default=15, show_default=True, help="turns of each model")
@click.option("--threads", type=click.IntRange(1), help="of the CPU [torch's own choice]")
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True, help="on a CPU")
@click.option("--shared", is_flag=True, help="say that other programs ran on the machine")
@click.option("--lock", type=click.Path(path_type=Path), help="file that the processes which time one GPU share")
@click.option("--add", multiple=True, type=click.Path(exists=True, path_type=Path), help="another run's results")
@click.option("--render", is_flag=True, help="write the document only")
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/performance.md"), help="the document")
def main(
    device: str,
    models: str,
    engines: str | None,
    batch_sizes: str | None,
    precisions: str | None,
    rounds: int,
    threads: int | None,
    clock: str,
    shared: bool,
    lock: Path | None,
    add: tuple[Path, ...],
    render: bool,
    out: Path,
) -> None:
    """Time the original, the fused and the norm-free model of each architecture and write the document."""
    torch.set_num_threads(threads or torch.get_num_threads())
    path = out.with_suffix(".json")
    records = json.loads(path.read_text()) if path.exists() else []
    for other in add:
        known = [key(record) for record in records]
        records += [record for record in json.loads(other.read_text()) if key(record) not in known]
        path.write_text(json.dumps(records, indent=1) + "\n")
    gpu = device != "cpu"
    cases = [
        (precision, engine, int(batch_size))
        for precision in (precisions.split(",") if precisions else GPU_PRECISIONS if gpu else ("float32",))
        for engine in (engines.split(",") if engines else GPU_ENGINES if gpu else (EAGER,))
        for batch_size in (batch_sizes.split(",") if batch_sizes else GPU_BATCHES if gpu else (1,))
        if not (engine == ONNXRUNTIME and precision != "float32")
    ]
    options = {"device": device, "rounds": rounds, "clock": clock, "shared": shared, "machine": processor()}
    options["lock"] = lock
    for name in [] if render else models.split(","):
        measure(name, cases, options, records, path)
    real = out.with_name("performance-real.json")
    out.write_text(document(records, json.loads(real.read_text()) if real.exists() else None))
    click.echo(f"normswap {normswap.__version__}: {len(records)} cases in {out}")


if __name__ == "__main__":
    main()
