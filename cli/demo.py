"""``normswap demo``: the whole main job on the model and images inside the package."""

from pathlib import Path
from typing import Any

import click
import cloup

from . import options as o
from .console import Console, JoinedCommand

DEFAULT_OUTPUT = Path("normswap-demo")


@cloup.command(cls=JoinedCommand)
@o.output_group(default=DEFAULT_OUTPUT, show_default=True)
@o.messages_group()
@click.pass_context
def demo(ctx: click.Context, output: Path, overwrite: bool, **messages: Any) -> None:
    """Convert a tiny ViT that ships with normswap, offline.

    The model reads handwritten digits. It takes under a minute on two cores, and runs the code of `normswap convert`.
    """
    from . import convert

    console = Console(messages["as_json"], messages["quiet"])
    from normswap.demo import FOLDER, MODEL

    # A second demo may replace the first one, but nothing else.
    again = output == DEFAULT_OUTPUT and (output / "normswap.json").is_file()
    arguments = ["-m", MODEL, "--data-dir", str(FOLDER), "-o", str(output), "-j", "0", "-b", "64"]
    given: dict[str, Any] = convert.convert.make_context("convert", arguments, parent=ctx).params
    convert.run(console, {**given, "overwrite": overwrite or again, **messages})
