"""Options that several commands share, spelled as timm spells them where timm has them."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")

F = TypeVar("F", bound=Callable[..., Any])


def _all(*options: Callable[[F], F]) -> Callable[[F], F]:
    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class ModelKwarg(click.ParamType):
    """KEY=VALUE, the value a Python literal where it is one, as in timm."""

    name = "KEY=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        key, separator, text = str(value).partition("=")
        if not separator or not key.isidentifier():
            self.fail(f"{value!r} is not of the form KEY=VALUE", param, ctx)
        try:
            return key, ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return key, text


class Size(click.ParamType):
    """A memory size, as 512M or 8G, in bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from normswap.errors import ArgumentError
        from normswap.spill import parse_bytes

        try:
            return parse_bytes(str(value))
        except ArgumentError as error:
            self.fail(str(error), param, ctx)


def architecture_options(required: bool = True) -> Callable[[F], F]:
    return _all(
        click.option(
            "-m",
            "--model",
            required=required,
            metavar="MODEL",
            help="what timm.create_model takes: a name, hf-hub:ID or local-dir:PATH",
        ),
        click.option("--num-classes", type=click.IntRange(0), help="classes; 0 for a headless model [model's own]"),
        click.option("--img-size", type=click.IntRange(1), help="height and width in pixels [model's own]"),
        click.option("--in-chans", type=click.IntRange(1), help="image channels [model's own]"),
        click.option("--model-kwargs", type=ModelKwarg(), multiple=True, help="more arguments for timm, repeatable"),
    )


def weights_options() -> Callable[[F], F]:
    return _all(
        click.option("--pretrained", is_flag=True, help="timm's weights for a plain name"),
        click.option(
            "--checkpoint",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="weights file: .safetensors, or .pth/.pt without code in it",
        ),
        click.option("--use-ema", is_flag=True, help="take the EMA weights of a training checkpoint"),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...; auto takes a GPU"),
    )


def against_options(what: str = "the original to compare with, in the same form as -m") -> Callable[[F], F]:
    return _all(
        click.option("--against", metavar="MODEL", help=what),
        click.option("--against-pretrained", is_flag=True, help="timm's weights for --against"),
        click.option(
            "--against-checkpoint",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="weights file for --against",
        ),
        click.option("--against-use-ema", is_flag=True, help="take the EMA weights of --against-checkpoint"),
    )


def data_options() -> Callable[[F], F]:
    return _all(
        image_options(),
        click.option("--amp", is_flag=True, help="evaluate in mixed precision; calibration and fold never are"),
        click.option(
            "--amp-dtype",
            type=click.Choice(["float16", "bfloat16"]),
            default="float16",
            show_default=True,
            help="of --amp",
        ),
    )


def source_options(split: str = "split to evaluate on") -> Callable[[F], F]:
    return _all(
        click.option(
            "--data-dir",
            type=click.Path(exists=True, path_type=Path),
            help="folder of class folders, folder with one folder or .tar per split, or a .tar",
        ),
        click.option("--dataset", default="", help="timm's dataset name, as torch/cifar10 or hfds/..."),
        click.option("--split", default="validation", show_default=True, help=split),
    )


def image_options(eval_samples: int | None = None) -> Callable[[F], F]:
    return _all(
        source_options(),
        click.option("--class-map", type=click.Path(exists=True, dir_okay=False), help="timm's class map file"),
        click.option("--no-labels", is_flag=True, help="ignore folder names; compare with the original only"),
        click.option(
            "--eval-samples",
            type=click.IntRange(1),
            default=eval_samples,
            show_default=eval_samples is not None,
            help="evaluate on a random part" + ("" if eval_samples else " [all images]"),
        ),
        click.option("--max-skipped", type=click.IntRange(0), default=10, show_default=True, help="unreadable images"),
        click.option(
            "-b", "--batch-size", type=click.IntRange(1), default=64, show_default=True, help="images at once"
        ),
        click.option(
            "-j", "--workers", type=click.IntRange(0), default=2, show_default=True, help="processes that read images"
        ),
        click.option("--crop-pct", type=click.FloatRange(0, min_open=True), help="[model's own]"),
        click.option("--mean", type=float, nargs=3, help="[model's own]"),
        click.option("--std", type=click.FloatRange(0, min_open=True), nargs=3, help="[model's own]"),
        click.option("--interpolation", type=click.Choice(_INTERPOLATIONS), help="[model's own]"),
        click.option(
            "--seed", type=click.IntRange(0, 2**63 - 1), default=42, show_default=True, help="draws calibration images"
        ),
    )


def budget_options() -> Callable[[F], F]:
    return _all(
        click.option(
            "--max-drop",
            type=float,
            metavar="PTS",
            help="lose at most so many points of top-1: LayerNorms stay as needed, exit 4 if that does not do",
        ),
        click.option(
            "--min-agreement",
            type=click.FloatRange(0, 100),
            metavar="PCT",
            help="the same for the percent of the original's answers kept; needs no labels",
        ),
        click.option("--max-keep", type=click.IntRange(0), help="LayerNorms that may stay for it; 0 only checks [any]"),
        click.option(
            "--max-evaluations",
            type=click.IntRange(1),
            default=8,
            show_default=True,
            help="conversions that may be tried for it",
        ),
        click.option("--save-best", is_flag=True, help="save the best of them even if it misses the budget"),
    )


def finetune_options(prefix: str = "finetune-", epochs: int = 0, samples: str = "those of calibration") -> Any:
    """Return the options of fine-tuning; ``prefix`` goes before the names that mean something else in convert."""
    return _all(
        click.option(
            f"--{prefix}epochs",
            "finetune_epochs",
            type=click.IntRange(0 if prefix else 1),
            default=epochs,
            show_default=True,
            help="distil from the original",
        ),
        click.option(
            f"--{prefix}samples",
            "finetune_samples",
            type=click.IntRange(2),
            help=f"images to train on [{samples}]",
        ),
        click.option("--opt", default="adamw", show_default=True, help="timm optimiser"),
        click.option(
            "--lr", type=click.FloatRange(0, min_open=True), default=1e-5, show_default=True, help="peak learning rate"
        ),
        click.option(
            "--weight-decay", type=click.FloatRange(0), default=0.0, show_default=True, help="of the optimiser"
        ),
        click.option(
            "--warmup",
            type=click.FloatRange(0, 1, max_open=True),
            default=0.1,
            show_default=True,
            help="of the steps",
        ),
        click.option("--train-batch-size", type=click.IntRange(1), default=32, show_default=True, help="of one step"),
        click.option(
            "--grad-accum-steps", type=click.IntRange(1), default=1, show_default=True, help="batches per step"
        ),
        click.option(
            "--clip-grad", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True, help="largest norm"
        ),
        click.option("--kl-weight", type=click.FloatRange(0), default=1.0, show_default=True, help="of the answers"),
        click.option(
            "--feature-weight", type=click.FloatRange(0), default=1.0, show_default=True, help="of the residual stream"
        ),
        click.option(
            "--label-weight", type=click.FloatRange(0), default=0.0, show_default=True, help="of the labels' loss"
        ),
        click.option(
            "--bn-mode",
            type=click.Choice(["frozen", "train"]),
            default="frozen",
            show_default=True,
            help="BatchNorm as it was set, or with each batch's statistics",
        ),
        click.option("--train-stem", is_flag=True, help="train the first layer too; it makes runs less stable"),
        click.option(
            "--hflip", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="mirror training images"
        ),
        click.option(
            "--scale",
            type=click.FloatRange(0, 1, min_open=True),
            default=1.0,
            show_default=True,
            help="least share of a training image that a random crop keeps",
        ),
        click.option(
            "--fade", type=click.FloatRange(0, 1, max_open=True), default=0.0, help="blend over this share of the run"
        ),
        click.option(
            "--fade-order",
            type=click.Choice(["all", "blockwise", "mlp-first"]),
            default="all",
            show_default=True,
            help="which LayerNorms fade when",
        ),
        click.option(
            "--model-ema-decay",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            help="average the weights [off]",
        ),
        click.option("--train-amp", is_flag=True, help="fine-tune in bfloat16 mixed precision"),
        click.option(
            f"--{prefix}state",
            "finetune_state",
            type=click.Path(path_type=Path, dir_okay=False),
            help="keep the run's state here",
        ),
        click.option("--resume", is_flag=True, help=f"go on from --{prefix}state"),
    )


def output_options() -> Callable[[F], F]:
    return _all(
        click.option("--json", "as_json", is_flag=True, help="one JSON object on stdout"),
        click.option("-q", "--quiet", is_flag=True, help="no talk on stderr"),
        click.option("-v", "--verbose", count=True, help="-v: every layer, warnings, logs; -vv: tracebacks"),
    )
