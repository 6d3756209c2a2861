"""The command group. Nothing here imports torch, so that help and usage errors answer at once."""

import click
import cloup

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


@cloup.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=GROUP_EPILOG,
    sections=[
        cloup.Section("Start here", [demo, inspect]),
        cloup.Section("Convert", [convert, finetune, fuse]),
        cloup.Section("Measure", [evaluate, benchmark]),
        cloup.Section("Deploy", [export, report, push]),
    ],
)
@click.version_option(package_name="normswap", prog_name="normswap")
def cli() -> None:
    """Take LayerNorm out of a pretrained timm vision transformer, fold BatchNorm into its weights, and measure.

    Start with `normswap demo`; look at your own model with `normswap inspect -m MODEL`.
    """
