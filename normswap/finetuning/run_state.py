"""The state of a training run in one file, which is whole at every moment, whatever kills the process."""

import pickle
from pathlib import Path
from typing import Any

import torch

from ..atomic import new_file, sweep
from ..errors import CheckpointError, first_line

_FORMAT = 2


class TrainingState:
    """One file for one run, and for the calibration that it started from.

    Args:
        path: the file.
        stays: leave the file when training is over: what comes after could still be lost. The caller removes it then.

    Attributes:
        fingerprint: plain values that tell this run from others.
        calibration: what led to the start of the run, plain values and tensors: ``fingerprint``, ``weights`` of the
            calibrated model, and whatever else the caller keeps; None where only the training is kept.
    """

    def __init__(self, path: Path, stays: bool = False) -> None:
        self.path, self.stays = path, stays
        self.fingerprint: dict[str, Any] = {}
        self.calibration: dict[str, Any] | None = None

    def save(self, state: dict[str, Any] | None) -> None:
        """Write the state, None before training begins, in the place of the one before.

        Raises:
            ArgumentError, OutputError: see `normswap.atomic.new_file`; what was there still is.
        """
        if state is not None and self.calibration is not None:  # the same weights: once is enough
            state = {key: value for key, value in state.items() if key != "start"}
        found = {"format": _FORMAT, "fingerprint": self.fingerprint, "state": state, "calibration": self.calibration}
        with new_file(self.path, overwrite=True) as file:
            try:
                torch.save(found, file)
            except RuntimeError as error:  # torch's own writer does not raise an OSError
                raise OSError(first_line(error)) from error

    def load(self) -> dict[str, Any] | None:
        """Return the state; None if training had not begun.

        Raises:
            CheckpointError: there is none, it is truncated, or it is of another run.
        """
        found = self._read()
        state, calibration = found["state"], found.get("calibration")
        if state is None:
            return None
        self._compare(found["fingerprint"], self.fingerprint)
        return state if calibration is None else {"start": calibration["weights"], **state}

    def load_calibration(self, fingerprint: dict[str, Any]) -> bool:
        """Take up what the file keeps of the calibration; return whether it keeps any.

        Args:
            fingerprint: plain values that tell this calibration from others.

        Raises:
            CheckpointError: the file is truncated, or of another run.
        """
        found = self._read().get("calibration")
        if found is not None:
            self._compare(found["fingerprint"], fingerprint)
        self.calibration = found
        return found is not None

    def _compare(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        differs = [key for key in wanted if found.get(key) != wanted[key]]
        if differs:
            raise CheckpointError(f"{self.path}: the state of another run ({', '.join(differs)} differ): start afresh")

    def _read(self) -> dict[str, Any]:
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            return {"fingerprint": found["fingerprint"], "state": found["state"], **found}
        except FileNotFoundError:
            raise CheckpointError(f"{self.path}: no such file, so there is no run to resume") from None
        except (OSError, RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{self.path}: no state of a run, or truncated: {first_line(error)}") from error

    def remove(self) -> None:
        """Delete the file and what a killed process left of one; the run is over."""
        self.path.unlink(missing_ok=True)
        sweep(self.path)
