"""Output folder out, and back in: model.safetensors, config.json, normswap.json and a model card, all or nothing."""

import copy
import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import get_model_args
from timm.models._hub import save_config_for_hf  # the public save_for_hf would write the weights its own way
from torch import nn

from ..atomic import new_folder, write_text
from ..errors import ArgumentError, CheckFailedError, CheckpointError, first_line
from ..inputs.checkpoint import check_keys
from ..layers import TokenAffine
from ..model_utils import eval_mode, find_module, pretrained_cfg
from ..records.provenance import machine
from ..records.report import ConversionReport
from ..reporting.html_report import can_render, check_extra, render_page
from ..reporting.model_card import model_card
from .options import SaveOptions

RECORD, WEIGHTS, CONFIG, CARD = "normswap.json", "model.safetensors", "config.json", "README.md"
PAGE = "report.html"
FORMAT = 1


@dataclass(frozen=True)
class Finished:
    """A fused model and what goes into its folder.

    Attributes:
        model: fused, from timm.
        report: is completed with the folder's path and, in ``stock_timm``, why plain timm cannot load it (None if it
            can).
        edits: from `describe_edits`.
        probe: images `[B, C, H, W]` on which the loaded model must answer as the saved one does, to the bit.
        thumbnails: pictures of ``report.worst`` as ``data:`` URIs; they go into the record.
    """

    model: nn.Module
    report: ConversionReport
    edits: dict[str, Any]
    probe: torch.Tensor
    thumbnails: Sequence[str] = ()


def save_folder(out: str | Path, finished: Finished, options: SaveOptions | None = None) -> None:
    """Write a fused model as a folder that timm's ``local-dir:`` reads, and prove that it does before it appears.

    Args:
        out: the folder; its parents are made.
        finished: the model and what is known about it.
        options: see `SaveOptions`.

    Raises:
        ArgumentError, OutputError: see `normswap.atomic.new_folder`; also for a model that timm did not build.
        CheckFailedError: the written folder does not give the same outputs.
        MissingExtraError: ``options.page`` is True and the extra is not installed.
    """
    out, options = Path(out), options or SaveOptions()
    model, report = finished.model, finished.report
    check_saveable(model)
    if options.page:
        check_extra()
    page = can_render() if options.page is None else options.page
    extra, report.stock_timm = stock_arguments(model)
    report.out = str(out)
    with new_folder(out, options.overwrite, options.protect) as folder:
        write_config(folder / CONFIG, model, extra, options.data_config)
        write_weights(folder / WEIGHTS, model)
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors makes files that only their owner reads
        loaded = None
        if report.stock_timm is None:
            loaded, report.stock_timm = _load_with_timm(folder)
        record = {
            "format": FORMAT,
            "edits": finished.edits,
            "command": options.command,
            "made": machine(next(model.parameters()).device),
            "report": report.to_json(),
            "thumbnails": list(finished.thumbnails),
        }
        write_json(folder / RECORD, record)
        page = page and _write_page(folder / PAGE, record)
        write_text(folder / CARD, model_card(report, pretrained_cfg(model), page))
        _prove(out, model, loaded or load(folder), finished.probe)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as indented JSON."""
    write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def check_saveable(model: nn.Module) -> None:
    """Raise `ArgumentError` if config.json could not say how to rebuild the model."""
    if not pretrained_cfg(model):
        raise ArgumentError(f"{type(model).__name__} does not come from timm, so config.json could not rebuild it")
    for name, value in model_arguments(model).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ArgumentError(f"config.json cannot hold the model's argument {name}={value!r}") from error


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
    try:
        state = load_file(path / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path / WEIGHTS}: cannot be read ({error}): truncated?") from error
    check_keys(str(path / WEIGHTS), model.state_dict(), state)
    model.load_state_dict(state, strict=True, assign=False)
    return model.eval()


def build(path: Path) -> nn.Module:
    """Return the architecture in an output folder, its weights not loaded.

    Raises:
        ArgumentError, CheckpointError: see `load`.
    """
    record = read_record(path)
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
    if version != FORMAT:
        raise CheckpointError(f"{path / RECORD}: format {version}; this normswap reads format {FORMAT}")
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


def describe_edits(original: nn.Module, fused: nn.Module) -> dict[str, Any]:
    """Return what has to be done to timm's architecture so that the fused weights fit, as plain JSON types."""
    edits: dict[str, Any] = {"identity": [], "affine": {}, "keep": {}, "biases": [], "buffers": []}
    for path, module in original.named_modules():
        now = find_module(fused, path)  # None inside a norm that is gone
        if isinstance(module, nn.LayerNorm):
            if isinstance(now, TokenAffine):
                edits["affine"][path] = {"num_features": now.num_features, "channel_dim": now.channel_dim}
            elif isinstance(now, nn.LayerNorm):
                edits["keep"][path] = {"eps": now.eps}
            else:
                edits["identity"].append(path)
        elif getattr(module, "bias", 0) is None and getattr(now, "bias", None) is not None:
            edits["biases"].append(path)
        for name in sorted(module._non_persistent_buffers_set):
            if now is not None and name in now._buffers and name not in now._non_persistent_buffers_set:
                edits["buffers"].append(f"{path}.{name}")
    return edits


def apply_edits(model: nn.Module, edits: dict[str, Any]) -> None:
    """Do to timm's architecture, in place, what `describe_edits` found."""
    for path in edits["identity"]:
        model.set_submodule(path, nn.Identity())
    for path, arguments in edits["affine"].items():
        model.set_submodule(path, TokenAffine(**arguments))
    for path, arguments in edits["keep"].items():
        model.get_submodule(path).eps = arguments["eps"]
    for path in edits["biases"]:
        layer = model.get_submodule(path)
        if layer.bias is None:
            width = layer.weight.shape[0]
            layer.register_parameter("bias", nn.Parameter(torch.zeros(width)))
    for name in edits.get("buffers", ()):  # folders of 0.1 have none
        path, _, attribute = name.rpartition(".")
        model.get_submodule(path)._non_persistent_buffers_set.discard(attribute)


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


def model_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the arguments with which timm built a model, but for its norms."""
    # norm_layer may be a class, which JSON cannot hold; after the fold it does not matter.
    return {k: v for k, v in get_model_args(model).items() if k != "norm_layer"}


def write_weights(path: Path, model: nn.Module) -> None:
    """Write a model's tensors, contiguous, under timm's names."""
    state, seen = {}, set()
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        # Tied weights load back into tied modules; safetensors wants each tensor to own its memory.
        state[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    try:
        save_file(state, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"weights: {error}") from error  # new_folder says where, and what still stands


def write_config(path: Path, model: nn.Module, extra: dict[str, Any], data_config: dict[str, Any] | None) -> None:
    """Write config.json as timm does, with ``extra`` arguments for the architecture."""
    shadow: Any = copy.copy(model)  # same tensors, its own attributes
    shadow._model_args = {**model_arguments(model), **extra}
    config = pretrained_cfg(model)
    labels = {k: config[k] for k in ("label_names", "label_descriptions") if config.get(k)}
    try:
        save_config_for_hf(shadow, str(path), model_config=labels, data_config=data_config)
    except ValueError as error:
        raise OSError(f"{path.name}: {error}") from error


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
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True, norm_layer=nn.Identity).eval(), None
    except Exception as error:  # an architecture's own checkpoint filter may trip over the missing norms in any way
        return None, f"its loader of this architecture does not know weights without norms ({type(error).__name__})"


def _prove(out: Path, model: nn.Module, loaded: nn.Module, probe: torch.Tensor) -> None:
    weight, dtype = next(model.parameters()), next(loaded.parameters()).dtype
    # timm loads into float32 whatever the file holds, so that is what is compared.
    expected = model if weight.dtype == dtype else copy.deepcopy(model).to(dtype)
    with eval_mode(expected), torch.no_grad():
        images = probe.to(weight.device, dtype)
        difference = (loaded.to(weight.device)(images) - expected(images)).abs().max()
    if difference != 0:  # NaN too
        raise CheckFailedError(f"{out}: read back, its outputs differ by {float(difference):.3g}: not saved")
