"""The library names its parameters, as `max_drop`; a command names its flags, as --max-drop."""

import re

import click

# Parameters whose option has another name.
_OPTIONS = {
    "images": "data_dir",
    "labels=False": "no_labels",
    "state": "finetune_state",
    "epochs": "finetune_epochs",
    "batch_size": "train_batch_size",
    "accumulate": "grad_accum_steps",
    "kl": "kl_weight",
    "features": "feature_weight",
    "labels": "label_weight",
    "stem": "train_stem",
    "ema": "model_ema_decay",
    "page": "report",
}


def in_flags(text: str, command: click.Command) -> str:
    """Return an error's text with each parameter in backquotes replaced by the flag that sets it.

    A parameter for which the command has no option loses its backquotes.
    """
    flags = {option.name: max(option.opts, key=len) for option in command.params if isinstance(option, click.Option)}

    def flag(found: re.Match[str]) -> str:
        name = found.group(1)
        return flags.get(_OPTIONS.get(name, name)) or flags.get(name) or name

    return re.sub(r"`([a-z_0-9]+(?:=\w+)?)`", flag, text)
