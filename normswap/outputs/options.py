"""How a folder is written. Imports no torch, so that the command line can read it."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SaveOptions:
    """How a folder is written.

    Attributes:
        overwrite: replace a folder that is not empty.
        protect: paths that must not lie inside the folder.
        command: the command line, for the record.
        data_config: the preprocessing, where it is not the model's own.
        page: whether to write report.html; default: if the ``report`` extra is installed. If the page cannot be
            made, there is a warning, and the folder is written without it. A swapped checkpoint has none.
    """

    overwrite: bool = False
    protect: Iterable[Path] = ()
    command: list[str] | None = None
    data_config: dict[str, Any] | None = None
    page: bool | None = None
