"""A model from anywhere: timm's names, weights files, and folders that normswap wrote."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..inputs.checkpoint import load_model
from ..outputs.save import build, is_output_folder, load
from ..outputs.swapped_checkpoint import is_swapped


def open_model(model: str, **kwargs: Any) -> nn.Module:
    """Return a model from anywhere: what `normswap.inputs.checkpoint.load_model` takes, or a folder normswap wrote.

    Raises:
        ArgumentError, CheckpointError, ModelRefusedError: see `load_model` and `load`.
    """
    folder = Path(model.removeprefix("local-dir:"))
    if is_swapped(model):
        raise ArgumentError(f"{model} is a swapped checkpoint, BatchNorm still in: fold it first, with normswap fuse")
    if is_converted(model):
        ignored = [name for name, value in kwargs.items() if value not in (None, False) and name != "weights"]
        if ignored:
            raise ArgumentError(f"{model} is converted already; it takes no `{ignored[0]}`")
        if kwargs.get("weights", True):
            return load(folder)
        with torch.device("meta"):
            return build(folder)
    return load_model(model, **kwargs)


def is_converted(model: str) -> bool:
    """Return whether ``model`` names a folder that normswap wrote."""
    return model.startswith("local-dir:") and is_output_folder(Path(model.removeprefix("local-dir:")))
