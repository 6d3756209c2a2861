"""``normswap benchmark``: the original, the fused model and the norm-free bound, in turn, by the clock."""

from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option

from normswap.benchmarking.options import CLOCKS, DEFAULT_ROUNDS, FEWEST_ROUNDS, WALL

from . import arguments as a
from . import next_command
from . import options as o
from .console import Console, NormswapCommand


class BatchSizes(click.ParamType):
    """One batch size or several, with commas between."""

    name = "N[,N...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            sizes = [int(text) for text in str(value).split(",")]
        except ValueError:
            sizes = []
        if not sizes or min(sizes) < 1:
            self.fail(f"{value!r} is no batch size: write whole numbers from 1 with commas between them", param, ctx)
        return sizes


@cloup.command(cls=NormswapCommand)
@o.model_group()
@cloup.option_group(
    "Converted model",
    option("--against", metavar="MODEL", help="converted model, local-dir:OUT  [one is built for its time alone]"),
)
@cloup.option_group("Images", *o.source_options("split whose images are used"))
@cloup.option_group(
    "Timing",
    option(
        "-b",
        "--batch-size",
        "batch_sizes",
        type=BatchSizes(),
        multiple=True,
        default=["1,16"],
        show_default=True,
        help="images per step; repeatable",
    ),
    o.numbers(
        "--rounds",
        type=click.IntRange(FEWEST_ROUNDS),
        default=DEFAULT_ROUNDS,
        help="number of times each model is timed",
    ),
    o.device_option(),
    o.numbers("--threads", type=click.IntRange(1), help="number of CPU threads  [torch's own choice]"),
    option(
        "--clock",
        type=click.Choice(CLOCKS),
        default=WALL,
        show_default=True,
        help="cpu: CPU time, for a shared machine; needs one thread",
    ),
)
@cloup.option_group(
    "Engines and data types",
    option("--compile", "--torchcompile", "compiled", is_flag=True, help="also time torch.compile (takes minutes)"),
    option(
        "--onnxruntime/--no-onnxruntime", default=None, help="also time ONNX Runtime in float32  [if it is installed]"
    ),
    option("--channels-last", is_flag=True, help="channels-last memory layout"),
    *o.amp_options("time in mixed precision"),
    option(
        "--model-dtype",
        type=click.Choice(["float32", "float16", "bfloat16"]),
        help="data type of weights and images  [the checkpoint's]",
    ),
)
@cloup.option_group(
    "Output",
    option(
        "--csv",
        "csv_file",
        type=click.Path(path_type=Path, dir_okay=False, writable=True),
        help="also write the table to this file",
    ),
)
@o.messages_group()
def benchmark(**options: Any) -> None:
    """Time a model, its converted form and a norm-free bound.

    The models run in turn in one process; every round gives a ratio, and its median and quartiles are shown. The bound
    is the same architecture without any norm. Without --against a fused model is built: wrong outputs, right time.
    Without images random ones are used, and denormal numbers count as zero. Columns are named as in timm's
    benchmark.py. Peak memory is that of weights and activations, without the images.

    \b
    normswap benchmark -m local-dir:my-model --against local-dir:out --data-dir images --threads 1
    normswap benchmark -m vit_base_patch16_224 -b 1,128 --device cuda --amp --amp-dtype bfloat16 --compile
    """
    console = Console(options["as_json"], options["quiet"])
    console.say("load", options["model"])
    import torch

    from normswap.atomic import check_file

    csv_file = options["csv_file"]
    if csv_file is not None:
        check_file(csv_file, overwrite=True)
    device = a.pick_device(options["device"])
    original, fused = _open(console, options)
    before = torch.get_num_threads()
    torch.set_num_threads(options["threads"] or before)
    try:
        result = _measure(console, options, original, fused, device)
    finally:
        torch.set_num_threads(before)
    if csv_file is not None:
        result.write_csv(csv_file)
    console.result({**result.to_json(), "against": options["against"]}, result.table())
    for line in result.lines():
        console.say("note" if line in result.notes else "speed", line)
    if csv_file is not None:
        console.say("wrote", str(csv_file))
    if options["against"] is None:
        pretrained = ":" not in options["model"] and options["checkpoint"] is None
        changes = {**next_command.with_images(options), "pretrained": pretrained, "output": "OUT"}
        console.say("next", next_command.line("convert", options, **changes))


def _open(console: Console, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return the original, and the converted model if one was named."""
    from normswap.errors import ArgumentError
    from normswap.pipeline.open_model import is_converted, open_model

    model, against = options["model"], options["against"]
    if is_converted(model):
        raise ArgumentError(f"{model} is converted already: -m takes the original, --against the converted model")
    weights = a.weights(options)
    if ":" not in model and not weights["pretrained"] and weights["checkpoint"] is None:
        console.say("weights", "random: they do not change the time (--pretrained for timm's)")
        weights["random_weights"] = True
    original = open_model(model, **weights, **a.architecture(options))
    if against is None:
        return original, None
    console.say("load", against)
    if is_converted(against):
        return original, open_model(against)
    return original, open_model(against, random_weights=":" not in against, **a.architecture(options))


def _measure(console: Console, options: dict[str, Any], original: Any, fused: Any, device: str) -> Any:
    import torch

    from normswap import benchmark_models, load_images
    from normswap.benchmarking.engines import has_onnxruntime
    from normswap.benchmarking.options import COMPILE, EAGER, ONNXRUNTIME

    batch_sizes = list(dict.fromkeys(size for sizes in options["batch_sizes"] for size in sizes))
    images = None
    if options["data_dir"] is not None or options["dataset"]:
        split = (options["data_dir"], options["split"], options["dataset"])
        images = load_images(original, *split, labels=False)
        a.say_images(console, images)
        images = images.draw(max(batch_sizes), 42)
        console.say("images", images.description)
    onnxruntime, dtype = options["onnxruntime"], options["model_dtype"]
    engines = [EAGER, *([COMPILE] if options["compiled"] else [])]
    if onnxruntime or (onnxruntime is None and has_onnxruntime()):
        engines.append(ONNXRUNTIME)
    with console.progress() as progress:
        return benchmark_models(
            original,
            fused,
            images=images,
            batch_sizes=batch_sizes,
            engines=engines,
            optional=[] if onnxruntime else [ONNXRUNTIME],
            rounds=options["rounds"],
            device=device,
            dtype=getattr(torch, dtype) if dtype else None,
            amp_dtype=a.amp_dtype(options),
            channels_last=options["channels_last"],
            clock=options["clock"],
            name=options["model"],
            progress=progress,
        )
