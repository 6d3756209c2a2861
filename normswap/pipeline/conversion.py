"""What `convert` and `fuse` return."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..finetuning.run_state import TrainingState
from ..outputs.options import SaveOptions
from ..outputs.rebuild import Rebuilt
from ..outputs.save import Finished, save_folder
from ..outputs.swapped_checkpoint import Swapped, save_swapped
from ..planning.plan import Plan
from ..records.report import ConversionReport


@dataclass
class Conversion:
    """What `convert` and `fuse` return.

    Attributes:
        model: the fused model, same class as before, without LayerNorm.
        report: every number on the way.
        plan: what was decided for each LayerNorm.
        swapped: the same before the fold, with BatchNorm in, for more training; see `save_swapped`.
    """

    model: nn.Module
    report: ConversionReport
    plan: Plan
    swapped: nn.Module = field(repr=False)
    _edits: dict[str, Any] = field(repr=False)
    _probe: torch.Tensor = field(repr=False)
    _original: nn.Module = field(repr=False)  # on the meta device
    _rebuilt: Rebuilt = field(repr=False)
    _thumbnails: list[str] = field(repr=False, default_factory=list)
    _state: TrainingState | None = field(repr=False, default=None)  # of the run, until its result is saved

    def save(self, out: str | Path, options: SaveOptions | None = None) -> None:
        """Write the output folder, all or nothing; see `normswap.outputs.save.save_folder` for files and errors."""
        base, problem = self._rebuilt.base, self._rebuilt.problem
        finished = Finished(self.model, self.report, self._edits, self._probe, self._thumbnails, base, problem)
        save_folder(out, finished, options)
        self._run_is_over()

    def save_swapped(self, out: str | Path, options: SaveOptions | None = None) -> None:
        """Write ``swapped`` as a folder, all or nothing; see `normswap.save_swapped` for files and errors."""
        save_swapped(out, Swapped(self.swapped, self._original, self.plan, self.report), options)
        self._run_is_over()

    def _run_is_over(self) -> None:
        if self._state is not None:
            self._state.remove()
            self._state = None
