"""Help that a person can read, and usage errors; neither imports torch."""

import subprocess
import sys

import click
import cloup
import pytest

import normswap
from normswap_cli.main import cli

from .test_cli import run

COMMANDS = pytest.mark.parametrize("command", cli.commands)


def _options(command):
    return [param for param in cli.commands[command].params if isinstance(param, click.Option)]


def _in_one_line(text):
    return " ".join(text.split())


@pytest.mark.parametrize("arguments", [[], *([name] for name in cli.commands)])
def test_help(arguments, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run(*arguments, "--help")
    assert (result.exit_code, result.stderr) == (0, "")
    assert run(*arguments, "-h").stdout == result.stdout
    assert result.stdout.startswith(f"Usage: {' '.join(['normswap', *arguments])} ")
    assert result.stdout.isascii()  # no boxes and no colours where there is no terminal


def test_the_list_of_commands_is_cut_nowhere(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = run("--help").stdout
    lines = shown.splitlines()
    assert "..." not in shown.replace("[ARGS]...", "")
    assert max(map(len, lines)) < 80
    for name, command in cli.commands.items():
        first = _in_one_line(command.help.split("\n\n")[0])
        assert first.endswith(".")
        assert f"  {name:<9}  {first}" in lines
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == ["Options:", "Start here:", "Convert:", "Measure:", "Deploy:"]
    assert "Exit codes: 0 done, 1 failure" in _in_one_line(shown)


@COMMANDS
def test_every_option_is_in_a_named_group_and_told_in_full(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = run(command, "--help").stdout
    sections = shown.split("\n\n")
    groups = {section.split(":\n")[0]: _in_one_line(section) for section in sections if ":\n  -" in section}
    assert list(groups)[-2:] == ["Messages", "Help"]
    assert "Other options" not in groups
    assert "Options" not in groups
    for option in _options(command):
        group = option.group
        assert isinstance(group, cloup.OptionGroup), option
        assert option.help, option
        assert f"{option.opts[-1]} " in groups[group.title], option
        # A line may also end behind a hyphen.
        assert "".join(option.help.split()) in groups[group.title].replace(" ", ""), option


@COMMANDS
def test_the_help_of_an_option_stands_alone(command):
    for option in _options(command):
        words = option.help.split()
        assert words[0] not in ("of", "[model's"), option
        assert len(words) > 1, option


def test_the_common_groups_come_first():
    titles = [group.title for group in cli.commands["convert"].option_groups]
    assert titles == [
        "Model", "Images", "Output", "Calibration", "Accuracy budget", "Corrupted images", "Device and speed",
        "Preprocessing", "Fine-tuning", "Messages",
    ]  # fmt: skip


@pytest.mark.parametrize("command", cli.commands)
def test_json_quiet_and_verbose_are_everywhere(command):
    flags = {name for option in cli.commands[command].params for name in option.opts}
    assert {"--json", "-q", "--quiet", "-v", "--verbose"} <= flags


def test_help_and_usage_errors_do_not_import_torch():
    script = """
import sys
import click
from normswap_cli.main import cli
for line in sys.argv[1:]:
    try:
        code = cli.main(line.split(), "normswap", standalone_mode=False) or 0
    except click.UsageError as error:
        code = error.exit_code
    heavy = [name for name in ("torch", "timm") if name in sys.modules]
    print(code, heavy, line, file=sys.stderr)
"""
    lines = {
        "--help": 0,
        "--version": 0,
        "convert --help": 0,
        "convrt": 2,
        "convert": 2,
        "convert -m x --data-dir .": 2,
        "convert --no-such-option": 2,
        "convert -m x --data-dir /no/such/folder -o out": 2,
        "evaluate -m x --batch-size 0": 2,
    }
    done = subprocess.run([sys.executable, "-c", script, *lines], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == [f"{code} [] {line}" for line, code in lines.items()]


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout == f"normswap, version {normswap.__version__}\n"


def test_no_command_shows_the_help():
    result = run()
    assert result.exit_code == 2
    assert result.stderr == run("--help").stdout
    assert not result.stdout


@pytest.mark.parametrize(("typed", "meant"), [("convrt", "convert"), ("inspct", "inspect"), ("evalute", "evaluate")])
def test_mistyped_command(typed, meant):
    result = run(typed)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == f"Error: No such command '{typed}'. Did you mean '{meant}'?"


def test_mistyped_option():
    result = run("convert", "--calib-sample", 3)
    assert result.exit_code == 2
    assert "--calib-samples" in result.stderr.splitlines()[-1]
