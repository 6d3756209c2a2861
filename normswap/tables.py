"""Numbers and rich tables as text."""

import io
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def number(value: float | int | None, digits: int = 2) -> str:
    """Return a number for a table; a dash stands for what was not measured."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, right: Iterable[str] = ()
) -> Table:
    """Return a rich table; the columns named in ``right`` are aligned to the right."""
    result = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        result.add_column(column, justify="right" if column in set(right) else "left", overflow="fold")
    for row in rows:
        result.add_row(*row)
    return result


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str] = ()) -> list[str]:
    """Return the lines of a Markdown table; the columns named in ``right`` are aligned to the right.

    >>> print(*markdown(["model", "top-1 %"], [["vit", "74.40"]], right=["top-1 %"]), sep="\\n")
    | model | top-1 % |
    |---|---:|
    | vit | 74.40 |
    """
    aligned = set(right)
    head = [f"| {' | '.join(columns)} |", f"|{'|'.join('---:' if c in aligned else '---' for c in columns)}|"]
    return head + [f"| {' | '.join(row)} |" for row in rows]


def sentence(text: str) -> str:
    """Return the text with a capital letter at its start."""
    return text[:1].upper() + text[1:]


def render(renderable: Table, width: int = 120) -> str:
    """Return a table as plain text of at most ``width`` columns."""
    console = Console(width=width, file=io.StringIO(), color_system=None, legacy_windows=False)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())
