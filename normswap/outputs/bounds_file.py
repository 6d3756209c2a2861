"""The bounds of a converted model in a file of their own, so that its weights load without them too."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import CheckpointError
from ..inputs.checkpoint import check_keys
from ..layers import TokenBound

BOUNDS = "bounds.safetensors"
_ENDS = ("lower", "upper")


def bounds_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return every bound of a folded model: ``PATH.lower`` and ``PATH.upper``, `[C]` or `[C, 1, 1]`.

    >>> bounds_of(nn.Sequential(TokenBound()))
    {}
    """
    found = {path: module for path, module in model.named_modules() if isinstance(module, TokenBound)}
    ends = {f"{path}.{end}": getattr(module, end) for path, module in found.items() for end in _ENDS}
    return {name: end.detach().cpu().contiguous() for name, end in ends.items() if end is not None}


def write_bounds(path: Path, model: nn.Module, edits: dict[str, Any]) -> bool:
    """Write the bounds of a model, if it has any, and return whether it has.

    Places without a bound get an infinite one, so that a file that does not belong to a model can be told.
    """
    if not edits["bound"]:
        return False
    try:
        save_file(_open_ends(edits) | bounds_of(model), path, metadata={"format": "pt"})
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise OSError(f"bounds: {error}") from error
    return True


def read_bounds(folder: Path, model: nn.Module, edits: dict[str, Any]) -> None:
    """Give a model with the edits of an output folder, in place, the bounds that lie there.

    Raises:
        CheckpointError: the file cannot be read, or has bounds for other modules or of other shapes.
    """
    shapes = edits.get("bound", {})
    if not shapes:
        return
    try:
        bounds = load_file(folder / BOUNDS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / BOUNDS}: cannot be read ({error}): truncated?") from error
    wanted = {f"{path}.{end}": torch.empty(shape) for path, shape in shapes.items() for end in _ENDS}
    check_keys(str(folder / BOUNDS), _open_ends(edits) | wanted, bounds)
    like = next(model.parameters())
    for name in wanted:
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, bounds[name].to(like))


def _open_ends(edits: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{end}": torch.tensor(size * torch.inf)
        for path in [*edits["identity"], *edits["affine"]]
        for end, size in zip(_ENDS, (-1, 1), strict=True)
    }
