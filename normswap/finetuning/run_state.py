"""The state of a training run in one file, which is whole at every moment, whatever kills the process."""

import pickle
from pathlib import Path
from typing import Any

import torch

from ..atomic import new_file, sweep
from ..errors import CheckpointError, first_line

_FORMAT = 1


class TrainingState:
    """One file for one run.

    Args:
        path: the file.
        fingerprint: plain values that tell this run from others.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.path, self.fingerprint = path, fingerprint

    def save(self, state: dict[str, Any]) -> None:
        """Write the state in the place of the one before.

        Raises:
            ArgumentError, OutputError: see `normswap.atomic.new_file`; what was there still is.
        """
        with new_file(self.path, overwrite=True) as file:
            try:
                torch.save({"format": _FORMAT, "fingerprint": self.fingerprint, "state": state}, file)
            except RuntimeError as error:  # torch's own writer does not raise an OSError
                raise OSError(first_line(error)) from error

    def load(self) -> dict[str, Any]:
        """Return the state.

        Raises:
            CheckpointError: there is none, it is truncated, or it is of another run.
        """
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            fingerprint, state = found["fingerprint"], found["state"]
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: no such file, so there is no run to resume") from None
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self.path}: no state of a run, or truncated: {first_line(error)}") from error
        differs = [key for key in self.fingerprint if fingerprint.get(key) != self.fingerprint[key]]
        if differs:
            raise CheckpointError(f"{self.path}: the state of another run ({', '.join(differs)} differ): start afresh")
        return state

    def remove(self) -> None:
        """Delete the file and what a killed process left of one; the run is over."""
        self.path.unlink(missing_ok=True)
        sweep(self.path)
