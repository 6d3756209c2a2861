"""``normswap demo``: the whole main job on the model and images inside the package."""

from pathlib import Path
from typing import Any

import click

from .console import Console, JoinedCommand
from .options import output_options

DEFAULT_OUTPUT = Path("normswap-demo")


@click.command(cls=JoinedCommand)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=DEFAULT_OUTPUT, show_default=True, help="folder to write"
)
@click.option("--overwrite", is_flag=True, help="replace an output folder that is not empty")
@output_options()
@click.pass_context
def demo(ctx: click.Context, output: Path, overwrite: bool, as_json: bool, quiet: bool, verbose: int) -> None:
    """Convert the embedded model: a tiny ViT that reads handwritten digits. Offline, under a minute on two cores.

    It runs the very code of `normswap convert`.
    """
    from . import convert

    console = Console(as_json, quiet)
    from normswap.demo import FOLDER, MODEL

    # A second demo may replace the first one, but nothing else.
    again = output == DEFAULT_OUTPUT and (output / "normswap.json").is_file()
    arguments = ["-m", MODEL, "--data-dir", str(FOLDER), "-o", str(output), "-j", "0", "-b", "64"]
    given: dict[str, Any] = convert.convert.make_context("convert", arguments, parent=ctx).params
    given |= {"overwrite": overwrite or again, "as_json": as_json, "quiet": quiet, "verbose": verbose}
    convert.run(console, given)
