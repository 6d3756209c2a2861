"""Measure what bounds cost: a fused model with them, without them, and the original, in turn in one process.

    python benchmarks/bounds.py vit_tiny_patch16_224 vit_small_patch16_224

Weights and images are random; the operators are those of a conversion. Every ratio is of two runs right after each
other; the median and the quartiles are shown, and as a control the model without bounds against itself.
"""

import copy
import io
import statistics
import time
from collections.abc import Callable

import click
import timm
import torch

from normswap.benchmarking.variants import stand_in
from normswap.layers import TokenBound

PAIRS = (("bounded", "unbounded"), ("unbounded", "again"), ("bounded", "original"), ("unbounded", "original"))


def without_bounds(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy with an Identity in the place of every bound."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if type(module) is TokenBound:
            model.set_submodule(path, torch.nn.Identity())
    return model


def eager(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Return a run of the model on the images."""
    return lambda: model(images)


def compiled(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Return a run of what torch.compile makes of the model."""
    run = torch.compile(model, dynamic=False)
    return lambda: run(images)


def onnxruntime_run(model: torch.nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Return a run of the exported model, on as many threads as torch has."""
    import onnxruntime

    program = torch.onnx.export(model, (images,), dynamo=True, verbose=False)
    buffer = io.BytesIO()
    program.save(buffer)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(buffer.getvalue(), settings, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


ENGINES = {"eager": eager, "compile": compiled, "onnxruntime": onnxruntime_run}


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("-b", "--batch", default=1, show_default=True)
@click.option("--rounds", default=100, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--engine", type=click.Choice(list(ENGINES)), default="eager", show_default=True)
def main(names: tuple[str, ...], batch: int, rounds: int, threads: int, engine: str) -> None:
    """Print one row per model."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    click.echo("| model | bounds | " + " | ".join(f"{a} / {b}" for a, b in PAIRS) + " |")
    click.echo("|---|---|" + "---|" * len(PAIRS))
    for name in names:
        original = timm.create_model(name).eval()
        bounded = stand_in(original)
        models = {"original": original, "bounded": bounded, "unbounded": without_bounds(bounded)}
        images = torch.randn(batch, *original.pretrained_cfg["input_size"])
        with torch.inference_mode():
            runs = {key: ENGINES[engine](model, images) for key, model in models.items()}
            runs["again"] = runs["unbounded"]
            seconds: dict[str, list[float]] = {key: [] for key in runs}
            for turn in range(rounds + 3):
                for key, run in runs.items():
                    start = time.perf_counter()
                    run()
                    if turn >= 3:  # the first are to warm up
                        seconds[key].append(time.perf_counter() - start)
        cells = []
        for a, b in PAIRS:
            low, middle, high = statistics.quantiles([x / y for x, y in zip(seconds[a], seconds[b], strict=True)], n=4)
            cells.append(f"{middle:.3f} ({low:.3f} to {high:.3f})")
        count = sum(type(module) is TokenBound for module in bounded.modules())
        click.echo(f"| {name} | {count} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
