"""Model in: a timm vision transformer from a name, hf-hub:ID, local-dir:PATH or a weights file.

Everything is loaded by timm; what is added is one clear line where timm would give a traceback, an assertion, or a
randomly initialised head.
"""

import argparse
import difflib
import textwrap
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import list_repo_files, snapshot_download
from safetensors import SafetensorError
from timm.models import load_state_dict, parse_model_name, resolve_model_input_args
from torch import nn

from ..ambient import known_context
from ..errors import ArgumentError, CheckpointError, ModelRefusedError, first_line
from .shards import INDEX, find_index, index_of, read_shards


@known_context()
def load_model(
    model: str,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    use_ema: bool = False,
    num_classes: int | None = None,
    img_size: int | None = None,
    in_chans: int | None = None,
    weights: bool = True,
    random_weights: bool = False,
    **model_kwargs: Any,
) -> nn.Module:
    """Return a timm model with its pretrained weights, in eval mode on the CPU.

    Args:
        model: whatever `timm.create_model` takes: a name, ``hf-hub:ID`` or ``local-dir:PATH``.
        pretrained: use timm's weights for a plain name; implied by the two prefixes.
        checkpoint: weights file (.safetensors, .pth, .pt, .bin), or the index of several (.index.json) or the folder
            they are in, instead of ``pretrained``.
        use_ema: take the EMA weights of a training checkpoint.
        num_classes: of the classifier; 0 for a headless model; default: the checkpoint's.
        img_size: height and width in pixels; default: the checkpoint's.
        in_chans: image channels; default: the checkpoint's.
        weights: False for the architecture alone, on the meta device (for `make_plan`).
        random_weights: those that timm starts training from, where no others are asked for (for timing).
        model_kwargs: passed on to `timm.create_model`.

    Raises:
        ArgumentError: unknown model, missing path, or no weights asked for.
        CheckpointError: weights that cannot be read or do not fit.
        ModelRefusedError: the architecture cannot be built with these arguments.

    >>> from normswap.demo import MODEL
    >>> type(load_model(MODEL)).__name__
    'VisionTransformer'
    >>> load_model("vit_tiny_patch16_224")
    Traceback (most recent call last):
        ...
    normswap.errors.ArgumentError: vit_tiny_patch16_224: which weights? ...
    """
    if use_ema and checkpoint is None:
        raise ArgumentError("`use_ema` goes with `checkpoint`")
    kwargs = _resolve(model, num_classes, img_size, in_chans, model_kwargs)
    source, _ = parse_model_name(model)
    config = kwargs["pretrained_cfg"]
    if not weights:
        with torch.device("meta"):
            return _create(model, kwargs, pretrained=False).eval()
    if checkpoint is not None:
        if pretrained:
            raise ArgumentError("`pretrained` and `checkpoint` exclude each other")
        return _load_checkpoint(_create(model, kwargs, pretrained=False), Path(checkpoint), use_ema).eval()
    if source is None and not pretrained and random_weights:
        return _create(model, kwargs, pretrained=False).eval()
    if source is None and not pretrained:
        raise ArgumentError(f"{model}: which weights? `pretrained` takes timm's, `checkpoint` a file of yours")
    trained = config.get("num_classes")
    if num_classes and trained and num_classes != trained:
        raise ArgumentError(
            f"{model} was trained for {trained} classes; `num_classes` {num_classes} would give it a random head"
        )
    loaded: Any = _create_pretrained(model, kwargs).eval()
    if source is None and loaded.pretrained_cfg.get("hf_hub_id"):
        loaded.pretrained_cfg["source"] = "hf-hub"  # as timm notes for hf-hub: names; the model card cites it
    return loaded


def _resolve(
    model: str, num_classes: int | None, img_size: int | None, in_chans: int | None, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments for `timm.create_model`, the saved ones of a folder or a hub model among them."""
    source, name = _parse(model)
    if source == "local-dir" and not (Path(name) / "config.json").is_file():
        what = "no config.json in it" if Path(name).is_dir() else "no such folder"
        raise ArgumentError(f"{model}: {what}; local-dir: takes a folder with config.json and model.safetensors")
    try:
        kwargs = resolve_model_input_args(model, {"img_size": img_size, "in_chans": in_chans}, **model_kwargs)
    except (KeyError, ValueError, TypeError) as error:  # a config.json that is no timm config
        raise CheckpointError(
            f"{model}: cannot read its config: {type(error).__name__}: {first_line(error)}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{model}: cannot be reached: {first_line(error)}") from error
    except RuntimeError as error:
        if source is not None:
            raise CheckpointError(f"{model}: its config.json names no model of timm's: {first_line(error)}") from error
        raise ArgumentError(_unknown(name, error)) from error
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    return kwargs


def _create_pretrained(model: str, kwargs: dict[str, Any]) -> nn.Module:
    """Return what timm creates; also from shards, which it does not read: it takes single files, or the tensors."""
    source, name = _parse(model)
    index = find_index(Path(name)) if source == "local-dir" else None
    if index is None:
        try:
            return _create(model, kwargs, pretrained=True)
        except CheckpointError:
            index = _hub_index(name) if source == "hf-hub" else None
            if index is None:
                raise
    config = kwargs["pretrained_cfg"]
    given = {**config, "source": "", "file": None, "state_dict": read_shards(index)}
    created: Any = _create(model, {**kwargs, "pretrained_cfg": given}, pretrained=True)
    created.pretrained_cfg = {**created.pretrained_cfg, "source": config.get("source", ""), "file": config.get("file")}
    del created.pretrained_cfg["state_dict"]
    return created


def _hub_index(name: str) -> Path | None:
    """Return the index of a hub model's shards, downloaded with them; None where there is none."""
    repo, _, revision = name.partition("@")
    try:
        files = list_repo_files(repo, revision=revision or None)
        index = index_of(files)
        if index is None:
            return None
        folder = snapshot_download(
            repo, revision=revision or None, allow_patterns=[index, f"{index.partition('.')[0]}-*-of-*"]
        )
    except Exception:  # of the hub's client, which has many kinds: what timm said before is what is wrong
        return None
    return Path(folder) / index


def _parse(model: str) -> tuple[str | None, str]:
    try:
        return parse_model_name(model)
    except ValueError as error:
        if Path(model).is_dir():
            raise ArgumentError(f"{model} is a folder: write local-dir:{model}") from error
        raise ArgumentError(first_line(error)) from error


def _unknown(name: str, error: Exception) -> str:
    close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 3)
    hint = f"; did you mean {', '.join(close)}?" if close else "; timm.list_models() knows the names"
    return f"{first_line(error)}{hint}"


def _create(model: str, kwargs: dict[str, Any], pretrained: bool) -> nn.Module:
    try:
        return timm.create_model(**kwargs, pretrained=pretrained)
    except (SafetensorError, EOFError) as error:
        raise CheckpointError(
            f"{model}: its weights cannot be read ({first_line(error)}): truncated download?"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{model}: its weights cannot be reached: {first_line(error)}") from error
    except RuntimeError as error:
        raise CheckpointError(f"{model}: {_explain(error)}") from error
    except (TypeError, ValueError, AssertionError, KeyError) as error:
        raise ModelRefusedError(f"{model}: timm cannot build it with these arguments: {first_line(error)}") from error


def _load_checkpoint(model: nn.Module, path: Path, use_ema: bool) -> nn.Module:
    state = read_state_dict(path, use_ema)
    expected = model.state_dict()
    # The one mismatch a user can mend by a flag gets its own words.
    classes = [
        f"{name} has {state[name].shape[0]} rows in {path.name} and {tensor.shape[0]} in the model: pass "
        f"`num_classes` {state[name].shape[0]}"
        for name, tensor in expected.items()
        if name.startswith("head") and name.endswith("weight") and name in state and state[name].shape != tensor.shape
    ]
    if classes:
        raise CheckpointError(f"{path}: wrong number of classes: {classes[0]}")
    check_keys(str(path), expected, state)
    model.load_state_dict(state, strict=True)
    return model


def read_state_dict(path: Path, use_ema: bool = False) -> dict[str, torch.Tensor]:
    """Return the tensors of a weights file, unwrapped from ``state_dict`` or ``model`` nests. Runs no pickled code.

    Raises:
        ArgumentError: there is no such file.
        CheckpointError: it cannot be read, or would need to run code.
    """
    index = find_index(path) if path.is_dir() else path if path.name.endswith(INDEX) else None
    if not path.is_file() and index is None:
        raise ArgumentError(f"{path}: no such weights file")
    if index is not None and use_ema:
        raise CheckpointError(f"{path}: `use_ema`, but shards hold no EMA weights")
    try:
        state = (
            read_shards(index) if index is not None else load_state_dict(str(path), use_ema=use_ema, weights_only=True)
        )
    except CheckpointError:
        raise
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {_explain(error)}") from error
    except Exception as error:  # torch and safetensors raise a dozen kinds for a broken file
        raise CheckpointError(
            f"{path}: cannot be read as weights ({type(error).__name__}: {first_line(error)})"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()) or not state:
        raise CheckpointError(f"{path}: holds no state dict of tensors")
    if use_ema and not _has_ema(path):
        raise CheckpointError(f"{path}: `use_ema`, but it holds no EMA weights (state_dict_ema or model_ema)")
    return state


def _has_ema(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return False
    with torch.serialization.safe_globals([argparse.Namespace]):  # as timm allows it
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    return any(checkpoint.get(key) is not None for key in ("state_dict_ema", "model_ema"))


def check_keys(where: str, expected: dict[str, torch.Tensor], state: dict[str, torch.Tensor]) -> None:
    """Raise `CheckpointError` with one line that names what is missing, unexpected or of another shape."""
    missing = [k for k in expected if k not in state]
    unexpected = [k for k in state if k not in expected]
    shapes = [
        f"{k} {list(state[k].shape)} instead of {list(expected[k].shape)}"
        for k in expected
        if k in state and state[k].shape != expected[k].shape
    ]
    parts = [(missing, "missing"), (unexpected, "unexpected"), (shapes, "of another shape")]
    problems = [
        f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" for keys, what in parts if keys
    ]
    if problems:
        raise CheckpointError(f"{where}: does not fit the model: {'; '.join(problems)}")


def _explain(error: Exception) -> str:
    text = str(error)
    if "No suitable checkpoints" in text:
        return "no weights in it: local-dir: takes a folder with config.json and model.safetensors"
    if "weights_only" in text and "Unsupported globals" not in text and "GLOBAL" not in str(error.__cause__):
        return f"cannot be read as weights ({first_line(error.__cause__ or error)})"
    if "weights_only" in text:
        needs = text.partition("Unsupported globals: ")[2].partition(". No")[0]
        return (
            "blocked, because this pickle needs to run code to load"
            f"{f' ({needs})' if needs else ''}. normswap loads with weights_only=True and never falls back: "
            "save the plain state dict, best as safetensors"
        )
    if "Missing key" in text or "size mismatch" in text or "Unexpected key" in text:
        told = " ".join(text.split("\n", 1)[-1].split())
        return f"its weights do not fit the model: {textwrap.shorten(told, 300, placeholder=' ...')}"
    if "PytorchStreamReader" in text or "unexpected EOF" in text:
        return f"its weights cannot be read ({first_line(error)}): truncated file?"
    return first_line(error)
