"""Documents that cannot rot: their commands, flags, files and links exist, and their Python runs."""

import re
from pathlib import Path

import click
import pytest

import normswap
from normswap_cli.main import cli

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(text: str, language: str = r"\w*") -> list[str]:
    """Return the code blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[tuple[str, str]]:
    """Return name and arguments of every normswap command in the code blocks, on its own or under torchrun."""
    start = r"^\s*(?:run: )?(?:normswap|torchrun .* -m normswap_cli) "
    return re.findall(rf"{start}(\w+) (.+)$", "\n".join(blocks(text)), re.MULTILINE)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", cli.commands)
def test_every_command_is_in_the_readme_and_has_help(name):
    assert f"normswap {name}" in README.replace("\n", " ")
    assert len(cli.commands[name].help or "") > 40
    # click's arguments have no help of their own; the command's own text says what they are.
    assert all(p.help for p in cli.commands[name].params if isinstance(p, click.Option))


@by_name
def test_the_commands_in_a_page_have_the_flags_they_use(page):
    for name, arguments in commands(page.read_text()):
        known = {flag for p in cli.commands[name].params for flag in (*p.opts, *p.secondary_opts)}
        assert set(re.findall(r"(?<!\S)--?[a-z][a-z0-9-]*", arguments)) <= known, f"normswap {name} {arguments}"


def test_the_pages_show_every_command_but_the_demo_with_its_arguments():
    shown = {name for page in PAGES for name, _ in commands(page.read_text())}
    assert shown == set(cli.commands) - {"demo"}


@by_name
def test_the_flags_a_page_names_exist(page):
    known = {flag for command in cli.commands.values() for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    named = set(re.findall(r"`(--[a-z][a-z0-9-]*[a-z0-9])\b", page.read_text()))
    scripts = "\n".join(path.read_text() for path in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*/*.py")])
    assert {flag for flag in named - known - {"--help"} if f'"{flag}"' not in scripts} == set()


@by_name
def test_the_links_and_files_of_a_page_exist(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        linked = (page.parent / target) if target else page
        assert linked.is_file(), target
        assert not anchor or anchor in anchors(linked.read_text()), f"{target}#{anchor}"
    for path in re.findall(r"(?<![\w./-])((?:\w+/)+\w+\.py)\b", text):
        assert (ROOT / path).is_file() or (ROOT / "normswap" / path).is_file(), path


def test_every_page_is_linked_from_the_readme():
    assert {f"docs/{page.name}" for page in PAGES[2:]} <= set(re.findall(r"\]\(([^)]*)\)", README))


def test_the_python_of_the_pages_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for page in PAGES:  # README first: it leaves the folder "out" that other pages load
        names: dict = {}
        for block in blocks(page.read_text(), "python"):
            exec(compile(block, page.name, "exec"), names)
        if page.name in ("README.md", "python.md"):
            assert "fused" in capsys.readouterr().out


def test_the_two_commands_stand_there():
    assert "\npip install . && normswap demo\n" in README
    assert '\npip install -e ".[test]" && pytest\n' in README
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_stays_short():
    assert README.count("\n") < 200


def test_the_version_stands_in_one_place():
    found = [p for p in ROOT.rglob("*.py") if f'"{normswap.__version__}"' in p.read_text() and "build" not in p.parts]
    assert found == [ROOT / "normswap" / "__init__.py"]
    assert normswap.__version__ not in (ROOT / "pyproject.toml").read_text()
