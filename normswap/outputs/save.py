"""Output folder out, and back in: model.safetensors, config.json, normswap.json and a model card, all or nothing."""

import copy
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models._hub import save_config_for_hf  # the public save_for_hf would write the weights its own way
from torch import nn

from ..atomic import new_folder, write_text
from ..errors import ArgumentError, CheckFailedError, CheckpointError, first_line
from ..inputs.checkpoint import check_keys
from ..layers import TokenAffine, TokenBound
from ..model_utils import eval_mode, find_module, meta_copy, pretrained_cfg
from ..records.provenance import machine
from ..records.report import LOAD_WITH, ConversionReport
from ..reporting.html_report import can_render, check_extra, render_page
from ..reporting.model_card import model_card
from ..surgery.fold import difference
from .bounds_file import BOUNDS, bounds_of, read_bounds, write_bounds
from .options import SaveOptions
from .rebuild import apply_edits, as_recorded, innermost_model, model_arguments

RECORD, WEIGHTS, CONFIG, CARD = "normswap.json", "model.safetensors", "config.json", "README.md"
PAGE = "report.html"
FORMATS = (1, 2)  # a folder with bounds is of the second: to leave them out unsaid would be another model
_STOCK, _OWN, _INTO = LOAD_WITH
# Sums in another order move outputs by a few roundings of 6e-8 for each layer, relative to their size.
_REORDERED = 1e-4


@dataclass(frozen=True)
class Finished:
    """A fused model and what goes into its folder.

    Attributes:
        model: fused, from timm.
        report: is completed with the folder's path and, in ``stock_timm``, why plain timm cannot load it (None if it
            can).
        edits: from `describe_edits`, to be made to ``base``.
        probe: images `[B, C, H, W]` on which the loaded model must answer as the saved one does, to the bit.
        thumbnails: pictures of ``report.worst`` as ``data:`` URIs; they go into the record.
        base, problem: see `Rebuilt`.
    """

    model: nn.Module
    report: ConversionReport
    edits: dict[str, Any]
    probe: torch.Tensor
    thumbnails: Sequence[str] = ()
    base: nn.Module | None = None
    problem: str | None = None


def save_folder(out: str | Path, finished: Finished, options: SaveOptions | None = None) -> None:
    """Write a fused model as a folder that timm's ``local-dir:`` reads, and prove that it does before it appears.

    Of a model that timm cannot rebuild the folder has no config.json, and `load_into` reads it.

    Args:
        out: the folder; its parents are made.
        finished: the model and what is known about it.
        options: see `SaveOptions`.

    Raises:
        ArgumentError, OutputError: see `normswap.atomic.new_folder`.
        CheckFailedError: the written folder does not give the same outputs.
        MissingExtraError: ``options.page`` is True and the extra is not installed.
    """
    out, options = Path(out), options or SaveOptions()
    model, report = finished.model, finished.report
    if options.page:
        check_extra()
    page = can_render() if options.page is None else options.page
    extra, report.stock_timm = stock_arguments(model) if finished.problem is None else ({}, finished.problem)
    report.out, report.read_back_err = str(out), 0.0
    with new_folder(out, options.overwrite, options.protect) as folder:
        if finished.problem is None:
            write_config(folder / CONFIG, model, extra, options.data_config)
        write_weights(folder / WEIGHTS, model)
        report.bounded = write_bounds(folder / BOUNDS, model, finished.edits)
        loaded = None
        if report.stock_timm is None:
            loaded, report.stock_timm = _load_with_timm(folder)
        report.load_with = _STOCK if loaded is not None else _OWN if finished.problem is None else _INTO
        if finished.problem is not None:
            _prove_weights(out, folder, finished)
        elif loaded is None:
            write_json(folder / RECORD, {"format": _format(finished.edits), "edits": finished.edits, "report": {}})
            loaded = load(folder)
        if loaded is not None:
            report.read_back_err = _prove(out, model, loaded, finished.probe)
        record = {
            "format": _format(finished.edits),
            "edits": finished.edits,
            "command": options.command,
            "made": machine(next(model.parameters()).device),
            "class": type(model).__name__,
            "report": report.to_json(),
            "thumbnails": list(finished.thumbnails),
        }
        write_json(folder / RECORD, record)
        for name in (WEIGHTS, BOUNDS) if report.bounded else (WEIGHTS,):
            shutil.copymode(folder / RECORD, folder / name)  # safetensors makes files that only their owner reads
        page = page and _write_page(folder / PAGE, record)
        write_text(folder / CARD, model_card(report, pretrained_cfg(model), page, type(model).__name__))


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as indented JSON."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def load(path: str | Path) -> nn.Module:
    """Return the model in an output folder, in eval mode on the CPU, partial conversions included.

    Args:
        path: a folder that normswap wrote.

    Raises:
        ArgumentError: it is no such folder.
        CheckpointError: its files do not fit each other or cannot be read.

    >>> import tempfile
    >>> model = timm.create_model("test_vit").eval()
    >>> options = normswap.CalibrationOptions(method="channel")
    >>> result = normswap.convert(model, [torch.randn(4, 3, 160, 160)], calibration=options)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result.save(f"{folder}/out")
    ...     type(load(f"{folder}/out").norm).__name__
    'Identity'
    """
    path = Path(path)
    model = build(path)
    state = _read_weights(path)
    check_keys(str(path / WEIGHTS), model.state_dict(), state)
    model.load_state_dict(state, strict=True, assign=False)
    read_bounds(path, model, read_record(path)["edits"])
    return model.eval()


def load_into(model: nn.Module, path: str | Path) -> nn.Module:
    """Turn a model of your own into the converted one in an output folder, in place; for what timm cannot rebuild.

    Args:
        model: of the class and shape of the one that was converted, with its LayerNorms; its weights do not matter. It
            keeps device and dtype. What only runs it otherwise, as DataParallel does, may be around it.
        path: a folder that normswap wrote.

    Returns:
        ``model``, in eval mode. Nothing is changed if the folder does not fit.

    Raises:
        ArgumentError: it is no such folder.
        CheckpointError: its files cannot be read, or do not fit the model.

    >>> import tempfile
    >>> def mine():
    ...     return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    >>> model, images = mine(), [torch.randn(20, 3, 4, 4)]
    >>> result = normswap.convert(model, images, calibration=normswap.CalibrationOptions(method="channel"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result.save(f"{folder}/out")
    ...     loaded = load_into(mine(), f"{folder}/out")
    >>> [type(module).__name__ for module in loaded]
    ['Flatten', 'Linear', 'TokenBound', 'Linear']
    >>> torch.equal(loaded(images[0]), result.model(images[0]))
    True
    """
    path, target = Path(path), innermost_model(model)
    record = read_record(path)
    try:
        edits = record["edits"]
        norms = [*edits["identity"], *edits["affine"], *edits["keep"]]
        gone = next((name for name in norms if not isinstance(find_module(target, name), nn.LayerNorm)), None)
        if gone is not None:
            hint = "pass the model as it was before its conversion"
            raise CheckpointError(f"{path}: {type(target).__name__} has no LayerNorm at {gone}: {hint}")
        apply_edits(shadow := meta_copy(target), edits)
    except (KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: what {RECORD} says does not fit {type(target).__name__} ({problem})") from error
    state = _read_weights(path)
    check_keys(str(path / WEIGHTS), shadow.state_dict(), state)
    read_bounds(path, shadow, edits)  # nothing is changed if they do not fit
    apply_edits(target, edits)
    target.load_state_dict(state, strict=True)
    read_bounds(path, target, edits)
    model.eval()
    return model


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / WEIGHTS}: cannot be read ({error}): truncated?") from error


def build(path: Path) -> nn.Module:
    """Return the architecture in an output folder, its weights not loaded.

    Raises:
        ArgumentError, CheckpointError: see `load`.
    """
    record = read_record(path)
    if not (path / CONFIG).is_file() and record.get("report", {}).get("load_with") == _INTO:
        made = f"{record.get('class', 'a model')} that timm cannot rebuild"
        raise ArgumentError(f"{path}: made from {made}: pass your own to normswap.load_into(model, {str(path)!r})")
    try:
        model = timm.create_model(f"local-dir:{path}", pretrained=False)
        apply_edits(model, record["edits"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: cannot be rebuilt from its {CONFIG} and {RECORD} ({problem})") from error
    return model.eval()


def read_record(path: Path) -> dict[str, Any]:
    """Return what normswap.json in an output folder holds.

    Raises:
        ArgumentError: it is no such folder.
        CheckpointError: the file cannot be read, or is of another format.
    """
    if not is_output_folder(path):
        raise ArgumentError(f"{path}: no {RECORD} in it, so normswap did not write this folder")
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
        version = record["format"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(f"{path / RECORD}: cannot be read ({type(error).__name__}: {error})") from error
    if version not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise CheckpointError(f"{path / RECORD}: format {version}; this normswap reads formats {known}")
    return record


def is_output_folder(path: Path) -> bool:
    return (path / RECORD).is_file()


def kept_norms(path: Path) -> list[str]:
    """Return the module paths of the LayerNorms that stayed in an output folder's model.

    Raises:
        ArgumentError, CheckpointError: see `read_record`.
    """
    try:
        return list(read_record(path)["edits"]["keep"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path / RECORD}: cannot be read ({type(error).__name__}: {error})") from error


def stock_arguments(model: nn.Module) -> tuple[dict[str, Any], str | None]:
    """Return extra arguments with which plain timm builds the fused model, and None; or {} and why it cannot."""
    for path, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            return {}, f"{path} is still a LayerNorm"
        if isinstance(module, TokenAffine):
            return {}, f"{path} is a scale and shift that no neighbour could take"
    reason = None
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for extra in ({}, {"qkv_bias": True}):
        try:
            with torch.device("meta"):
                arguments = {**model_arguments(model), **extra, "norm_layer": nn.Identity}
                built = timm.create_model(pretrained_cfg(model)["architecture"], pretrained=False, **arguments)
        except Exception as error:  # an architecture that reads its norms' weights when it is made, say
            reason = reason or f"it cannot be built with norm_layer=torch.nn.Identity: {first_line(error)}"
            continue
        reason = reason or "its layers do not fit: a bias that timm has no argument for, or another norm"
        if {name: tensor.shape for name, tensor in built.state_dict().items()} == wanted:
            return extra, None
    return {}, reason


def write_weights(path: Path, model: nn.Module) -> None:
    """Write a model's tensors, contiguous, under timm's names."""
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            raise ArgumentError(f"{name} is no tensor, so safetensors cannot hold it")
        tensor = tensor.detach().cpu().contiguous()
        # Tied weights load back into tied modules; safetensors wants each tensor to own its memory.
        memory = tensor.untyped_storage().data_ptr()
        state[name] = tensor.clone() if memory in seen else tensor
        seen.add(memory)
    try:
        save_file(state, path, metadata={"format": "pt"})
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise OSError(f"weights: {error}") from error  # new_folder says where, and what still stands


def write_config(path: Path, model: nn.Module, extra: dict[str, Any], data_config: dict[str, Any] | None) -> None:
    """Write config.json as timm does, with ``extra`` arguments for the architecture."""
    shadow: Any = copy.copy(as_recorded(model))  # same tensors, its own attributes
    shadow._model_args = {**model_arguments(model), **extra}
    config = pretrained_cfg(model)
    labels = {k: config[k] for k in ("label_names", "label_descriptions") if config.get(k)}
    if len(labels.get("label_names", ())) != shadow.num_classes:  # those of the head that was there before
        labels = {}
    try:
        save_config_for_hf(shadow, str(path), model_config=labels, data_config=data_config)
    except (TypeError, ValueError) as error:
        raise OSError(f"{path.name}: {error}") from error


def _format(edits: dict[str, Any]) -> int:
    return FORMATS[1] if edits.get("bound") else FORMATS[0]


def _write_page(path: Path, record: dict[str, Any]) -> bool:
    """Write report.html and return whether that was possible: hours of calibration are not lost for a picture."""
    try:
        write_text(path, render_page(json.loads(json.dumps(record))))
    except OSError:
        raise  # a full disk would not hold the model either
    except Exception as error:
        warnings.warn(f"{path.name} was not written: {type(error).__name__}: {error}", stacklevel=4)
        path.unlink(missing_ok=True)
        return False
    return True


def _load_with_timm(folder: Path) -> tuple[nn.Module | None, str | None]:
    """Return the model as plain timm loads it, and None; or None and why timm cannot."""
    bounded = (folder / BOUNDS).is_file()
    norm: Any = partial(TokenBound, file=str(folder / BOUNDS)) if bounded else nn.Identity
    try:
        if bounded:  # its weights alone must load as well
            timm.create_model(f"local-dir:{folder}", pretrained=True, norm_layer=nn.Identity)
        return timm.create_model(f"local-dir:{folder}", pretrained=True, norm_layer=norm).eval(), None
    except Exception as error:  # an architecture's own checkpoint filter may trip over the missing norms in any way
        return None, f"its loader of this architecture does not know weights without norms ({type(error).__name__})"


def _prove(out: Path, model: nn.Module, loaded: nn.Module, probe: torch.Tensor) -> float:
    """Return by how much the outputs of the model that was read back differ, which is rounding if anything.

    Raises:
        CheckFailedError: it is another model.
    """
    weight, dtype = next(model.parameters()), next(loaded.parameters()).dtype
    # timm loads into float32 whatever the file holds, so that is what is compared.
    expected = model if weight.dtype == dtype else copy.deepcopy(model).to(dtype)
    loaded = loaded.to(weight.device)
    with eval_mode(expected):
        found = difference(expected, loaded, [probe.to(weight.device, dtype)])
    if found.largest == 0:
        return 0.0
    # Tensors that lie otherwise in memory may go through other kernels, and on a GPU sums have no order.
    if found.relative <= _REORDERED and _equal(expected.state_dict(), loaded.state_dict()):
        return found.largest
    raise CheckFailedError(f"{out}: read back, its outputs differ by {found.largest:.3g}: not saved")


def _prove_weights(out: Path, folder: Path, finished: Finished) -> None:
    """Check that the edited architecture takes the file, and that the file holds the model's tensors to the bit.

    Raises:
        CheckpointError, CheckFailedError: it does not.
    """
    state = load_file(folder / WEIGHTS)
    if finished.base is not None:
        apply_edits(shadow := copy.deepcopy(finished.base), finished.edits)
        check_keys(str(out / WEIGHTS), shadow.state_dict(), state)
    bounds = bounds_of(finished.model)
    found = load_file(folder / BOUNDS) if bounds else {}
    if not _equal(finished.model.state_dict(), state) or not _equal(bounds, {name: found[name] for name in bounds}):
        raise CheckFailedError(f"{out}: read back, its weights differ: not saved")


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    same = one.keys() == other.keys()
    return same and all(torch.equal(tensor.cpu(), other[name].cpu()) for name, tensor in one.items())
