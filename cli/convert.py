"""``normswap convert``: checkpoint in, fused safetensors out."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import cloup
from cloup import option

from normswap.calibration.options import AUTO, BOUNDS, METHODS, RECONSTRUCT, SHARE, CalibrationOptions
from normswap.exporting.options import FORMATS
from normswap.pipeline.options import EvaluationOptions
from normswap.planning.options import FFN_BN

from . import arguments as a
from . import conversion_output, export
from . import options as o
from .console import Console, JoinedCommand
from .finetune_options import finetune_group
from .processes import is_first, joined

_CALIBRATION, _EVALUATION = CalibrationOptions(), EvaluationOptions()


def _calibration_group() -> o.Decorator:
    return cloup.option_group(
        "Calibration",
        o.numbers(
            "--calib-samples",
            type=click.IntRange(1),
            default=1024,
            help="number of calibration images; they need no labels",
        ),
        o.keep_option(),
        option(
            "--method",
            type=click.Choice(METHODS),
            default=_CALIBRATION.method,
            show_default=True,
            help="refit the linear layers around each norm, or only set BatchNorm: per channel, or from its moments",
        ),
        option(
            "--reconstruct",
            type=click.Choice(RECONSTRUCT),
            default=_CALIBRATION.reconstruct,
            show_default=True,
            help="layers to refit: those that read a norm, or also those that write to the residual stream",
        ),
        o.numbers(
            "--refine-steps",
            type=click.IntRange(0),
            help="gradient steps of 32 images for each attention; more steps raise agreement but take longer  "
            "[one per batch, at least 28]",
        ),
        o.numbers(
            "--views",
            type=click.FloatRange(0, 1),
            metavar="X",
            help="corrupted copies to add for each calibration image, so that the model holds on unusual images  "
            f"[{SHARE:g} for {METHODS[0]}, else 0]",
        ),
        option(
            "--bound",
            type=click.Choice([AUTO, *BOUNDS]),
            default=_CALIBRATION.bound,
            show_default=True,
            help="clamp each channel where a LayerNorm was to its range in calibration, so that the model holds on "
            "unusual images: to nearly all of the range (wide), to 99 % (tight), per site as images held out allow "
            "(auto; for moments none), or not (none)",
        ),
        option(
            "--memory-budget",
            type=o.Size(),
            help="memory for calibration activations, for example 512M or 8G, on the host and again on a GPU; "
            "the rest goes to disk  [half of what is free]",
        ),
        option(
            "--ffn-bn",
            type=click.Choice(FFN_BN),
            default=FFN_BN[0],
            show_default=True,
            help="position of the BatchNorm inserted into each FFN",
        ),
        o.atol_option(),
    )


def _output_group() -> o.Decorator:
    return o.output_group(
        option("--dry-run", is_flag=True, help="show the plan and the images without converting"),
        option("--report/--no-report", default=None, help="write report.html  [if the report extra is installed]"),
        o.numbers(
            "--worst-images",
            type=click.IntRange(0),
            default=_EVALUATION.worst_images,
            help="number of the most changed images in the report",
        ),
        option(
            "--save-swapped",
            type=click.Path(path_type=Path),
            metavar="FOLDER",
            help="also write the model before folding, for normswap finetune and normswap fuse",
        ),
        option(
            "--export",
            type=click.Choice(FORMATS),
            help="also write a graph into the folder, as normswap export does",
        ),
    )


@cloup.command(cls=JoinedCommand)
@o.model_group()
@o.images_group(o.train_split_option("to calibrate on"))
@_output_group()
@_calibration_group()
@o.budget_group()
@cloup.option_group(
    "Corrupted images",
    option(
        "--stress/--no-stress",
        default=True,
        show_default=True,
        help="compare with the original on corrupted images: noise, blur, exposure, ...",
    ),
    *o.stress_options(_EVALUATION.stress),
)
@o.device_group()
@o.preprocessing_group()
@finetune_group(
    option("--control", is_flag=True, help="also fine-tune the unconverted model, with the same options"),
)
@o.messages_group()
def convert(**options: Any) -> None:
    """Remove LayerNorm from a pretrained model and save the result.

    Steps: plan, swap, calibrate, fold, verify, compare, save.

    \b
    normswap convert -m vit_small_patch16_224.augreg_in21k_ft_in1k --pretrained --data-dir imagenet -o out
    normswap convert -m local-dir:my-model --data-dir images -o out
    normswap convert -m vit_base_patch16_224 --checkpoint my.safetensors --num-classes 10 --data-dir images -o out
    """
    if options["output"] is None and not options["dry_run"]:
        raise click.UsageError("Missing option '-o' / '--output': the folder to write (or --dry-run).")
    run(Console(options["as_json"], options["quiet"]), options)


@dataclass
class _Job:
    """What is converted, and the images for each step of it."""

    model: Any
    device: str
    plan: Any
    training: Any  # FinetuneOptions, None without fine-tuning
    calibration: Any
    train: Any
    held_out: Any
    evaluation: Any
    compared: Any  # what a graph is compared on
    one_split: bool


def run(console: Console, options: dict[str, Any]) -> None:
    """Do what ``convert`` does; ``demo`` calls it with its own model and images."""
    console.say("load", options["model"])
    _check_targets(options)
    job = _prepare(console, options)
    if options["dry_run"]:
        console.result({**job.plan.to_json(options["ffn_bn"]), "dry_run": True}, str(job.plan))
        return
    from normswap.errors import CheckFailedError

    failure: CheckFailedError | None = None
    try:
        result = _convert(console, options, job)
    except CheckFailedError as error:
        failure, result = error, error.conversion
    if not is_first():  # the first process writes and says what failed; an exit code here would end it while it saves
        return
    if failure is None:
        _save(result, options)
        _finish(console, options, result.report, job)
        return
    text = str(failure)
    if result is not None and options["save_best"]:
        _save(result, options)
        _finish(console, options, failure.report, job, met=False)
        text += f": saved all the same as {options['output']}"
    else:
        conversion_output.show(console, failure.report, options["verbose"])
        text += "" if result is None else ": not saved"
    raise CheckFailedError(text) from failure


def _check_targets(options: dict[str, Any]) -> None:
    """Refuse what cannot be written or lacks a package, before any work."""
    from normswap.atomic import check_target
    from normswap.errors import ArgumentError
    from normswap.exporting.onnx_file import require_onnx
    from normswap.finetuning.trainer import require_accelerate
    from normswap.reporting.html_report import check_extra

    if options["report"]:
        check_extra()
    out: Path | None = options["output"]
    swapped: Path | None = options["save_swapped"]
    if out is not None and not options["dry_run"]:
        check_target(out, options["overwrite"], _sources(options))
        if swapped is not None:
            one, other = swapped.resolve(), out.resolve()
            if one.is_relative_to(other) or other.is_relative_to(one):
                raise ArgumentError(f"{out}: --save-swapped needs a folder of its own, not in or around --output")
            check_target(swapped, options["overwrite"], _sources(options))
    if options["export"] == "onnx":
        require_onnx()
    if options["finetune_epochs"]:
        require_accelerate()


def _prepare(console: Console, options: dict[str, Any]) -> _Job:
    """Open the model, find the images, plan, and say so."""
    from normswap import make_plan
    from normswap.inputs.dataset import load_splits
    from normswap.outputs.rebuild import check_rebuilt
    from normswap.pipeline.open_model import open_model

    training = a.finetuning(options)
    device = a.pick_device(options["device"])
    model = open_model(options["model"], **a.weights(options), **a.architecture(options)).to(device)
    if options["output"] is not None:
        check_rebuilt(options["model"], model)
    images, evaluation = load_splits(
        model,
        options["data_dir"],
        options["train_split"],
        options["split"],
        train_labels=training is not None and training.labels > 0,
        **a.data(options),
    )
    a.say_images(console, images, evaluation)
    _check_budget(options, training, images, evaluation)
    plan = make_plan(model, options["keep"], input_size=images.input_size)
    console.say("plan", plan.summary(options["ffn_bn"]))
    seed, count = options["seed"], options["calib_samples"]
    calibration, train, held_out = images.draw(count, seed), None, None
    if training is not None:
        calibration, train, held_out = a.training_sets(images, count, options["finetune_samples"], seed)
    one_split = images is evaluation
    compared = evaluation.draw(min(export.EVAL_SAMPLES, options["eval_samples"] or sys.maxsize), seed)
    if options["eval_samples"]:
        evaluation = evaluation.draw(options["eval_samples"], seed)
    job = _Job(model, device, plan, training, calibration, train, held_out, evaluation, compared, one_split)
    _say_what_is_done(console, options, job)
    return job


def _check_budget(options: dict[str, Any], training: Any, images: Any, evaluation: Any) -> None:
    from normswap.errors import ArgumentError

    if options["save_best"] and options["max_drop"] is None and options["min_agreement"] is None:
        raise ArgumentError("--save-best requires --max-drop or --min-agreement")
    if options["max_drop"] is not None and evaluation.num_classes is None:
        raise ArgumentError(f"--max-drop needs labels, and {evaluation.description} have none")
    if training is not None and training.labels > 0 and images.num_classes is None:
        raise ArgumentError(f"--label-weight needs labels, and {images.description} have none")


def _say_what_is_done(console: Console, options: dict[str, Any], job: _Job) -> None:
    readers_only = options["method"] == "reconstruct" and options["reconstruct"] == "readers"
    method = options["method"] + (" readers" if readers_only else "")
    console.say("calibrate", f"{method}, on {job.calibration.description}, device {job.device}")
    console.say("evaluate", f"on {job.evaluation.description}")
    if job.one_split:
        console.say("note", "there is one split only: calibration images are among the evaluation images")
    else:
        _say_overlap(console, job)
    if job.training is not None:
        text = f"{job.training.epochs} epochs, on {job.train.description}; {len(job.held_out)} others held out"
        console.say("finetune", text)
        a.say_resumed(console, options)


def _say_overlap(console: Console, job: _Job) -> None:
    from normswap.inputs.overlap import shared_images

    shared = shared_images(job.evaluation, [job.calibration, job.train], len(job.evaluation))
    if shared:
        text = f"{shared} of the {len(job.evaluation)} evaluation images are also used for calibration or training"
        console.say("note", text)


def _convert(console: Console, options: dict[str, Any], job: _Job) -> Any:
    from normswap.pipeline import convert as pipeline

    with joined(job.device), console.progress() as progress:
        return pipeline.convert(
            job.model,
            job.calibration,
            eval_images=job.evaluation,
            plan=job.plan,
            ffn_bn=options["ffn_bn"],
            calibration=a.calibration(options),
            budget=a.budget(options),
            finetune=a.finetune_stage(options, job.training, job.train, job.held_out),
            evaluation=a.evaluation(options),
            progress=progress,
        )


def _save(result: Any, options: dict[str, Any]) -> None:
    settings = a.saving(options, _sources(options), a.preprocessing(options))
    result.save(options["output"], settings)
    if options["save_swapped"] is not None:
        result.save_swapped(options["save_swapped"], settings)


def _finish(console: Console, options: dict[str, Any], report: Any, job: _Job, met: bool = True) -> None:
    """Say what was found and saved, and write a graph of it if one was asked for."""
    tables = conversion_output.tell(console, report, options["verbose"])
    if options["export"] is None:
        console.result(report.to_json(), *tables)
    if met:
        conversion_output.say_what_next(console, options, report)
    if options["export"] is not None:
        _export(console, options, report, tables, job.compared)


def _export(console: Console, options: dict[str, Any], report: Any, tables: list[Any], images: Any) -> None:
    """Write a graph of what was saved. If that fails, the folder stays: it is whole, and has passed its own checks."""
    from normswap import load
    from normswap.errors import CheckFailedError

    out = options["output"]
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


def _sources(options: dict[str, Any]) -> list[Path]:
    """Return the files and folders that are read, and must not be overwritten."""
    model = options["model"].removeprefix("local-dir:") if options["model"].startswith("local-dir:") else None
    paths = (model, options["checkpoint"], options["data_dir"], options["class_map"])
    return [Path(path) for path in paths if path is not None]
