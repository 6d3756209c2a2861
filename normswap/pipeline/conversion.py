"""What `convert` gives back."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..outputs.save import save_folder
from ..outputs.swapped_checkpoint import save_swapped
from ..planning.plan import Plan
from ..records.report import ConversionReport


@dataclass
class Conversion:
    """What `convert` gives.

    Attributes:
        model: the fused model, same class as before, without LayerNorm.
        report: every number on the way.
        plan: what was decided for each LayerNorm.
        swapped: the same before the fold, with BatchNorm in, to go on training; see `normswap.save_swapped`.
    """

    model: nn.Module
    report: ConversionReport
    plan: Plan
    _edits: dict[str, Any] = field(repr=False)
    _probe: torch.Tensor = field(repr=False)
    swapped: nn.Module = field(repr=False)
    _original: nn.Module = field(repr=False)  # on the meta device
    _thumbnails: list[str] = field(repr=False, default_factory=list)

    def save(
        self,
        out: str | Path,
        overwrite: bool = False,
        protect: Iterable[Path] = (),
        command: list[str] | None = None,
        data_config: dict[str, Any] | None = None,
        page: bool | None = None,
    ) -> None:
        """Write the output folder, all or nothing; see `outputs.save.save_folder` for the arguments and errors."""
        save_folder(
            out,
            self.model,
            self.report,
            self._edits,
            self._probe,
            overwrite,
            protect,
            command,
            data_config,
            self._thumbnails,
            page,
        )

    def save_swapped(
        self,
        out: str | Path,
        overwrite: bool = False,
        protect: Iterable[Path] = (),
        command: list[str] | None = None,
        data_config: dict[str, Any] | None = None,
    ) -> None:
        """Write ``swapped`` as a folder, all or nothing; see `normswap.save_swapped` for the arguments and errors."""
        swapped, original = self.swapped, self._original
        save_swapped(out, swapped, original, self.plan, self.report, overwrite, protect, command, data_config)
