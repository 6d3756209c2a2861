"""The state of a training run in one file, which is whole at every moment, whatever kills the process."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from ..atomic import beside, sweep
from ..errors import CheckpointError, OutputError

_FORMAT = 1


class TrainingState:
    """One file for one run.

    Args:
        path: the file.
        fingerprint: plain values that tell this run from others.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.path, self.fingerprint = path, fingerprint
        self._beside = beside(path)

    def save(self, state: dict[str, Any]) -> None:
        """Write beside, sync, rename.

        Raises:
            OutputError: it cannot be written; what was there still is.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            sweep(self.path)  # of a process killed while it wrote
            with open(self._beside, "wb") as file:
                torch.save({"format": _FORMAT, "fingerprint": self.fingerprint, "state": state}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(self._beside, self.path)
        except (OSError, RuntimeError) as error:  # torch's own writer raises the second
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            kept = "; what stood there still stands" if self.path.exists() else ""
            raise OutputError(f"{self.path}: the state of the run cannot be written: {reason}{kept}") from error
        finally:
            self._beside.unlink(missing_ok=True)

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
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{self.path}: no state of a run, or truncated: {text}") from error
        differs = [key for key in self.fingerprint if fingerprint.get(key) != self.fingerprint[key]]
        if differs:
            raise CheckpointError(f"{self.path}: the state of another run ({', '.join(differs)} differ): start afresh")
        return state

    def remove(self) -> None:
        """Delete the file and what a killed process left of one; the run is over."""
        self.path.unlink(missing_ok=True)
        sweep(self.path)
