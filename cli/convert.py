"""``normswap convert``: checkpoint in, fused safetensors out."""

import sys
from pathlib import Path
from typing import Any

import click

from . import arguments as a
from . import conversion_output, export
from . import options as o
from .console import Console, JoinedCommand
from .processes import is_first, joined

# The library's own lists cannot be imported here: they come with torch. A test holds these equal to them.
_METHODS = ("reconstruct", "channel", "moments")
_RECONSTRUCT = ("all", "readers")
_POSITIONS = ("pre-act", "post-act", "none")


@click.command(cls=JoinedCommand)
@o.architecture_options()
@o.weights_options()
@o.data_options()
@click.option("--train-split", default="train", show_default=True, help="split to calibrate on, if there is one")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="folder to write")
@click.option("--overwrite", is_flag=True, help="replace an output folder that is not empty")
@click.option(
    "--method",
    type=click.Choice(_METHODS),
    default="reconstruct",
    show_default=True,
    help="re-solve the layers around each norm, or set BatchNorm only",
)
@click.option(
    "--reconstruct",
    type=click.Choice(_RECONSTRUCT),
    default="all",
    show_default=True,
    help="re-solve what reads a norm, or also what writes to the residual stream",
)
@click.option(
    "--refine-steps",
    type=click.IntRange(0),
    help="gradient steps, of 32 images each, for every attention; more bring the answers nearer and take longer  "
    "[one for each batch fitted to, 28 at least]",
)
@click.option(
    "--memory-budget",
    type=o.Size(),
    help="memory for calibration's activations, as 512M or 8G, and as much of a GPU's; the rest goes to disk  "
    "[half of what is free]",
)
@click.option(
    "--ffn-bn", type=click.Choice(_POSITIONS), default="pre-act", show_default=True, help="BatchNorm inside the FFN"
)
@click.option(
    "--calib-samples", type=click.IntRange(1), default=1024, show_default=True, help="images, no labels needed"
)
@click.option("--keep", multiple=True, metavar="GLOB", help="LayerNorms to keep, as 'blocks.0.*'; repeatable")
@o.budget_options()
@click.option("--atol", type=float, default=1e-3, show_default=True, help="exit 4 if the fold moves a logit by more")
@o.finetune_options()
@click.option("--control", is_flag=True, help="also fine-tune the unconverted model alike")
@click.option(
    "--save-swapped",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="also write the model before the fold, for normswap finetune and normswap fuse",
)
@click.option("--worst-images", type=click.IntRange(0), default=8, show_default=True, help="pictures in the report")
@click.option("--report/--no-report", default=None, help="write report.html  [if the report extra is installed]")
@click.option(
    "--export",
    type=click.Choice(export.FORMATS),
    help="also write a graph into the folder, as normswap export does",
)
@click.option("--dry-run", is_flag=True, help="show the plan and the images, and stop")
@o.output_options()
def convert(**options: Any) -> None:
    """Take LayerNorm out of a pretrained model: plan, swap, calibrate, fold, verify, compare, save.

    \b
    normswap convert -m vit_small_patch16_224.augreg_in21k_ft_in1k --pretrained --data-dir imagenet -o out
    normswap convert -m local-dir:my-model --data-dir images -o out
    normswap convert -m vit_base_patch16_224 --checkpoint my.safetensors --num-classes 10 --data-dir images -o out
    """
    if options["output"] is None and not options["dry_run"]:
        raise click.UsageError("Missing option '-o' / '--output': the folder to write (or --dry-run).")
    run(Console(options["as_json"], options["quiet"]), options)


def run(console: Console, options: dict[str, Any]) -> None:
    """Do what ``convert`` does; ``demo`` calls it with its own model and images."""
    out: Path | None = options["output"]
    sources = _sources(options)
    console.say("load", options["model"])
    from normswap import make_plan, pipeline
    from normswap.atomic import check_target
    from normswap.data import load_splits
    from normswap.errors import ArgumentError, CheckFailedError
    from normswap.onnxfile import require_onnx
    from normswap.page import check_extra
    from normswap.save import check_saveable
    from normswap.training import require_accelerate

    if options["report"]:
        check_extra()
    if out is not None and not options["dry_run"]:
        check_target(out, options["overwrite"], sources)
        if options["save_swapped"] is not None:
            one, other = (path.resolve() for path in (options["save_swapped"], out))
            if one.is_relative_to(other) or other.is_relative_to(one):
                raise ArgumentError(f"{out}: --save-swapped wants a folder of its own, not in or around --output")
            check_target(options["save_swapped"], options["overwrite"], sources)
    training = a.finetuning(options)
    if options["export"] == "onnx":
        require_onnx()  # not after minutes of calibration
    if training is not None:
        require_accelerate()
    device = a.pick_device(options["device"])
    model = pipeline.open_model(options["model"], **a.weights(options), **a.architecture(options)).to(device)
    if out is not None:
        check_saveable(model)
    images, evaluation = load_splits(
        model,
        options["data_dir"],
        options["train_split"],
        options["split"],
        train_labels=training is not None and training.labels > 0,
        **a.data(options),
    )
    budget = {name: options[name] for name in ("max_drop", "min_agreement", "max_keep", "max_evaluations")}
    if options["save_best"] and options["max_drop"] is None and options["min_agreement"] is None:
        raise ArgumentError("--save-best goes with --max-drop or --min-agreement")
    if options["max_drop"] is not None and evaluation.num_classes is None:
        raise ArgumentError(f"--max-drop needs labels, and {evaluation.description} have none")
    if training is not None and training.labels > 0 and images.num_classes is None:
        raise ArgumentError(f"--label-weight needs labels, and {images.description} have none")
    plan = make_plan(model, options["keep"], input_size=images.input_size)
    console.say("plan", plan.summary(options["ffn_bn"]))
    calibration, train, held_out = images.draw(options["calib_samples"], options["seed"]), None, None
    if training is not None:
        counts = (options["calib_samples"], options["finetune_samples"])
        calibration, train, held_out = a.training_sets(images, *counts, options["seed"])
    one_split = images is evaluation
    compared = evaluation.draw(min(export.EVAL_SAMPLES, options["eval_samples"] or sys.maxsize), options["seed"])
    if options["eval_samples"]:
        evaluation = evaluation.draw(options["eval_samples"], options["seed"])
    method = options["method"] + (" readers" if _readers_only(options) else "")
    console.say("calibrate", f"{method}, on {calibration.description}, device {device}")
    console.say("evaluate", f"on {evaluation.description}")
    if one_split:
        console.say("note", "there is one split only: calibration images are among the evaluation images")
    if training is not None and train is not None and held_out is not None:
        console.say("finetune", f"{training.epochs} epochs, on {train.description}; {len(held_out)} others held out")
    if options["dry_run"]:
        console.result({**plan.to_json(options["ffn_bn"]), "dry_run": True}, str(plan))
        return
    assert out is not None  # checked by the command

    try:
        with joined(device), console.progress() as progress:
            result = pipeline.convert(
                model,
                calibration,
                options["method"],
                options["ffn_bn"],
                eval_images=evaluation,
                plan=plan,
                reconstruct=options["reconstruct"],
                memory_budget=options["memory_budget"],
                refine_steps=options["refine_steps"],
                atol=options["atol"],
                **budget,
                amp_dtype=a.amp_dtype(options),
                finetune_options=training,
                finetune_images=train,
                finetune_held_out=held_out,
                finetune_state=options["finetune_state"],
                resume=options["resume"],
                control=options["control"],
                worst_images=options["worst_images"],
                name=options["model"],
                progress=progress,
            )
            if not is_first():
                return
            _save(result, options, sources)
    except CheckFailedError as error:
        if not is_first():  # the first process says so; an exit code here would end it while it saves
            return
        best, text = error.conversion, str(error)
        if best is not None:
            text += ": not saved"
            if options["save_best"]:
                _save(best, options, sources)
                text = f"{error}: saved all the same as {out}"
        if best is not None and options["save_best"] and options["export"] is not None:
            tables = conversion_output.tell(console, error.report, options["verbose"])
            _export(console, options, out, error.report, tables, compared)
        else:
            conversion_output.show(console, error.report, options["verbose"])
        raise CheckFailedError(text) from error
    if options["export"] is None:
        conversion_output.show(console, result.report, options["verbose"])
        conversion_output.say_what_next(console, options, result.report, out)
        return
    tables = conversion_output.tell(console, result.report, options["verbose"])
    conversion_output.say_what_next(console, options, result.report, out)
    _export(console, options, out, result.report, tables, compared)


def _export(console: Console, options: dict[str, Any], out: Path, report: Any, tables: list[Any], images: Any) -> None:
    """Write a graph of what was saved. If that fails, the folder stays: it is whole, and has passed its own checks."""
    from normswap import load
    from normswap.errors import CheckFailedError

    path = export.default_path(out, options["export"])
    settings = {"format": options["export"], "overwrite": False}
    record = report.to_json()
    try:
        exported = export.write(console, load(out), path, f"local-dir:{out}", settings, images)
    except CheckFailedError as error:
        found: Any = error.report
        if found is not None:
            tables += export.tell(console, found, options["verbose"])
            record["export"] = found.to_json()
        console.result(record, *tables)
        raise
    tables += export.tell(console, exported, options["verbose"])
    console.result({**record, "export": exported.to_json()}, *tables)
    export.say_files(console, exported)


def _save(result: Any, options: dict[str, Any], sources: list[Path]) -> None:
    settings = (options["overwrite"], sources, ["normswap", *sys.argv[1:]], a.preprocessing(options) or None)
    result.save(options["output"], *settings, options["report"])
    if options["save_swapped"] is not None:
        result.save_swapped(options["save_swapped"], *settings)


def _sources(options: dict[str, Any]) -> list[Path]:
    model = options["model"].removeprefix("local-dir:") if options["model"].startswith("local-dir:") else None
    paths = (model, options["checkpoint"], options["data_dir"], options["class_map"])
    return [Path(path) for path in paths if path is not None]


def _readers_only(options: dict[str, Any]) -> bool:
    return options["method"] == "reconstruct" and options["reconstruct"] == "readers"
