"""Options that several commands share, in the groups of --help; spelled as timm spells them where timm has them."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from cloup import option, option_group

from normswap.finetuning.options import FinetuneOptions
from normswap.search.budget import AccuracyBudget

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos", "random")
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

# The library's own defaults; their modules do not import torch.
_TRAINING, _BUDGET = FinetuneOptions(), AccuracyBudget()

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]


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
    """A memory size, for example 512M or 8G, in bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from normswap.calibration.activation_store import parse_bytes
        from normswap.errors import ArgumentError

        try:
            return parse_bytes(str(value))
        except ArgumentError as error:
            self.fail(str(error), param, ctx)


def numbers(*declarations: str, type: click.ParamType, default: Any = None, metavar: str = "N", **more: Any) -> Any:
    """Return an option that takes a number; help shows the default if there is one."""
    return option(*declarations, type=type, default=default, show_default=default is not None, metavar=metavar, **more)


def model_group(required: bool = True, weights: bool = True) -> Decorator:
    """Return the options of -m: its architecture and, unless only the architecture is wanted, its weights."""
    where = [
        option("--pretrained", is_flag=True, help="load timm's weights for a plain model name"),
        option("--checkpoint", type=_FILE, help="weights file: .safetensors, or .pth/.pt without code in it"),
        option("--use-ema", is_flag=True, help="load the EMA weights of a training checkpoint"),
    ]
    return option_group(
        "Model",
        option(
            "-m",
            "--model",
            required=required,
            metavar="MODEL",
            help="timm model name, hf-hub:ID or local-dir:PATH",
        ),
        *(where if weights else ()),
        numbers("--num-classes", type=click.IntRange(0), help="number of classes; 0: headless model  [model's own]"),
        numbers("--img-size", type=click.IntRange(1), help="image height and width in pixels  [model's own]"),
        numbers("--in-chans", type=click.IntRange(1), help="number of image channels  [model's own]"),
        option(
            "--model-kwargs", type=ModelKwarg(), multiple=True, help="more arguments of timm.create_model; repeatable"
        ),
    )


def keep_option() -> Decorator:
    return option(
        "--keep", multiple=True, metavar="GLOB", help="LayerNorms to keep, for example 'blocks.0.*'; repeatable"
    )


def against_group(model: str = "original model to compare with, in the same form as -m") -> Decorator:
    return option_group(
        "Original model",
        option("--against", metavar="MODEL", help=model),
        option("--against-pretrained", is_flag=True, help="load timm's weights for --against"),
        option("--against-checkpoint", type=_FILE, help="weights file for --against"),
        option("--against-use-ema", is_flag=True, help="load the EMA weights of --against-checkpoint"),
    )


def source_options(split: str = "split to evaluate on") -> tuple[Decorator, ...]:
    """Return the options that say where images come from."""
    return (
        option(
            "--data-dir",
            type=click.Path(exists=True, path_type=Path),
            help="folder of class folders, folder with one folder or .tar per split, or a .tar",
        ),
        option(
            "--dataset", metavar="NAME", default="", help="timm's dataset name, for example torch/cifar10 or hfds/..."
        ),
        option("--split", metavar="NAME", default="validation", show_default=True, help=split),
    )


def images_group(*more: Decorator, eval_samples: int | None = None) -> Decorator:
    """Return the options that say which images; ``more`` come behind the split to evaluate on."""
    return option_group(
        "Images",
        *source_options(),
        *more,
        numbers(
            "--eval-samples",
            type=click.IntRange(1),
            default=eval_samples,
            help="number of images to evaluate on, drawn at random" + ("" if eval_samples else "  [all]"),
        ),
        option("--no-labels", is_flag=True, help="ignore the labels; compare with the original model only"),
        option("--class-map", type=click.Path(exists=True, dir_okay=False), help="timm class map file"),
        numbers(
            "--max-skipped", type=click.IntRange(0), default=10, help="maximum number of unreadable images to skip"
        ),
        numbers(
            "--seed", type=click.IntRange(0, 2**63 - 1), default=_TRAINING.seed, help="random seed for drawing images"
        ),
    )


def train_split_option(purpose: str) -> Decorator:
    return option(
        "--train-split",
        metavar="NAME",
        default="train",
        show_default=True,
        help=f"split {purpose}, if the data set has it",
    )


def preprocessing_group() -> Decorator:
    return option_group(
        "Preprocessing",
        numbers(
            "--crop-pct",
            type=click.FloatRange(0, min_open=True),
            metavar="X",
            help="share of the image that the centre crop keeps  [model's own]",
        ),
        numbers(
            "--mean", type=click.FLOAT, nargs=3, metavar="R G B", help="mean to subtract per channel  [model's own]"
        ),
        numbers(
            "--std",
            type=click.FloatRange(0, min_open=True),
            nargs=3,
            metavar="R G B",
            help="standard deviation to divide by per channel  [model's own]",
        ),
        option(
            "--interpolation",
            type=click.Choice(_INTERPOLATIONS),
            metavar="MODE",
            help=f"resizing: {', '.join(_INTERPOLATIONS)}  [model's own]",
        ),
    )


def device_option() -> Decorator:
    return option(
        "--device",
        metavar="NAME",
        default="auto",
        show_default=True,
        help="cpu, cuda, cuda:1, ...; auto uses a GPU if there is one",
    )


def amp_options(purpose: str) -> tuple[Decorator, ...]:
    return (
        option("--amp", is_flag=True, help=purpose),
        option(
            "--amp-dtype",
            type=click.Choice(["float16", "bfloat16"]),
            default="float16",
            show_default=True,
            help="data type of mixed precision",
        ),
    )


def device_group(amp: bool = True) -> Decorator:
    """Return the options that say how images go through a model."""
    return option_group(
        "Device and speed",
        device_option(),
        numbers("-b", "--batch-size", type=click.IntRange(1), default=64, help="number of images per batch"),
        numbers("-j", "--workers", type=click.IntRange(0), default=2, help="number of processes that read images"),
        *(amp_options("evaluate in mixed precision; calibration and folding never use it") if amp else ()),
    )


def budget_group() -> Decorator:
    return option_group(
        "Accuracy budget",
        numbers(
            "--max-drop",
            type=click.FLOAT,
            metavar="PTS",
            help="maximum top-1 drop in points; restores LayerNorms as needed, exits 4 if unreachable",
        ),
        numbers(
            "--min-agreement",
            type=click.FloatRange(0, 100),
            metavar="PCT",
            help="minimum top-1 agreement with the original in percent, likewise; needs no labels",
        ),
        numbers(
            "--max-keep",
            type=click.IntRange(0),
            help="maximum number of LayerNorms to restore; 0 only checks the budget  [any]",
        ),
        numbers(
            "--max-evaluations",
            type=click.IntRange(1),
            default=_BUDGET.max_evaluations,
            help="maximum number of conversions to try",
        ),
        option("--save-best", is_flag=True, help="save the best attempt even if it misses the budget"),
    )


def stress_options(samples: int) -> tuple[Decorator, ...]:
    return (
        numbers(
            "--stress-samples",
            type=click.IntRange(1),
            default=samples,
            help="number of evaluation images for --stress, drawn at random",
        ),
        numbers(
            "--max-stress-drop",
            type=click.FLOAT,
            metavar="PTS",
            help="maximum mean top-1 (without labels: agreement) drop on corrupted images in points; exits 4 if larger",
        ),
    )


def atol_option() -> Decorator:
    return numbers(
        "--atol",
        type=click.FLOAT,
        metavar="X",
        help="maximum change of a logit by the fold; exits 4 if it is larger  [off: only a fold that float64 finds "
        "wrong exits 4, and unusual rounding is noted]",
    )


def output_group(*options: Decorator, what: str = "folder to write", required: bool = False, **more: Any) -> Decorator:
    """Return -o, --overwrite and a command's own options of what it writes."""
    return option_group(
        "Output",
        option("-o", "--output", required=required, type=click.Path(path_type=Path), help=what, **more),
        option("--overwrite", is_flag=True, help=f"replace an existing {what.split()[0]}"),
        *options,
    )


def messages_group() -> Decorator:
    return option_group(
        "Messages",
        option("--json", "as_json", is_flag=True, help="print one JSON object on stdout"),
        option("-q", "--quiet", is_flag=True, help="suppress log output"),
        option("-v", "--verbose", count=True, help="-v: every layer, warnings, logs; -vv: also tracebacks"),
    )
