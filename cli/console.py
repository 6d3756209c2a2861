"""What goes to stdout and what to stderr, and the one place where an error becomes a line and an exit code."""

import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from .processes import is_first

GROUP_EPILOG = """Data goes to stdout, progress and talk to stderr. Exit codes: 0 done, 1 failure, 2 usage, 3 model
refused, 4 a check failed (the fold is not exact, or the accuracy drop is over budget)."""


class NormswapCommand(click.Command):
    """A command whose errors are one line; a traceback only with -vv. Of several processes the first does it alone."""

    joined = False

    def invoke(self, ctx: click.Context) -> Any:
        if not self.joined and not is_first():
            return None
        verbose = ctx.params.get("verbose", 0)
        if verbose and is_first():
            logging.basicConfig(level=logging.INFO if verbose == 1 else logging.DEBUG, stream=sys.stderr)
        else:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, KeyboardInterrupt):
            raise
        except Exception as error:
            if not is_first():  # the first process fails alike, and says so
                raise click.exceptions.Exit(getattr(error, "exit_code", 1)) from error
            if verbose > 1:
                traceback.print_exc()
            raise _Failure(_line(error), getattr(error, "exit_code", 1)) from error
        finally:
            logging.disable(logging.NOTSET)


class JoinedCommand(NormswapCommand):
    """A command that several processes do together, as torchrun starts them."""

    joined = True


class _Failure(click.ClickException):
    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance


def _line(error: Exception) -> str:
    from normswap.errors import NormswapError

    if isinstance(error, NormswapError):
        return " ".join(str(error).split())
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} (unexpected; run again with -vv for the traceback)"


class Console:
    """One command's output; of several processes only the first has any.

    Args:
        as_json: stdout gets one JSON object and nothing else.
        quiet: no talk.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False) -> None:
        from rich.console import Console as RichConsole

        self.as_json = as_json
        self.silent = not is_first()
        self.quiet = quiet or self.silent
        self.talk = RichConsole(stderr=True, quiet=self.quiet, highlight=False, soft_wrap=True)
        self.data = RichConsole(quiet=(quiet and as_json) or self.silent, highlight=False)
        if not self.data.is_terminal:
            self.data.width = 140

    def say(self, label: str, text: str) -> None:
        """Print one line of talk."""
        self.talk.print(f"{label:<10} {text}", markup=False)

    def result(self, record: dict[str, Any], *tables: Any) -> None:
        """Print the result: JSON, or tables for people."""
        if self.as_json and not self.silent:
            click.echo(json.dumps(record))
        target = self.talk if self.as_json else self.data
        for table in tables:
            target.print(table, soft_wrap=False)

    @contextmanager
    def progress(self) -> Iterator[Any]:
        """Yield a callback (what, done, total) that draws a bar on a terminal and nothing elsewhere.

        What stands behind a colon, as in "calibrate: blocks.0.norm1", is shown beside the bar of what stands before it.
        """
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[where]}", markup=False),
        )
        disable = self.quiet or not self.talk.is_terminal
        with Progress(*columns, console=self.talk, transient=True, disable=disable) as bars:
            tasks: dict[str, Any] = {}

            def update(what: str, done: int, total: int) -> None:
                what, _, where = what.partition(": ")
                if what not in tasks:
                    tasks[what] = bars.add_task(what, total=total, where=where)
                bars.update(tasks[what], completed=done, total=total, where=where)

            yield update
