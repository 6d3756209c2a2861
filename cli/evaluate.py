"""``normswap evaluate``: top-1 and top-5 of one model, or of two side by side."""

from typing import Any

import cloup

from . import arguments as a
from . import options as o
from .console import Console, NormswapCommand

_ALONE = ("n", "top1", "top5", "non_finite")


@cloup.command(cls=NormswapCommand)
@o.model_group()
@o.against_group()
@o.images_group()
@o.preprocessing_group()
@o.device_group()
@o.messages_group()
def evaluate(**options: Any) -> None:
    """Measure the accuracy of a model, alone or against another.

    With --against also top-1 agreement, KL divergence and the worst image.

    \b
    normswap evaluate -m local-dir:out --against local-dir:my-model --data-dir images
    """
    console = Console(options["as_json"], options["quiet"])
    model, against = options["model"], options["against"]
    console.say("load", model)
    from normswap import evaluate_models, load_images
    from normswap.records.provenance import versions
    from normswap.records.report import plain
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
    console.result(plain(record), stages_table(stages))


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
