"""``normswap evaluate``: top-1 and top-5 of one model, or of two side by side."""

from typing import Any

import click

from . import arguments as a
from . import options as o
from .console import Console, NormswapCommand


@click.command(cls=NormswapCommand)
@o.architecture_options()
@o.weights_options()
@o.against_options()
@o.data_options()
@o.output_options()
def evaluate(
    model: str,
    against: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
    **options: Any,
) -> None:
    """Measure a model on images; with --against also agreement, KL and the worst image.

    \b
    normswap evaluate -m local-dir:out --against local-dir:my-model --data-dir images
    """
    console = Console(as_json, quiet)
    console.say("load", model)
    from normswap import evaluate_models, load_images
    from normswap.pipeline import is_converted, open_model
    from normswap.provenance import versions
    from normswap.report import plain, stages_table

    device = a.pick_device(options["device"])
    architecture = a.architecture(options)
    # A converted folder knows its own architecture; with --against the options are for the original.
    own = {} if against is not None and is_converted(model) else architecture
    measured = open_model(model, **a.weights(options), **own).to(device)
    models = {model: measured}
    if against is not None:
        console.say("load", against)
        reference = open_model(
            against,
            **a.against_weights(options),
            **({} if is_converted(against) else architecture),
        ).to(device)
        # The reference comes first; the same name twice still is two models.
        models = {against: reference, model if model != against else f"{model} (2)": measured}
    images = load_images(measured, options["data_dir"], options["split"], **a.data(options))
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


_ALONE = ("n", "top1", "top5", "non_finite")
