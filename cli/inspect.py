"""``normswap inspect``: show the plan for a model; change nothing."""

from typing import Any

import cloup

from . import next_command
from . import options as o
from .arguments import architecture
from .console import Console, NormswapCommand


@cloup.command(cls=NormswapCommand)
@o.model_group(weights=False)
@cloup.option_group("Plan", o.keep_option())
@o.messages_group()
def inspect(**options: Any) -> None:
    """Show what would become of each LayerNorm of a model, and why.

    No weights are loaded. Verdicts: fold-forward (into the layers that read it), fold-backward (into the layers that
    write its input), affine (a scale and shift remains, no LayerNorm), keep (the LayerNorm remains).

    \b
    normswap inspect -m vit_base_patch16_224
    normswap inspect -m local-dir:my-model --json
    """
    console = Console(options["as_json"], options["quiet"])
    from normswap import make_plan
    from normswap.pipeline.open_model import open_model

    model = options["model"]
    plan = make_plan(open_model(model, weights=False, **architecture(options)), options["keep"])
    console.result(plan.to_json(), plan.table())
    for ffn in plan.ffns:
        if ffn.reason:
            console.say("ffn", f"no BatchNorm in {ffn.path} ({ffn.kind}): {ffn.reason}")
    console.say("plan", plan.summary())
    changes = {**next_command.with_images(options), "pretrained": ":" not in model, "output": "OUT"}
    console.say("next", next_command.line("convert", options, **changes))
