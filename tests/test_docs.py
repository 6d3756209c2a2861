"""Documents that cannot rot: README names every command, its Python runs, and the test command is the one CI runs."""

import re
from pathlib import Path

import click
import pytest

import normswap
from normswap_cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_is_in_the_readme_and_has_help(name):
    assert f"normswap {name}" in README
    assert len(cli.commands[name].help or "") > 40
    # click's arguments have no help of their own; the command's own text says what they are.
    assert all(p.help for p in cli.commands[name].params if isinstance(p, click.Option))


def test_the_commands_in_the_readme_have_the_flags_they_use():
    code = "\n".join(re.findall(r"^```\w*\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
    lines = re.findall(r"^\s*(?:run: )?normswap (\w+) (.+)$", code, re.MULTILINE)
    assert {name for name, _ in lines} >= {"convert", "evaluate", "inspect", "push"}
    for name, arguments in lines:
        known = {flag for p in cli.commands[name].params for flag in (*p.opts, *p.secondary_opts)}
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z-]*", arguments)) <= known, f"normswap {name} {arguments}"


def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert "fused" in capsys.readouterr().out


def test_the_two_commands_stand_there():
    assert "\npip install . && normswap demo\n" in README
    assert '\npip install -e ".[test]" && pytest\n' in README
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_version_stands_in_one_place():
    found = [p for p in ROOT.rglob("*.py") if f'"{normswap.__version__}"' in p.read_text() and "build" not in p.parts]
    assert found == [ROOT / "normswap" / "__init__.py"]
    assert normswap.__version__ not in (ROOT / "pyproject.toml").read_text()
