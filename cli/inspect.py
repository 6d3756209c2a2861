"""``normswap inspect``: show the plan for a model; change nothing."""

from typing import Any

import click

from .arguments import architecture
from .console import Console, NormswapCommand
from .options import architecture_options, output_options


@click.command(cls=NormswapCommand)
@architecture_options()
@click.option("--keep", multiple=True, metavar="GLOB", help="LayerNorms to keep, as 'blocks.0.*'; repeatable")
@output_options()
def inspect(model: str, keep: tuple[str, ...], as_json: bool, quiet: bool, verbose: int, **options: Any) -> None:
    """Say for each LayerNorm of a model what normswap would do with it, and why.

    No weights are loaded. Verdicts: fold-forward (into the layers that read it), fold-backward (into what it is
    made of), affine (a scale and shift stays, no LayerNorm), keep (the LayerNorm stays).

    \b
    normswap inspect -m vit_base_patch16_224
    normswap inspect -m local-dir:my-model --json
    """
    console = Console(as_json, quiet)
    from normswap import make_plan
    from normswap.pipeline import open_model

    plan = make_plan(open_model(model, weights=False, **architecture(options)), keep)
    console.result(plan.to_json(), plan.table())
    for ffn in plan.ffns:
        if ffn.reason:
            console.say("ffn", f"no BatchNorm in {ffn.path} ({ffn.kind}): {ffn.reason}")
    console.say("plan", plan.summary())
    pretrained = "" if ":" in model else " --pretrained"
    console.say("next", f"normswap convert -m {model}{pretrained} --data-dir IMAGES -o OUT")
