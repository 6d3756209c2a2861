"""``normswap finetune`` and ``normswap fuse``: go on from a swapped checkpoint."""

from pathlib import Path
from typing import Any

import cloup

from . import arguments as a
from . import next_command
from . import options as o
from .console import Console, JoinedCommand, NormswapCommand
from .finetune_options import finetune_group
from .processes import is_first, joined


def _swapped_group() -> o.Decorator:
    return cloup.option_group(
        "Model",
        cloup.option(
            "-m",
            "--model",
            required=True,
            metavar="FOLDER",
            help="swapped checkpoint, written by finetune or by convert --save-swapped",
        ),
    )


def _original_group() -> o.Decorator:
    return o.against_group("original model  [what the swapped checkpoint was made from]")


@cloup.command(cls=JoinedCommand)
@_swapped_group()
@o.images_group(o.train_split_option("to train on"))
@o.output_group(required=True)
@finetune_group(prefix="", epochs=1, samples="all of the split")
@_original_group()
@o.preprocessing_group()
@o.device_group()
@o.messages_group()
def finetune(**options: Any) -> None:
    """Distil the original model into a swapped checkpoint.

    BatchNorm is not folded yet; `normswap fuse` is the next step.

    \b
    normswap convert  -m local-dir:my-model --data-dir images -o out --save-swapped swapped
    normswap finetune -m swapped --data-dir images --epochs 3 -o tuned
    normswap fuse     -m tuned --data-dir images -o out-tuned
    """
    console = Console(options["as_json"], options["quiet"])
    out: Path = options["output"]
    typed = {"against": options["against"]}
    training = a.finetuning(options)
    swapped, original, device = _open(console, options, needs_original=True)
    a.say_resumed(console, options)
    train, held_out, evaluation = _draw(console, options, swapped, training)
    from normswap import finetune_swapped, save_swapped
    from normswap.reporting.conversion_tables import stages_table

    with joined(device), console.progress() as progress:
        finetune_swapped(
            swapped,
            original,
            train,
            training,
            held_out=held_out,
            eval_images=evaluation,
            state=options["finetune_state"],
            resume=a.resume(options),
            amp_dtype=a.amp_dtype(options),
            progress=progress,
        )
    if not is_first():
        return
    save_swapped(out, swapped, a.saving(options, _sources(options), _preprocessing(options)))
    report = swapped.report
    report.out = str(out)
    assert report.finetuning is not None  # set by finetune_swapped
    console.say("finetune", report.finetuning.line())
    console.result(report.to_json(), stages_table(report.stages))
    console.say("wrote", f"{out}/swapped.safetensors, config.json, swapped.json")
    console.say("next", next_command.line("fuse", options, **{"model": out, "output": "FOLDER", **typed}))


def _draw(console: Console, options: dict[str, Any], swapped: Any, training: Any) -> tuple[Any, Any, Any]:
    """Return the images to train on, those held out from it, and those to evaluate on; say which they are."""
    from normswap.inputs.dataset import load_splits

    splits = (options["data_dir"], options["train_split"], options["split"])
    data = {**_data(options, swapped), "train_labels": training.labels > 0}
    images, evaluation = load_splits(swapped.model, *splits, **data)
    a.say_images(console, images, evaluation)
    # The same draw as convert's: its held out images come behind those it calibrated on.
    seen = swapped.report.calib_samples
    _, train, held_out = a.training_sets(images, seen, options["finetune_samples"] or len(images), options["seed"])
    if options["eval_samples"]:
        evaluation = evaluation.draw(options["eval_samples"], options["seed"])
    console.say("finetune", f"{training.epochs} epochs, on {train.description}; {len(held_out)} others held out")
    console.say("evaluate", f"on {evaluation.description}")
    if max(seen, len(train)) + len(held_out) > len(images):
        text = "held-out images were also used for calibration, so the baseline is optimistic: convert on fewer"
        console.say("note", f"{text} (--calib-samples), or fine-tune on fewer (--samples)")
    return train, held_out, evaluation


@cloup.command(cls=NormswapCommand)
@_swapped_group()
@o.images_group()
@o.output_group(o.atol_option(), required=True)
@_original_group()
@o.preprocessing_group()
@o.device_group()
@o.messages_group()
def fuse(**options: Any) -> None:
    """Fold a swapped checkpoint into a model that plain timm loads.

    Without images the fold is checked on random ones, and no accuracy is measured.
    """
    console = Console(options["as_json"], options["quiet"])
    out: Path = options["output"]
    with_images = options["data_dir"] is not None or bool(options["dataset"])
    swapped, original, device = _open(console, options, needs_original=with_images)
    from normswap import fuse as fold
    from normswap import load_images
    from normswap.errors import CheckFailedError
    from normswap.reporting.conversion_tables import stages_table

    images = None
    if with_images:
        images = load_images(swapped.model, options["data_dir"], options["split"], **_data(options, swapped))
        a.say_images(console, images)
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
                evaluation=a.evaluation(options),
                progress=progress,
            )
    except CheckFailedError as error:
        if error.report is not None:
            console.result(error.report.to_json())  # type: ignore[attr-defined]
        raise
    result.save(out, a.saving(options, _sources(options), _preprocessing(options)))
    report = result.report
    difference = report.fold_max_abs_err or 0.0
    console.say("fold", f"largest difference of an output, fused against unfused: {difference:.3g}")
    if report.fold_warning is not None:
        console.say("note", report.fold_warning)
    console.result(report.to_json(), *([stages_table(report.stages)] if report.stages else []))
    console.say("wrote", f"{out}/model.safetensors, config.json, normswap.json, README.md")


def _open(console: Console, options: dict[str, Any], needs_original: bool) -> tuple[Any, Any, str]:
    """Return the swapped checkpoint, the original if it is needed, and the device they are on."""
    console.say("load", options["model"])
    from normswap import load_swapped
    from normswap.atomic import check_target
    from normswap.errors import ArgumentError, CheckpointError
    from normswap.outputs.rebuild import model_arguments
    from normswap.pipeline.open_model import open_model

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
            f"{name}: the original's weights are missing: give --against-pretrained or --against-checkpoint FILE"
        )
    try:
        original = open_model(name, **weights, **model_arguments(swapped.original)).to(device)
    except (ArgumentError, CheckpointError) as error:
        if typed is None:
            raise type(error)(f"{error}; if it has moved, give its place with --against") from error
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
