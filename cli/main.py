"""The command group. Nothing here imports torch, so that help and usage errors answer at once."""

import click

from .benchmark import benchmark
from .console import GROUP_EPILOG
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .export import export
from .finetune import finetune, fuse
from .inspect import inspect
from .push import push
from .report import report


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}, epilog=GROUP_EPILOG)
@click.version_option(package_name="normswap", prog_name="normswap")
def cli() -> None:
    """Take LayerNorm out of a pretrained timm vision transformer, fold BatchNorm into its weights, and measure.

    Start with `normswap demo`; look at your own model with `normswap inspect -m MODEL`.
    """


for command in (demo, inspect, convert, finetune, fuse, evaluate, export, benchmark, report, push):
    cli.add_command(command)
