"""The command to type next, with the options that the one at hand was given."""

import shlex
from collections.abc import Mapping
from typing import Any

import click

from .options import ModelKwarg

# What belongs to one run and not to the next: where it wrote, and how much it said.
_NOT_CARRIED = {"output", "overwrite", "dry_run", "as_json", "quiet", "verbose"}


def line(command: str, options: Mapping[str, Any], *arguments: Any, **changes: Any) -> str:
    """Return a command line, quoted for a shell.

    Args:
        command: the next command.
        options: those of the command at hand. What the next one has too is carried over, unless it is the next one's
            default anyway.
        arguments: what the next command takes without a flag.
        changes: options that the next command gets instead, placeholders among them.
    """
    from .main import cli

    values = {name: value for name, value in options.items() if name not in _NOT_CARRIED} | changes
    words = ["normswap", command, *map(str, arguments)]
    target = cli.commands[command]
    context = click.Context(target)
    for param in target.params:
        if isinstance(param, click.Option) and values.get(param.name or "") is not None:
            words += _words(param, values[param.name or ""], param.get_default(context))
    return shlex.join(words)


def with_images(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a placeholder for the images if none were given."""
    return {} if options.get("data_dir") or options.get("dataset") else {"data_dir": "IMAGES"}


def as_original(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what -m named, as the original of a command that has another -m."""
    own = {"pretrained": None, "checkpoint": None, "use_ema": None}
    return {"against": options["model"], **{f"against_{name}": options[name] for name in own}, **own}


def _words(option: click.Option, value: Any, default: Any) -> list[str]:
    """Return an option as it is typed, nothing if its default says the same."""
    flag = option.opts[0]
    if option.is_flag:
        if value == default or not (value or option.secondary_opts):
            return []
        return [flag if value else option.secondary_opts[0]]
    if option.multiple:
        return [word for each in value for word in (flag, _word(option, each))]
    if value == default or value == "":
        return []
    return [flag, *(map(str, value) if option.nargs > 1 else [_word(option, value)])]


def _word(option: click.Option, value: Any) -> str:
    return f"{value[0]}={value[1]!r}" if isinstance(option.type, ModelKwarg) else str(value)
