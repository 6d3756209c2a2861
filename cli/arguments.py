"""From the options of the command line to the arguments of the library."""

import os
import sys
from pathlib import Path
from typing import Any

from .console import Console
from .processes import world_size


def architecture(options: dict[str, Any]) -> dict[str, Any]:
    """Pick the arguments of `normswap.load_model` that describe the architecture."""
    kwargs = dict(options["model_kwargs"])
    return {name: options[name] for name in ("num_classes", "img_size", "in_chans")} | kwargs


def weights(options: dict[str, Any]) -> dict[str, Any]:
    """Pick the arguments of `normswap.load_model` that say which weights."""
    return {name: options[name] for name in ("pretrained", "checkpoint", "use_ema")}


def against_weights(options: dict[str, Any]) -> dict[str, Any]:
    """Pick the same for the model that ``--against`` names."""
    return {name: options[f"against_{name}"] for name in ("pretrained", "checkpoint", "use_ema")}


def data(options: dict[str, Any]) -> dict[str, Any]:
    """Pick the arguments of `normswap.load_images` beyond path and split."""
    names = ("dataset", "class_map", "batch_size", "workers", "max_skipped")
    return {name: options[name] for name in names} | {"labels": not options["no_labels"]} | preprocessing(options)


def say_images(console: Any, *sets: Any) -> None:
    """Say what should be known of the images: labels that go by name, a split that is not there, files not read."""
    notes = [("note", note) for images in sets for note in images.notes]
    files = [
        ("files", f"{images.description}: {images.files.line()}")
        for images in sets
        if images.files and images.files.left
    ]
    for label, text in dict.fromkeys((*notes, *files)):
        console.say(label, text)


def preprocessing(options: dict[str, Any]) -> dict[str, Any]:
    """Pick the overrides of the model's data config that were given."""
    names = ("img_size", "crop_pct", "mean", "std", "interpolation")
    return {name: options[name] for name in names if options[name] is not None}


def amp_dtype(options: dict[str, Any]) -> Any:
    import torch

    return getattr(torch, options["amp_dtype"]) if options["amp"] else None


def pick_device(name: str) -> str:
    """Return the device to run on.

    Raises:
        ArgumentError: torch cannot use it here.
    """
    import torch

    from normswap.errors import ArgumentError, first_line

    if name == "auto":
        if torch.cuda.is_available():
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if world_size() > 1 else "cuda"
        return "cpu"
    try:
        torch.zeros(1, device=name).item()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(f"--device {name}: not usable here: {first_line(error)}") from error
    return name


def finetuning(options: dict[str, Any]) -> Any:
    """Return the `normswap.FinetuneOptions` that were asked for, None without fine-tuning.

    Raises:
        ArgumentError: invalid numbers, or --resume without a state.
        CheckpointError: the state of the run to resume is not there.
    """
    import torch

    from normswap.errors import ArgumentError
    from normswap.finetuning.options import FinetuneOptions, goes_on

    if not options["finetune_epochs"]:
        if resume(options) or options["finetune_state"] or options.get("control"):
            raise ArgumentError("--resume, --auto-resume, --finetune-state and --control require --finetune-epochs")
        return None
    if resume(options) and options["finetune_state"] is None:
        flag = "--auto-resume" if options["auto_resume"] else "--resume"
        raise ArgumentError(f"{flag} needs the state file of a run: --finetune-state (finetune: --state)")
    goes_on(options["finetune_state"], resume(options))
    chosen = FinetuneOptions(
        epochs=options["finetune_epochs"],
        lr=options["lr"],
        opt=options["opt"],
        weight_decay=options["weight_decay"],
        warmup=options["warmup"],
        batch_size=options["train_batch_size"],
        accumulate=options["grad_accum_steps"],
        clip_grad=options["clip_grad"],
        kl=options["kl_weight"],
        features=options["feature_weight"],
        labels=options["label_weight"],
        bn_mode=options["bn_mode"],
        stem=options["train_stem"],
        hflip=options["hflip"],
        scale=options["scale"],
        views=options["finetune_views"],
        fade=options["fade"],
        fade_order=options["fade_order"],
        ema=options["model_ema_decay"],
        amp_dtype=torch.bfloat16 if options["train_amp"] else None,
        seed=options["seed"],
    )
    chosen.check()
    return chosen


def resume(options: dict[str, Any]) -> Any:
    """Return whether a training run is resumed: True, False, or "auto" where its file decides."""
    if options["resume"] and options["auto_resume"]:
        from normswap.errors import ArgumentError

        raise ArgumentError("--resume and --auto-resume exclude each other")
    return "auto" if options["auto_resume"] else options["resume"]


def say_resumed(console: Console, options: dict[str, Any]) -> None:
    """Say whether a training run is gone on from or begun, where a file keeps its state."""
    from normswap.finetuning.options import goes_on

    state = options["finetune_state"]
    if state is not None:
        resumed = goes_on(state, resume(options))
        console.say("resume", f"from {state}" if resumed else f"no, this run begins; its state will be in {state}")


def calibration(options: dict[str, Any]) -> Any:
    """Return the `normswap.CalibrationOptions` that were asked for."""
    from normswap.calibration.options import CalibrationOptions

    names = ("method", "reconstruct", "refine_steps", "memory_budget", "views", "bound")
    return CalibrationOptions(**{name: options[name] for name in names})


def budget(options: dict[str, Any]) -> Any:
    """Return the `normswap.AccuracyBudget` that was asked for."""
    from normswap.search.budget import AccuracyBudget

    names = ("max_drop", "min_agreement", "max_keep", "max_evaluations")
    return AccuracyBudget(**{name: options[name] for name in names})


def finetune_stage(options: dict[str, Any], training: Any, images: Any, held_out: Any) -> Any:
    """Return the `normswap.FinetuneStage` that was asked for, None without fine-tuning."""
    from normswap.pipeline.options import FinetuneStage

    if training is None:
        return None
    return FinetuneStage(training, images, held_out, options["finetune_state"], resume(options), options["control"])


def evaluation(options: dict[str, Any]) -> Any:
    """Return the `normswap.EvaluationOptions` that were asked for."""
    from normswap.pipeline.options import EvaluationOptions

    names = ("worst_images", "max_stress_drop")
    given: dict[str, Any] = {name: options[name] for name in names if name in options}
    if "stress" in options:
        given["stress"] = options["stress_samples"] if options["stress"] else 0
    return EvaluationOptions(atol=options["atol"], amp_dtype=amp_dtype(options), name=options["model"], **given)


def saving(options: dict[str, Any], sources: list[Path], data_config: dict[str, Any] | None) -> Any:
    """Return the `normswap.SaveOptions` that were asked for; the folder must hold none of ``sources``."""
    from normswap.outputs.options import SaveOptions

    command = ["normswap", *sys.argv[1:]]
    return SaveOptions(options["overwrite"], sources, command, data_config or None, options.get("report"))


def training_sets(images: Any, calibrate: int, train: int | None, seed: int) -> tuple[Any, Any, Any]:
    """Return images to calibrate on, to train on, and to hold out from both; of all there are, if they are few.

    Args:
        images: the `ImageSet` to draw from.
        calibrate: how many to calibrate on.
        train: how many for fine-tuning, with those held out; None for as many as for calibration.
        seed: draws them.

    Raises:
        ArgumentError: there is only one image.
    """
    from normswap.errors import ArgumentError
    from normswap.finetuning.holdout import held_out_of

    if len(images) < 2:
        raise ArgumentError(f"fine-tuning needs at least two images, there are {len(images)}")
    train = min(train or calibrate, len(images))
    held = held_out_of(train)
    calibrate, train = (min(count, len(images) - held) for count in (calibrate, train - held))
    return images.draw(calibrate, seed), images.draw(train, seed), images.draw(held, seed, max(calibrate, train))
