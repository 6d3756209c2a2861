"""The options of fine-tuning, which convert and finetune share."""

from pathlib import Path

import click
from cloup import option, option_group

from normswap.calibration.options import SHARE
from normswap.finetuning.options import BN_MODES, FADE_ORDERS, FinetuneOptions

from . import options as o

_TRAINING = FinetuneOptions()


def finetune_group(
    *more: o.Decorator, prefix: str = "finetune-", epochs: int = 0, samples: str = "as many as for calibration"
) -> o.Decorator:
    """Return the options of fine-tuning; ``prefix`` goes before the names that mean something else in convert."""
    return option_group(
        "Fine-tuning",
        o.numbers(
            f"--{prefix}epochs",
            "finetune_epochs",
            type=click.IntRange(0 if prefix else 1),
            default=epochs,
            help="number of epochs of distillation from the original model" + ("; 0: none" if prefix else ""),
        ),
        o.numbers(
            f"--{prefix}samples",
            "finetune_samples",
            type=click.IntRange(2),
            help=f"number of images to train on, with those held out  [{samples}]",
        ),
        *_optimiser_options(),
        *_loss_options(),
        *_training_options(),
        o.numbers(
            f"--{prefix}views",
            "finetune_views",
            type=click.FloatRange(0, 1),
            metavar="X",
            help=f"augmentation: share of the images that carry a random corruption  [{SHARE:g}]",
        ),
        option("--train-amp", is_flag=True, help="train in bfloat16 mixed precision"),
        option(
            f"--{prefix}state",
            "finetune_state",
            type=click.Path(path_type=Path, dir_okay=False),
            help="file that keeps the state of the training run",
        ),
        option("--resume", is_flag=True, help=f"resume the run from --{prefix}state, which must exist"),
        option("--auto-resume", is_flag=True, help=f"resume if --{prefix}state exists, otherwise begin"),
        *more,
    )


def _optimiser_options() -> tuple[o.Decorator, ...]:
    positive = click.FloatRange(0, min_open=True)
    return (
        o.numbers("--lr", type=positive, default=_TRAINING.lr, metavar="X", help="peak learning rate"),
        o.numbers(
            "--train-batch-size", type=click.IntRange(1), default=_TRAINING.batch_size, help="batch size in training"
        ),
        o.numbers(
            "--grad-accum-steps",
            type=click.IntRange(1),
            default=_TRAINING.accumulate,
            help="gradient accumulation: batches per optimiser step",
        ),
        option("--opt", metavar="NAME", default=_TRAINING.opt, show_default=True, help="timm optimiser"),
        o.numbers(
            "--weight-decay",
            type=click.FloatRange(0),
            default=_TRAINING.weight_decay,
            metavar="X",
            help="weight decay of the optimiser",
        ),
        o.numbers(
            "--warmup",
            type=click.FloatRange(0, 1, max_open=True),
            default=_TRAINING.warmup,
            metavar="X",
            help="learning rate warm-up: share of the steps",
        ),
        o.numbers(
            "--clip-grad",
            type=positive,
            default=_TRAINING.clip_grad,
            metavar="X",
            help="gradient clipping: maximum norm",
        ),
    )


def _loss_options() -> tuple[o.Decorator, ...]:
    weights = (
        ("--kl-weight", _TRAINING.kl, "loss weight of the KL of the outputs"),
        ("--feature-weight", _TRAINING.features, "loss weight of the error in the residual stream"),
        ("--label-weight", _TRAINING.labels, "loss weight of the labels"),
    )
    return tuple(
        o.numbers(flag, type=click.FloatRange(0), default=default, metavar="X", help=text)
        for flag, default, text in weights
    )


def _training_options() -> tuple[o.Decorator, ...]:
    return (
        option(
            "--bn-mode",
            type=click.Choice(BN_MODES),
            default=_TRAINING.bn_mode,
            show_default=True,
            help="BatchNorm statistics in training: calibrated ones, or those of each batch",
        ),
        option("--train-stem", is_flag=True, help="train the stem too; training becomes less stable"),
        o.numbers(
            "--hflip",
            type=click.FloatRange(0, 1),
            default=_TRAINING.hflip,
            metavar="P",
            help="augmentation: probability of a horizontal flip",
        ),
        o.numbers(
            "--scale",
            type=click.FloatRange(0, 1, min_open=True),
            default=_TRAINING.scale,
            metavar="X",
            help="augmentation: minimum share of the area that a random crop keeps",
        ),
        o.numbers(
            "--fade",
            type=click.FloatRange(0, 1, max_open=True),
            default=_TRAINING.fade,
            metavar="X",
            help="share of the run over which each LayerNorm is blended into its BatchNorm",
        ),
        option(
            "--fade-order",
            type=click.Choice(FADE_ORDERS),
            default=_TRAINING.fade_order,
            show_default=True,
            help="order in which the LayerNorms are blended",
        ),
        o.numbers(
            "--model-ema-decay",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            metavar="X",
            help="decay of an exponential moving average of the weights  [off]",
        ),
    )
