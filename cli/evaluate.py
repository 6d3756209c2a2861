"""``normswap evaluate``: top-1 and top-5 of one model, or of two side by side."""

from typing import Any

import click
import cloup
from cloup import option

from . import arguments as a
from . import options as o
from .console import Console, NormswapCommand

_ALONE = ("n", "top1", "top5", "non_finite")


@cloup.command(cls=NormswapCommand)
@o.model_group()
@o.against_group()
@o.images_group()
@cloup.option_group(
    "Corrupted images",
    option(
        "--stress", is_flag=True, help="also compare with --against on corrupted images: noise, blur, exposure, ..."
    ),
    *o.stress_options(500),
)
@o.preprocessing_group()
@o.device_group()
@o.messages_group()
def evaluate(**options: Any) -> None:
    """Measure the accuracy of a model, alone or against another.

    With --against also top-1 agreement, KL divergence and the worst image.

    \b
    normswap evaluate -m local-dir:out --against local-dir:my-model --data-dir images
    normswap evaluate -m local-dir:out --against local-dir:my-model --data-dir images --stress
    """
    if options["stress"] and options["against"] is None:
        raise click.UsageError("--stress compares two models: name the original with --against.")
    if options["max_stress_drop"] is not None and not options["stress"]:
        raise click.UsageError("--max-stress-drop requires --stress.")
    console = Console(options["as_json"], options["quiet"])
    model, against = options["model"], options["against"]
    console.say("load", model)
    from normswap import evaluate_models, load_images
    from normswap.records.json_types import plain
    from normswap.records.provenance import versions
    from normswap.reporting.conversion_tables import stages_table

    device = a.pick_device(options["device"])
    models = _open(console, options, device)
    measured = list(models.values())[-1]
    images = load_images(measured, options["data_dir"], options["split"], **a.data(options))
    a.say_images(console, images)
    if options["eval_samples"]:
        images = images.draw(options["eval_samples"], options["seed"])
    console.say("evaluate", f"on {images.description}, device {device}")
    with console.progress() as progress:
        stages = evaluate_models(models, images, a.amp_dtype(options), progress, len(images))
        stress = _stress(models, images, options, progress) if options["stress"] else None
    last = stages[-1]
    line = last.accuracy_line()
    if line:
        console.say("eval", line)
    for name in images.skipped:
        console.say("skipped", f"{name} cannot be read")
    record = {
        "model": model,
        "against": against,
        "data": images.description,
        "img_size": images.input_size[-1],
        "param_count": round(sum(p.numel() for p in measured.parameters()) / 1e6, 2),
        "skipped_images": sorted(images.skipped),
        "versions": versions(),
        "stages": [vars(stage) for stage in stages],
        **{k: v for k, v in vars(last).items() if k != "name" and (against is not None or k in _ALONE)},
    }
    if stress is None:
        console.result(plain(record), stages_table(stages))
        return
    _show_stress(console, plain(record), stages_table(stages), stress, options["max_stress_drop"])


def _stress(models: dict[str, Any], images: Any, options: dict[str, Any], progress: Any) -> Any:
    from normswap import stress_models

    original, measured = models.values()
    some = images.draw(options["stress_samples"], options["seed"])
    return stress_models(
        original, measured, some, seed=options["seed"], amp_dtype=a.amp_dtype(options), progress=progress
    )


def _show_stress(console: Console, record: dict[str, Any], stages: Any, stress: Any, limit: float | None) -> None:
    """Print the result, then fail if corrupted images cost more than the limit."""
    from normswap.errors import CheckFailedError
    from normswap.reporting.stress_tables import stress_line, stress_table

    console.say("stress", stress_line(stress))
    console.result({**record, "stress": stress.to_json()}, stress_table(stress), stages)
    problem = None if limit is None else stress.problem(limit)
    if problem:
        raise CheckFailedError(problem, stress)


def _open(console: Console, options: dict[str, Any], device: str) -> dict[str, Any]:
    """Return the models by name, the measured one last."""
    from normswap.pipeline.open_model import is_converted, open_model

    model, against = options["model"], options["against"]
    architecture = a.architecture(options)
    # A converted folder knows its own architecture; with --against the options are for the original.
    own = {} if against is not None and is_converted(model) else architecture
    measured = open_model(model, **a.weights(options), **own).to(device)
    if against is None:
        return {model: measured}
    console.say("load", against)
    own = {} if is_converted(against) else architecture
    reference = open_model(against, **a.against_weights(options), **own).to(device)
    # The same name twice still is two models.
    return {against: reference, model if model != against else f"{model} (2)": measured}
