"""``normswap finetune`` and ``normswap fuse``: go on from a swapped checkpoint."""

import sys
from pathlib import Path
from typing import Any

import click

from . import arguments as a
from . import next_command
from . import options as o
from .console import Console, JoinedCommand, NormswapCommand
from .processes import is_first, joined


def _common(function: Any) -> Any:
    for option in (
        click.option("--overwrite", is_flag=True, help="replace an output folder that is not empty"),
        click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="folder to write"),
        o.against_options("the original  [what the swapped checkpoint was made from]"),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto takes a GPU"),
        click.option(
            "-m",
            "--model",
            required=True,
            metavar="FOLDER",
            help="a swapped checkpoint, from convert --save-swapped or finetune",
        ),
    ):
        function = option(function)
    return function


@click.command(cls=JoinedCommand)
@_common
@o.data_options()
@click.option("--train-split", default="train", show_default=True, help="split to train on, if there is one")
@o.finetune_options("", 1, "all of the split")
@o.output_options()
def finetune(**options: Any) -> None:
    """Distil the original into a swapped checkpoint, BatchNorm still in; `normswap fuse` is the next step.

    \b
    normswap convert  -m local-dir:my-model --data-dir images -o out --save-swapped swapped
    normswap finetune -m swapped --data-dir images --epochs 3 -o tuned
    normswap fuse     -m tuned --data-dir images -o out-tuned
    """
    console = Console(options["as_json"], options["quiet"])
    out: Path = options["output"]
    swapped, original, device = _open(console, options, needs_original=True)
    from normswap import finetune_swapped, save_swapped
    from normswap.data import load_splits
    from normswap.report import stages_table

    training = a.finetuning(options)
    images, evaluation = load_splits(
        swapped.model,
        options["data_dir"],
        options["train_split"],
        options["split"],
        train_labels=training.labels > 0,
        **_data(options, swapped),
    )
    # The same draw as convert's: its held out images come behind those it calibrated on.
    seen = swapped.report.calib_samples
    _, train, held_out = a.training_sets(images, seen, options["finetune_samples"] or len(images), options["seed"])
    if options["eval_samples"]:
        evaluation = evaluation.draw(options["eval_samples"], options["seed"])
    console.say("finetune", f"{training.epochs} epochs, on {train.description}; {len(held_out)} others held out")
    console.say("evaluate", f"on {evaluation.description}")
    if max(seen, len(train)) + len(held_out) > len(images):
        text = "calibration saw images that are held out now, and is better on them than it is: convert on fewer"
        console.say("note", f"{text} (--calib-samples), or fine-tune on fewer (--samples)")
    with joined(device), console.progress() as progress:
        finetune_swapped(
            swapped,
            original,
            train,
            training,
            held_out=held_out,
            eval_images=evaluation,
            state=options["finetune_state"],
            resume=options["resume"],
            amp_dtype=a.amp_dtype(options),
            progress=progress,
        )
        if not is_first():
            return
        command = ["normswap", *sys.argv[1:]]
        sources = _sources(options)
        kept = (swapped.model, swapped.original, swapped.plan, swapped.report)
        save_swapped(out, *kept, options["overwrite"], sources, command, _preprocessing(options))
    report = swapped.report
    report.out = str(out)
    assert report.finetuning is not None  # set by finetune_swapped
    console.say("finetune", report.finetuning.line())
    console.result(report.to_json(), stages_table(report.stages))
    console.say("wrote", f"{out}/swapped.safetensors, config.json, swapped.json")
    given = (*next_command.still_against(options), *next_command.images(options))
    console.say("next", next_command.line("fuse", "-m", out, *given, "-o", "FOLDER"))


@click.command(cls=NormswapCommand)
@_common
@o.data_options()
@click.option("--atol", type=float, default=1e-3, show_default=True, help="exit 4 if the fold moves a logit by more")
@o.output_options()
def fuse(**options: Any) -> None:
    """Fold a swapped checkpoint into a finished one that plain timm loads.

    Without images the fold is checked on random ones, and no accuracy is measured.
    """
    console = Console(options["as_json"], options["quiet"])
    out: Path = options["output"]
    with_images = options["data_dir"] is not None or bool(options["dataset"])
    swapped, original, device = _open(console, options, needs_original=with_images)
    from normswap import fuse as fold
    from normswap import load_images
    from normswap.errors import CheckFailedError
    from normswap.report import stages_table

    images = None
    if with_images:
        images = load_images(swapped.model, options["data_dir"], options["split"], **_data(options, swapped))
        if options["eval_samples"]:
            images = images.draw(options["eval_samples"], options["seed"])
        console.say("evaluate", f"on {images.description}, device {device}")
    else:
        console.say("evaluate", "no images given: fused and unfused are compared on random ones")
    try:
        with console.progress() as progress:
            result = fold(
                swapped,
                images,
                original=original,
                atol=options["atol"],
                amp_dtype=a.amp_dtype(options),
                progress=progress,
            )
            command = ["normswap", *sys.argv[1:]]
            result.save(out, options["overwrite"], _sources(options), command, _preprocessing(options))
    except CheckFailedError as error:
        if error.report is not None:
            console.result(error.report.to_json())  # type: ignore[attr-defined]
        raise
    report = result.report
    difference = report.fold_max_abs_err or 0.0
    console.say("fold", f"largest difference of an output, fused against unfused: {difference:.3g}")
    console.result(report.to_json(), *([stages_table(report.stages)] if report.stages else []))
    console.say("wrote", f"{out}/model.safetensors, config.json, normswap.json, README.md")


def _open(console: Console, options: dict[str, Any], needs_original: bool) -> tuple[Any, Any, str]:
    """Return the swapped checkpoint, the original if it is needed, and the device they are on."""
    console.say("load", options["model"])
    from normswap import load_swapped, pipeline
    from normswap.atomic import check_target
    from normswap.errors import ArgumentError, CheckpointError
    from normswap.save import model_arguments

    check_target(options["output"], options["overwrite"], _sources(options))
    device = a.pick_device(options["device"])
    swapped = load_swapped(options["model"].removeprefix("local-dir:"))
    typed = options["against"]
    options["against"] = typed or swapped.report.model
    check_target(options["output"], options["overwrite"], _sources(options))  # it may hold the original
    swapped.model.to(device)
    if not needs_original:
        return swapped, None, device
    name = options["against"]
    console.say("load", f"{name}, the original")
    weights = a.against_weights(options)
    if ":" not in name and not any(weights.values()):
        raise ArgumentError(
            f"{name}: which weights has the original? --against-pretrained or --against-checkpoint FILE"
        )
    try:
        original = pipeline.open_model(name, **weights, **model_arguments(swapped.original)).to(device)
    except (ArgumentError, CheckpointError) as error:
        if typed is None:
            raise type(error)(f"{error}; if it is elsewhere now, --against says where") from error
        raise
    return swapped, original, device


def _data(options: dict[str, Any], swapped: Any) -> dict[str, Any]:
    """Pick the arguments of `normswap.load_images`; the images have the size that the swapped checkpoint is for."""
    return a.data({**options, "img_size": None}) | {"input_size": swapped.plan.input_size}


def _preprocessing(options: dict[str, Any]) -> dict[str, Any] | None:
    """Pick the overrides of the data config, for the record of what is written."""
    return a.preprocessing({**options, "img_size": None}) or None


def _sources(options: dict[str, Any]) -> list[Path]:
    original = options["against"] or ""
    paths = [options["model"], options["against_checkpoint"], options["data_dir"], options["class_map"]]
    paths += [original] if original.startswith("local-dir:") else []
    return [Path(str(path).removeprefix("local-dir:")) for path in paths if path is not None]
