"""Weights in several files with an index, as Hugging Face writes large models: safetensors or .bin."""

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import CheckpointError, first_line

INDEX = ".index.json"
# safetensors first, as everywhere: they need no pickle.
_NAMES = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def find_index(folder: Path) -> Path | None:
    """Return the index of the shards in a folder; None if it has none, or whole weights beside it."""
    name = index_of([path.name for path in folder.iterdir()])
    return None if name is None else folder / name


def index_of(files: Collection[str]) -> str | None:
    """Return which of the files of a folder is the index of its shards; None if it has none, or whole weights.

    >>> index_of(["config.json", "model.safetensors.index.json", "model-00001-of-00001.safetensors"])
    'model.safetensors.index.json'
    """
    if any(name in files for name in _NAMES):
        return None
    return next((f"{name}{INDEX}" for name in _NAMES if f"{name}{INDEX}" in files), None)


def read_shards(index: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that an index file names, from the files beside it. Runs no pickled code.

    Raises:
        CheckpointError: the index or a file cannot be read, or does not hold what the index says.
    """
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(where.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: is no index of shards ({type(error).__name__}: {first_line(error)})"
        ) from error
    state: dict[str, torch.Tensor] = {}
    for name in files:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: names {name}, which does not lie beside it")
        found = _read(index.parent / name)
        state.update((key, found[key]) for key in where if where[key] == name and key in found)
    missing = [key for key in where if key not in state]
    if missing:
        raise CheckpointError(f"{index}: {len(missing)} tensors are not in their files, as {missing[0]}")
    return state


def _read(shard: Path) -> dict[str, torch.Tensor]:
    if not shard.is_file():
        raise CheckpointError(f"{shard}: named in the index of the shards, but not there")
    try:
        if shard.suffix == ".safetensors":
            return load_file(shard)
        found = torch.load(shard, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{shard}: cannot be read ({first_line(error)}): truncated download?") from error
    except Exception as error:  # torch raises a dozen kinds for a broken file
        raise CheckpointError(f"{shard}: cannot be read as weights ({type(error).__name__})") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{shard}: holds no state dict of tensors")
    return found
