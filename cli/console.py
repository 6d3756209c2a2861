"""What goes to stdout and what to stderr, and the one place where an error becomes a line and an exit code."""

import io
import json
import logging
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import click
import cloup

from .flags import in_flags
from .processes import Terminated, is_first, terminable

GROUP_EPILOG = """Data goes to stdout, progress and messages to stderr. Exit codes: 0 done, 1 failure or Ctrl-C, 2
usage, 3 model refused, 4 a check failed (the fold is not exact, or the accuracy drop is over budget), 143 SIGTERM. A
command that is interrupted leaves no partial output."""

Progress = Callable[[str, int, int], None]


class NormswapCommand(cloup.Command):
    """A command whose errors are one line; a traceback only with -vv. Of several processes the first does it alone."""

    joined = False

    def invoke(self, ctx: click.Context) -> Any:
        if not self.joined and not is_first():
            return None
        _take_any_text(sys.stdout, sys.stderr)
        verbose = ctx.params.get("verbose", 0)
        if verbose and is_first():
            logging.basicConfig(level=logging.INFO if verbose == 1 else logging.DEBUG, stream=sys.stderr)
        else:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)
        try:
            with terminable():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, KeyboardInterrupt):
            raise
        except Terminated:
            raise _Failure("terminated by SIGTERM; unfinished output was removed", Terminated.exit_code) from None
        except Exception as error:
            if not is_first():  # the first process fails alike, and says so
                raise click.exceptions.Exit(getattr(error, "exit_code", 1)) from error
            if verbose > 1:
                traceback.print_exc()
            raise _Failure(in_flags(_line(error), self), getattr(error, "exit_code", 1)) from error
        finally:
            logging.disable(logging.NOTSET)

    def get_default_option_group(
        self, ctx: click.Context, is_the_only_visible_option_group: bool = False
    ) -> cloup.OptionGroup:
        """Return the group of what is in no other: --help, which click adds by itself."""
        group = cloup.OptionGroup("Help")
        group.options = self.get_ungrouped_options(ctx)
        return group


class JoinedCommand(NormswapCommand):
    """A command that several processes do together, as torchrun starts them."""

    joined = True


class _Failure(click.ClickException):
    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance


def _take_any_text(*streams: Any) -> None:
    """Let a terminal that has not every letter show a code in its place: no name of a class ends a finished run."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _line(error: Exception) -> str:
    from normswap.errors import NormswapError, one_line

    if isinstance(error, NormswapError):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {one_line(error)} (unexpected; run again with -vv for the traceback)"


class Console:
    """One command's output; of several processes only the first has any.

    Args:
        as_json: stdout gets one JSON object and nothing else.
        quiet: print no messages.
        clock: seconds, for the progress lines of a log.
    """

    def __init__(self, as_json: bool = False, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.console import Console as RichConsole

        self.as_json = as_json
        self.silent = not is_first()
        self.quiet = quiet or self.silent
        self.clock = clock
        self.talk = RichConsole(stderr=True, quiet=self.quiet, highlight=False, soft_wrap=True)
        self.data = RichConsole(quiet=(quiet and as_json) or self.silent, highlight=False)
        if not self.data.is_terminal:
            self.data.width = 140

    def say(self, label: str, text: str) -> None:
        """Print one message."""
        self.talk.print(f"{label:<10} {text}", markup=False)

    def result(self, record: dict[str, Any], *tables: Any) -> None:
        """Print the result: JSON, or tables for people."""
        if self.as_json and not self.silent:
            click.echo(json.dumps(record))
        target = self.talk if self.as_json else self.data
        for table in tables:
            target.print(table, soft_wrap=False)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Yield a callback (what, done, total): bars on a terminal, lines in a log, nothing with -q.

        What stands behind a colon, as in "calibrate: blocks.0.norm1", is the detail of the stage that stands before it.
        """
        if self.talk.is_interactive and not self.quiet:
            with self._bars() as update:
                yield update
        else:
            yield ProgressLines(self.say, self.clock)

    @contextmanager
    def _bars(self) -> Iterator[Progress]:
        from rich import progress as rich

        columns = (
            rich.TextColumn("{task.description:<12}"),
            rich.BarColumn(),
            rich.MofNCompleteColumn(),
            rich.TimeRemainingColumn(elapsed_when_finished=True),
            rich.TextColumn("{task.fields[where]}", markup=False),
        )
        with rich.Progress(*columns, console=self.talk, transient=True) as bars:
            tasks: dict[str, Any] = {}

            def update(what: str, done: int, total: int) -> None:
                stage, _, where = what.partition(": ")
                if stage not in tasks:
                    tasks[stage] = bars.add_task(stage, total=total, where=where)
                bars.update(tasks[stage], completed=done, total=total, where=where)

            yield update


class ProgressLines:
    """Progress for a log: a line when a stage begins, then at most one in `EVERY` seconds.

    Args:
        say: prints one message, given a label and a text.
        clock: seconds.
    """

    EVERY = 30.0

    def __init__(self, say: Callable[[str, str], None], clock: Callable[[], float]) -> None:
        self._say = say
        self._clock = clock
        self._stages: dict[str, _Stage] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        name, _, where = what.partition(": ")
        now = self._clock()
        stage = self._stages.get(name)
        is_new = stage is None
        if stage is None:
            stage = self._stages[name] = _Stage(now, done, now, done)
        elif done < stage.done:  # it runs again, for another model
            stage.began, stage.first = now, done
        stage.done = done
        if is_new or now - stage.printed >= self.EVERY:
            stage.printed = now
            self._say("progress", stage.line(name, total, now) + (f", {where}" if where and not is_new else ""))


@dataclass
class _Stage:
    """A stage of the work: when it began and with how much done, when its last line came, how much is done now."""

    began: float
    first: int
    printed: float
    done: int

    def line(self, name: str, total: int, now: float) -> str:
        if self.done <= self.first or total < self.done:
            return f"{name}: {self.done} of {total}"
        left = timedelta(seconds=round((now - self.began) / (self.done - self.first) * (total - self.done)))
        return f"{name}: {self.done} of {total} ({100 * self.done / total:.0f} %), {left} left"
