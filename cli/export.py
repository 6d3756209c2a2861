"""``normswap export``: a converted model as an ONNX or PyTorch graph, checked against the model."""

from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option

from normswap.exporting.options import ATOL, DEFAULT_OPSET, DTYPES, FORMATS

from . import arguments as a
from . import next_command
from . import options as o
from .console import Console, NormswapCommand

EVAL_SAMPLES = 500


@cloup.command(cls=NormswapCommand)
@click.argument("folder", metavar="[OUT]", required=False, type=click.Path(path_type=Path))
@o.model_group(required=False)
@o.images_group(o.train_split_option("that sets the INT8 ranges"), eval_samples=EVAL_SAMPLES)
@cloup.option_group(
    "Graph",
    option(
        "--format",
        type=click.Choice(FORMATS),
        default=FORMATS[0],
        show_default=True,
        help="ONNX, or torch.export's own",
    ),
    option(
        "--dtype",
        type=click.Choice(DTYPES),
        default=DTYPES[0],
        show_default=True,
        help="fp16: weights, input and output in half precision, every tensor checked for overflow",
    ),
    o.numbers(
        "--opset",
        type=click.IntRange(7),
        help=f"ONNX operator set; torch supports {DEFAULT_OPSET} best  [{DEFAULT_OPSET}]",
    ),
    o.numbers("--static", type=click.IntRange(1), help="fixed shapes with N images per batch, as NPUs need them"),
    option(
        "--external-data",
        is_flag=True,
        help="write ONNX weights to a separate file; always done above 2 GB",
    ),
    o.numbers(
        "--atol",
        type=click.FLOAT,
        metavar="X",
        help="maximum difference of an output from float32 PyTorch; exits 4 if it is larger  "
        f"[{ATOL['fp32']}; fp16: {ATOL['fp16']}]",
    ),
)
@cloup.option_group(
    "INT8 estimate",
    option("--int8", is_flag=True, help="also measure the accuracy of static INT8 quantisation; nothing is saved"),
    o.numbers("--calib-samples", type=click.IntRange(1), default=128, help="number of images that set the INT8 ranges"),
)
@o.output_group(what="file to write  [model.onnx, model.fp16.onnx, ... in OUT]")
@o.against_group()
@o.preprocessing_group()
@o.device_group(amp=False)
@o.messages_group()
def export(**options: Any) -> None:
    """Write a model as an ONNX or PyTorch graph and verify it.

    OUT is a folder that convert wrote. Any other model is named by -m, with -o for the file. The file is run and
    compared with PyTorch on images.

    \b
    normswap export out --data-dir images
    normswap export out --data-dir images --dtype fp16 --against local-dir:my-model
    normswap export out --data-dir images --format pt2
    """
    folder, model = options["folder"], options["model"]
    if (folder is None) == (model is None):
        raise click.UsageError("Give either OUT, a folder that convert wrote, or -m MODEL.")
    if folder is None and options["output"] is None:
        raise click.UsageError("Missing option '-o' / '--output': the file to write, as -m names no folder for it.")
    console = Console(options["as_json"], options["quiet"])
    name = f"local-dir:{folder}" if model is None else model
    console.say("load", name)
    from normswap.errors import ArgumentError, CheckFailedError
    from normswap.exporting.export import check_export
    from normswap.pipeline.open_model import is_converted

    if folder is not None and not is_converted(name):
        raise ArgumentError(
            f"{folder}: contains no normswap.json; export any other model with -m local-dir:{folder} -o FILE"
        )
    path = options["output"] or default_path(folder, options["format"], options["dtype"])
    check_export(path, options["format"], options["dtype"], options["overwrite"])
    opened, original = _open(console, options, name)
    images, int8_images = _images(console, opened, options)
    try:
        report = write(console, opened, path, name, options, images, original, int8_images)
    except CheckFailedError as error:
        show(console, error.report, options["verbose"])
        raise
    show(console, report, options["verbose"])
    _say_what_next(console, options, report)


def _open(console: Console, options: dict[str, Any], name: str) -> tuple[Any, Any]:
    """Return the model to export, and the original if one was named."""
    from normswap.pipeline.open_model import is_converted, open_model

    device, architecture, against = a.pick_device(options["device"]), a.architecture(options), options["against"]
    # A converted folder knows its own architecture; with --against the options are for the original.
    own = {} if against is not None and is_converted(name) else architecture
    opened = open_model(name, **a.weights(options), **own).to(device)
    if against is None:
        return opened, None
    console.say("load", against)
    own = {} if is_converted(against) else architecture
    return opened, open_model(against, **a.against_weights(options), **own).to(device)


def default_path(folder: Path, format: str, dtype: str = "fp32") -> Path:
    return folder / (f"model.{format}" if dtype == "fp32" else f"model.{dtype}.{format}")


def write(
    console: Console,
    model: Any,
    path: Path,
    name: str,
    options: dict[str, Any],
    images: Any,
    original: Any = None,
    int8_images: Any = None,
) -> Any:
    """Export a model, with a bar on a terminal; ``convert --export`` ends here too, with fewer options."""
    from normswap.exporting.export import export_model
    from normswap.outputs.save import kept_norms
    from normswap.pipeline.open_model import is_converted

    if images is None:
        console.say(
            "note", "no --data-dir: compared on random images, which verify the translation but not the accuracy"
        )
    else:
        console.say("compare", f"on {images.description}")
    with console.progress() as progress:
        return export_model(
            model,
            path,
            images,
            options["format"],
            dtype=options.get("dtype", "fp32"),
            opset=options.get("opset") or DEFAULT_OPSET,
            static=options.get("static"),
            external_data=options.get("external_data", False),
            atol=options.get("atol"),
            original=original,
            int8_images=int8_images,
            kept=kept_norms(Path(name.removeprefix("local-dir:"))) if is_converted(name) else None,
            overwrite=options["overwrite"],
            name=name,
            progress=progress,
        )


def _images(console: Console, model: Any, options: dict[str, Any]) -> tuple[Any, Any]:
    """Return the images to compare on, if there are any, and those that set INT8 ranges if they are asked for."""
    from normswap.errors import ArgumentError
    from normswap.inputs.dataset import load_images, load_splits

    if options["data_dir"] is None and not options["dataset"]:
        if options["int8"]:
            raise ArgumentError("--int8 needs images: give --data-dir")
        return None, None
    count, seed = options["eval_samples"], options["seed"]
    if not options["int8"]:
        images = load_images(model, options["data_dir"], options["split"], **a.data(options))
        a.say_images(console, images)
        return images.draw(count, seed), None
    splits = (options["data_dir"], options["train_split"], options["split"])
    train, images = load_splits(model, *splits, **a.data(options))
    a.say_images(console, train, images)
    return images.draw(count, seed), train.draw(options["calib_samples"], seed)


def show(console: Console, report: Any, verbose: int) -> None:
    """Say what was found, and print the data."""
    if report is not None:
        console.result(report.to_json(), *tell(console, report, verbose))


def tell(console: Console, report: Any, verbose: int) -> list[Any]:
    """Say what was found; return the tables."""
    from normswap.reporting.conversion_tables import stages_table
    from normswap.tables import table

    opset = f", opset {report.opset}" if report.opset else ""
    console.say("graph", f"{report.graph.line()}; {report.dtype}{opset}, input {list(report.input_shape)}")
    console.say("compare", report.comparison.line())
    for line in [] if report.half is None else report.half.lines():
        console.say("fp16", line)
    tables = [table(["node", "count"], [[k, str(v)] for k, v in report.graph.nodes.items()], right=["count"])]
    if report.half is not None:
        rows = [[t.tensor, _size(t.largest), _size(t.original)] for t in report.half.tensors[: None if verbose else 10]]
        tables.append(table(["largest in FP16's range", "here", "original"], rows, right=["here", "original"]))
    if report.int8 is not None:
        console.say("int8", f"an estimate, nothing is saved: {report.int8.scheme}")
        tables.append(stages_table(report.int8.stages))
    return tables


def _size(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"


def say_files(console: Console, report: Any) -> None:
    """Say what was written and which LayerNorms are in it."""
    console.say("wrote", f"{', '.join(report.files)} ({report.size / 1e6:.1f} MB)")
    if report.layer_norms:
        console.say("stayed", f"{len(report.layer_norms)} LayerNorms: {', '.join(report.layer_norms)}")


def _say_what_next(console: Console, options: dict[str, Any], report: Any) -> None:
    say_files(console, report)
    if options["dtype"] == "fp32":
        changes = {**next_command.with_images(options), "format": report.format, "dtype": "fp16"}
        changes |= {"against": options["against"] or "ORIGINAL", "output": None if options["folder"] else "FILE"}
        changes |= {"atol": None}  # what float32 keeps to is out of reach in half precision
        folder = [options["folder"]] if options["folder"] else []
        console.say("next", next_command.line("export", options, *folder, **changes))
    elif report.format == "onnx":
        console.say("load with", f'onnxruntime.InferenceSession("{report.files[0]}"), input "images" in float16')
    else:
        console.say("load with", f'torch.export.load("{report.files[0]}").module()')
