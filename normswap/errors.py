"""Every error normswap raises on purpose, and the exit code that goes with it.

Each class also is the builtin that Python users would catch, so that ``except ValueError`` keeps working.
"""

import textwrap

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_CHECK_FAILED = 4


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something; the class's name if there is none.

    >>> first_line(RuntimeError("\\n  size mismatch\\n  for head.weight"))
    'size mismatch'
    >>> first_line(KeyError())
    'KeyError'
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def one_line(error: BaseException, width: int = 300) -> str:
    """Return the whole text of an error in one line, shortened between words; the class's name if there is none.

    >>> one_line(RuntimeError("size mismatch\\n  for head.weight"))
    'size mismatch for head.weight'
    """
    return textwrap.shorten(str(error), width, placeholder=" ...") or type(error).__name__


def innermost(error: BaseException) -> BaseException:
    """Return the error at the bottom of a chain of causes: the one that says what happened."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


class NormswapError(Exception):
    """Base of all errors below; its text is one line that says what, where and what to do."""

    exit_code = EXIT_FAILURE


class ArgumentError(NormswapError, ValueError):
    """An invalid argument: a missing path, an unknown name, an output that is in the way."""

    exit_code = EXIT_USAGE


class CheckpointError(NormswapError, RuntimeError):
    """Weights that cannot be read or do not fit the model."""


class DataError(NormswapError, RuntimeError):
    """Images that cannot be found or read, or labels that do not fit the model."""


class CalibrationError(NormswapError, ArithmeticError):
    """Statistics that are not finite or do not exist; names the site."""


class FoldError(NormswapError, ArithmeticError):
    """A fold that cannot be done exactly; nothing was assigned."""


class OutputError(NormswapError, OSError):
    """The output folder cannot be written; what stood there before still stands."""


class BenchmarkError(NormswapError, RuntimeError):
    """A model that an engine cannot run here, so there is nothing to time; says which and why."""


class HubError(NormswapError, OSError):
    """The Hugging Face Hub cannot be reached, or refused what was asked."""


class MissingExtraError(NormswapError, ImportError):
    """A package that only some commands need is not installed; names the extra that brings it."""


class ModelRefusedError(NormswapError, ValueError):
    """A model normswap does not convert; the text says why."""

    exit_code = EXIT_REFUSED


class NoLayerNormError(ModelRefusedError):
    """There is nothing to swap."""


class CheckFailedError(NormswapError, AssertionError):
    """A number normswap promised does not hold; nothing was saved.

    Args:
        text: one line.
        report: the `ConversionReport` or `ExportReport` up to that point, or None.
        conversion: the best `Conversion` there was, if all that is wrong with it is its accuracy; else None. The
            caller may save it all the same.
    """

    exit_code = EXIT_CHECK_FAILED

    def __init__(self, text: str, report: object | None = None, conversion: object | None = None) -> None:
        super().__init__(text)
        self.report = report
        self.conversion = conversion
