"""``normswap convert``: checkpoint in, fused safetensors out."""

import sys
from pathlib import Path
from typing import Any

import click

from . import options as o
from .console import Console, NormswapCommand
from .processes import is_first, joined

# The library's own lists cannot be imported here: they come with torch. A test holds these equal to them.
_METHODS = ("reconstruct", "channel", "moments")
_RECONSTRUCT = ("all", "readers")
_POSITIONS = ("pre-act", "post-act", "none")


@click.command(cls=NormswapCommand)
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
    "--memory-budget",
    type=o.Size(),
    help="memory for calibration's activations, as 512M or 8G; the rest goes to disk  [half of what is free]",
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
    from normswap.save import check_saveable

    if out is not None and not options["dry_run"]:
        check_target(out, options["overwrite"], sources)
    device = o.pick_device(options["device"])
    model = pipeline.open_model(options["model"], **o.weights(options), **o.architecture(options)).to(device)
    if out is not None:
        check_saveable(model)
    training = o.finetuning(options)
    images, evaluation = load_splits(
        model,
        options["data_dir"],
        options["train_split"],
        options["split"],
        train_labels=training is not None and training.labels > 0,
        **o.data(options),
    )
    budget = {name: options[name] for name in ("max_drop", "min_agreement", "max_keep", "max_evaluations")}
    if options["save_best"] and options["max_drop"] is None and options["min_agreement"] is None:
        raise ArgumentError("--save-best goes with --max-drop or --min-agreement")
    if options["max_drop"] is not None and evaluation.num_classes is None:
        raise ArgumentError(f"--max-drop needs labels, and {evaluation.description} have none")
    plan = make_plan(model, options["keep"], input_size=images.input_size)
    console.say("plan", plan.summary(options["ffn_bn"]))
    calibration = images.draw(options["calib_samples"], options["seed"])
    one_split = images is evaluation
    if options["eval_samples"]:
        evaluation = evaluation.draw(options["eval_samples"], options["seed"])
    method = options["method"] + (" readers" if _readers_only(options) else "")
    console.say("calibrate", f"{method}, on {calibration.description}, device {device}")
    console.say("evaluate", f"on {evaluation.description}")
    if one_split:
        console.say("note", "there is one split only: calibration images are among the evaluation images")
    train = images.draw(options["finetune_samples"], options["seed"]) if options["finetune_samples"] else calibration
    if training is not None:
        console.say("finetune", f"{training.epochs} epochs, on {train.description}")
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
                atol=options["atol"],
                **budget,
                amp_dtype=o.amp_dtype(options),
                finetune_options=training,
                finetune_images=train,
                finetune_state=options["finetune_state"],
                resume=options["resume"],
                control=options["control"],
                name=options["model"],
                progress=progress,
            )
            if not is_first():
                return
            _save(result, options, sources)
    except CheckFailedError as error:
        best, text = error.conversion, str(error)
        if best is not None:
            text += ": not saved"
            if options["save_best"] and is_first():
                _save(best, options, sources)
                text = f"{error}: saved all the same as {out}"
        _show(console, error.report, options["verbose"])
        raise CheckFailedError(text) from error
    _show(console, result.report, options["verbose"])
    _say_what_next(console, options, result.report, out)


def _save(result: Any, options: dict[str, Any], sources: list[Path]) -> None:
    command = ["normswap", *sys.argv[1:]]
    result.save(options["output"], options["overwrite"], sources, command, o.preprocessing(options) or None)


def _sources(options: dict[str, Any]) -> list[Path]:
    model = options["model"].removeprefix("local-dir:") if options["model"].startswith("local-dir:") else None
    paths = (model, options["checkpoint"], options["data_dir"], options["class_map"])
    return [Path(path) for path in paths if path is not None]


def _readers_only(options: dict[str, Any]) -> bool:
    return options["method"] == "reconstruct" and options["reconstruct"] == "readers"


def _show(console: Console, report: Any, verbose: int) -> None:
    if report is None:
        return
    from normswap.budget import trade_line, trade_table
    from normswap.report import kept_layers, layers_table, scarce_rows, sites_table, stages_table, stream_table

    if report.calibration_passes is not None:
        seconds = report.seconds["calibrate"]
        cost = f"{seconds:.1f} s, {report.calibration_passes:.1f} plain forward passes over the same images"
        console.say("cost", f"calibration took {cost}")
    if report.finetuning is not None:
        console.say("finetune", report.finetuning.line())
    for line in kept_layers(report.layers, most=sys.maxsize if verbose else 3):
        console.say("kept", line)
    stay = [site["path"] for site in report.plan if site["verdict"] == "keep"]
    if stay:
        console.say("LayerNorm", f"{len(stay)} of {len(report.plan)} stay: {', '.join(stay)}")
    if report.budget is not None:
        console.say("budget", trade_line(report.budget))
    scarce = scarce_rows(report.layers)
    if scarce:
        console.say("scarce", scarce)
    for stage in report.stages:
        line = stage.accuracy_line()
        if line:
            console.say("eval", f"{stage.name:<10} {line}")
    for name in report.skipped_images[:3]:
        console.say("skipped", f"{name} cannot be read")
    if len(report.skipped_images) > 3:
        console.say("skipped", f"{len(report.skipped_images)} images in all")
    console.say("fold", f"largest difference of an output, fused against unfused: {report.fold_max_abs_err:.3g}")
    tables = []
    if verbose:
        tables += [sites_table(report.fits)] + ([layers_table(report.layers)] if report.layers else [])
    if report.stream:
        tables.append(stream_table(report.stream, every=verbose > 0))
    if report.budget is not None:
        tables.append(trade_table(report.budget))
    if report.stages:
        tables.append(stages_table(report.stages))
    console.result(report.to_json(), *tables)


def _say_what_next(console: Console, options: dict[str, Any], report: Any, out: Path) -> None:
    console.say("wrote", f"{out}/model.safetensors, config.json, normswap.json, README.md")
    if report.stock_timm is None:
        loads = f'timm.create_model("local-dir:{out}", pretrained=True, norm_layer=torch.nn.Identity)'
        console.say("load with", f"{loads}   (normswap not needed; checked, difference 0)")
    else:
        console.say("load with", f'normswap.load("{out}")   (not with plain timm: {report.stock_timm})')
    images = f"--data-dir {options['data_dir']}" if options["data_dir"] else f"--dataset {options['dataset']}"
    against = [f"--against {options['model']}"]
    if options["checkpoint"]:
        against.append(f"--against-checkpoint {options['checkpoint']}")
    if options["pretrained"]:
        against.append("--against-pretrained")
    for name in ("num_classes", "img_size", "in_chans"):
        if options[name] is not None:
            against.append(f"--{name.replace('_', '-')} {options[name]}")
    console.say("next", f"normswap evaluate -m local-dir:{out} {' '.join(against)} {images}")
