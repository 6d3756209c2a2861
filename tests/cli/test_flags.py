"""Errors of the library name parameters; on the command line they name the flags that set them."""

import click
import pytest

from normswap_cli.flags import in_flags
from normswap_cli.main import cli


@pytest.mark.parametrize(
    ("command", "text", "shown"),
    [
        ("convert", "more than `atol` 0.001", "more than --atol 0.001"),
        ("convert", "give `class_map`, or `labels=False`", "give --class-map, or --no-labels"),
        ("convert", "`epochs` must be above 0", "--finetune-epochs must be above 0"),
        ("finetune", "`epochs` must be above 0", "--epochs must be above 0"),
        ("finetune", "`resume` needs `state`, the file", "--resume needs --state, the file"),
        ("export", "are checked on real images: give `images`", "are checked on real images: give --data-dir"),
        ("inspect", "`opset` 99 and `normswap fuse`", "opset 99 and `normswap fuse`"),
    ],
)
def test_parameters_become_flags(command, text, shown):
    assert in_flags(text, cli.commands[command]) == shown


def test_every_flag_that_is_named_exists():
    known = {flag for command in cli.commands.values() for p in command.params for flag in p.opts}
    for command in cli.commands.values():
        for option in command.params:
            if isinstance(option, click.Option):
                assert in_flags(f"`{option.name}`", command).split()[0] in known, option.name
