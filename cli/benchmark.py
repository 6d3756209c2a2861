"""``normswap benchmark``: the original, the fused model and the norm-free bound, in turn, by the clock."""

from pathlib import Path
from typing import Any

import click

from . import arguments as a
from . import options as o
from .console import Console, NormswapCommand

_DTYPES = ("float32", "float16", "bfloat16")


class BatchSizes(click.ParamType):
    """One batch size or several, with commas between."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            sizes = [int(text) for text in str(value).split(",")]
        except ValueError:
            sizes = []
        if not sizes or min(sizes) < 1:
            self.fail(f"{value!r} is no batch size: whole numbers from 1, with commas between", param, ctx)
        return sizes


@click.command(cls=NormswapCommand)
@o.architecture_options()
@o.weights_options()
@click.option("--against", metavar="MODEL", help="the converted model, local-dir:OUT [one is built for its time alone]")
@o.source_options("split whose first images are used")
@click.option(
    "-b",
    "--batch-size",
    "batch_sizes",
    type=BatchSizes(),
    multiple=True,
    default=["1,16"],
    show_default=True,
    help="images per step; repeatable",
)
@click.option("--rounds", type=click.IntRange(3), default=25, show_default=True, help="turns of each model")
@click.option("--threads", type=click.IntRange(1), help="of the CPU [torch's own choice]")
@click.option(
    "--clock",
    type=click.Choice(["wall", "cpu"]),
    default="wall",
    show_default=True,
    help="cpu: CPU time, for a shared machine; one thread only",
)
@click.option("--compile", "--torchcompile", "compiled", is_flag=True, help="torch.compile as well (takes minutes)")
@click.option(
    "--onnxruntime/--no-onnxruntime", default=None, help="ONNX Runtime as well, in float32 [where it is installed]"
)
@click.option("--channels-last", is_flag=True, help="memory layout of images and convolutions")
@click.option("--amp", is_flag=True, help="mixed precision")
@click.option("--amp-dtype", type=click.Choice(_DTYPES[1:]), default="float16", show_default=True, help="of --amp")
@click.option("--model-dtype", type=click.Choice(_DTYPES), help="of weights and images [the checkpoint's]")
@click.option(
    "--csv", "csv_file", type=click.Path(path_type=Path, dir_okay=False, writable=True), help="write a table here"
)
@o.output_options()
def benchmark(
    model: str,
    against: str | None,
    batch_sizes: tuple[list[int], ...],
    rounds: int,
    threads: int | None,
    clock: str,
    compiled: bool,
    onnxruntime: bool | None,
    channels_last: bool,
    model_dtype: str | None,
    csv_file: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **options: Any,
) -> None:
    """Time a model against its converted form and against the same architecture without any norm.

    The models run in turn in one process; every round gives a ratio, and its median and quartiles are shown. Without
    --against a fused model is built: wrong answers, right time. Without images random ones are used, and denormal
    numbers count as zero. Columns are named as in timm's benchmark.py. Peak memory is that of weights and activations,
    without the images.

    \b
    normswap benchmark -m local-dir:my-model --against local-dir:out --data-dir images --threads 1
    normswap benchmark -m vit_base_patch16_224 -b 1,128 --device cuda --amp --amp-dtype bfloat16 --compile
    """
    console = Console(as_json, quiet)
    console.say("load", model)
    import torch

    from normswap import benchmark_models, load_images
    from normswap.benchmark import COMPILE, EAGER, ONNXRUNTIME
    from normswap.engines import has_onnxruntime
    from normswap.errors import ArgumentError
    from normswap.pipeline import is_converted, open_model
    from normswap.throughput import check_file

    if csv_file is not None:
        check_file(csv_file)

    device = a.pick_device(options["device"])
    if is_converted(model):
        raise ArgumentError(f"{model} is converted already: -m takes the original, --against the converted model")
    weights = a.weights(options)
    if ":" not in model and not weights["pretrained"] and weights["checkpoint"] is None:
        console.say("weights", "random: they do not change the time (--pretrained for timm's)")
        weights["random_weights"] = True
    original = open_model(model, **weights, **a.architecture(options))
    fused = None
    if against is not None:
        console.say("load", against)
        fused = open_model(
            against, **({} if is_converted(against) else {**a.architecture(options), **_no_weights(against)})
        )
    images = None
    if options["data_dir"] is not None or options["dataset"]:
        split = (options["data_dir"], options["split"], options["dataset"])
        images = load_images(original, *split, labels=False)
        images = images.draw(max(size for sizes in batch_sizes for size in sizes), 42)
        console.say("images", images.description)
    engines = [EAGER, *([COMPILE] if compiled else [])]
    if onnxruntime or (onnxruntime is None and has_onnxruntime()):
        engines.append(ONNXRUNTIME)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with console.progress() as progress:
            result = benchmark_models(
                original,
                fused,
                images=images,
                batch_sizes=list(dict.fromkeys(size for sizes in batch_sizes for size in sizes)),
                engines=engines,
                optional=[] if onnxruntime else [ONNXRUNTIME],
                rounds=rounds,
                device=device,
                dtype=getattr(torch, model_dtype) if model_dtype else None,
                amp_dtype=a.amp_dtype(options),
                channels_last=channels_last,
                clock=clock,
                name=model,
                progress=progress,
            )
    finally:
        torch.set_num_threads(before)
    if csv_file is not None:
        result.write_csv(csv_file)
    console.result({**result.to_json(), "against": against}, result.table())
    for line in result.lines():
        console.say("note" if line in result.notes else "speed", line)
    if csv_file is not None:
        console.say("wrote", str(csv_file))
    if against is None:
        pretrained = "" if ":" in model or weights["checkpoint"] else " --pretrained"
        console.say("next", f"normswap convert -m {model}{pretrained} --data-dir IMAGES -o OUT")


def _no_weights(model: str) -> dict[str, bool]:
    return {} if ":" in model else {"random_weights": True}
