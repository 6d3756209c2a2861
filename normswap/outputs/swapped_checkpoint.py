"""A checkpoint with BatchNorm still in it: swapped.safetensors with the plan beside it, to train on and fold later.

Neither file has the name of a finished model's, and `pipeline.open_model` refuses the folder by name.
"""

import copy
import json
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..atomic import new_folder
from ..errors import ArgumentError, CheckpointError
from ..inputs.checkpoint import check_keys
from ..layers import TokenBatchNorm
from ..model_utils import resolve_input_size
from ..planning.foldability import KEEP
from ..planning.options import FfnBn
from ..planning.plan import Plan, make_plan
from ..records.budget import BudgetRecord, SiteCost, Trial
from ..records.report import ConversionReport, Finetuning, LayerFit, SiteFit, StageMetrics, StreamError
from ..records.stress import StressRecord
from ..records.worst_images import Answer, WorstImage
from ..surgery.swap import swap_norms
from .options import SaveOptions
from .rebuild import apply_edits, describe_edits, rebuilt
from .save import CONFIG, write_config, write_json, write_weights

SWAPPED_WEIGHTS, SWAPPED_RECORD = "swapped.safetensors", "swapped.json"
_FORMAT = 1


@dataclass
class Swapped:
    """A swapped model and what is known about it.

    Attributes:
        model: with BatchNorm in, in eval mode.
        original: the architecture it was made from, on the meta device: shapes and names, no weights.
        plan: what was decided for each LayerNorm.
        report: the numbers of the conversion so far.
    """

    model: nn.Module
    original: nn.Module
    plan: Plan
    report: ConversionReport


def save_swapped(out: str | Path, swapped: Swapped, options: SaveOptions | None = None) -> None:
    """Write a swapped model as a folder from which `load_swapped` brings it back, all or nothing.

    Args:
        out: the folder; its parents are made.
        swapped: a model from `swap_norms` with ``plan`` and ``report.ffn_bn``, calibrated or fine-tuned, and what it
            was made from, of which only shapes and names are read.
        options: see `SaveOptions`.

    Raises:
        ArgumentError, OutputError: see `normswap.atomic.new_folder`.
    """
    options = options or SaveOptions()
    model, plan = swapped.model, swapped.plan
    can_rebuild = rebuilt(swapped.original, swapped.original).problem is None
    record = {
        "format": _FORMAT,
        "keep": [site.path for site in plan.sites if site.verdict == KEEP],
        "input_size": list(plan.input_size),
        "verdicts": _verdicts(plan),
        **describe_swapped(swapped.original, model),
        "command": options.command,
        "report": swapped.report.to_json(),
    }
    with new_folder(Path(out), options.overwrite, options.protect) as folder:
        if can_rebuild:
            write_config(folder / CONFIG, model, {}, options.data_config)
        write_weights(folder / SWAPPED_WEIGHTS, model)
        write_json(folder / SWAPPED_RECORD, record)
        shutil.copymode(folder / SWAPPED_RECORD, folder / SWAPPED_WEIGHTS)


def load_swapped(path: str | Path, model: nn.Module | None = None) -> Swapped:
    """Return the model in a folder that `save_swapped` wrote, in eval mode on the CPU.

    Args:
        path: the folder.
        model: of the class and shape of the one that was converted, with its LayerNorms, where timm cannot rebuild it.
            It stays as it is.

    Raises:
        ArgumentError: it is no such folder, or it needs a model.
        CheckpointError: its files do not fit each other or cannot be read.

    >>> import tempfile
    >>> model = timm.create_model("test_vit").eval()
    >>> options = normswap.CalibrationOptions(method="channel")
    >>> result = normswap.convert(model, [torch.randn(4, 3, 160, 160)], calibration=options)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     result.save_swapped(f"{folder}/swapped")
    ...     swapped = load_swapped(f"{folder}/swapped")
    >>> type(swapped.model.norm).__name__
    'TokenBatchNorm'
    """
    path = Path(path)
    if not (path / SWAPPED_RECORD).is_file():
        hint = "; it is fused already" if (path / "normswap.json").is_file() else ""
        raise ArgumentError(f"{path}: no {SWAPPED_RECORD} in it, so there is no swapped checkpoint{hint}")
    if model is None and not (path / CONFIG).is_file():
        raise ArgumentError(f"{path}: no {CONFIG}, since timm cannot rebuild the model: pass your own as `model`")
    try:
        record = json.loads((path / SWAPPED_RECORD).read_text(encoding="utf-8"))
        if record["format"] != _FORMAT:
            problem = f"format {record['format']}; this normswap reads format {_FORMAT}"
            raise CheckpointError(f"{path / SWAPPED_RECORD}: {problem}")
        report = _report(record["report"])
        original = timm.create_model(f"local-dir:{path}", pretrained=False) if model is None else copy.deepcopy(model)
        original = original.eval().cpu()
        size = tuple(record["input_size"])
        plan = make_plan(original, record["keep"], input_size=resolve_input_size(original, size))
        if _verdicts(plan) != record["verdicts"]:
            raise CheckpointError(f"{path}: this version of normswap plans this architecture otherwise: convert again")
        ffn_bn: FfnBn = report.ffn_bn  # type: ignore[assignment]
        found = rebuild_swapped(swap_norms(original, plan, ffn_bn), record)
        state = load_file(path / SWAPPED_WEIGHTS)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        problem = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path}: cannot be rebuilt from its files ({problem}): truncated?") from error
    check_keys(str(path / SWAPPED_WEIGHTS), found.state_dict(), state)
    found.load_state_dict(state, strict=True)
    return Swapped(found.eval(), original.to("meta"), plan, report)


def describe_swapped(original: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Return what `rebuild_swapped` needs beyond the weights, as plain JSON types."""
    found = describe_edits(original, model)
    edits = found | {"identity": [], "affine": {}, "keep": {}, "bound": {}}
    eps = {path: module.eps for path, module in model.named_modules() if isinstance(module, _WITH_EPS)}
    return {"eps": eps, "edits": edits, "bound": list(found["bound"])}


def rebuild_swapped(model: nn.Module, record: dict[str, Any]) -> nn.Module:
    """Give a model fresh from `swap_norms`, in place, what `describe_swapped` found; return it."""
    apply_edits(model, record["edits"])
    for name, eps in record["eps"].items():
        model.get_submodule(name).eps = eps
    for path in record.get("bound", ()):  # folders of 0.1 have none
        norm: Any = model.get_submodule(path)
        norm.set_bound(norm.running_mean, norm.running_mean)  # of the right shape; the weights' file has the values
    return model


def is_swapped(model: str) -> bool:
    """Return whether ``model`` names a folder with a swapped checkpoint."""
    return (Path(model.removeprefix("local-dir:")) / SWAPPED_RECORD).is_file()


_WITH_EPS = (nn.LayerNorm, TokenBatchNorm)


def _verdicts(plan: Plan) -> list[list[str]]:
    return [[site.path, site.verdict] for site in plan.sites]


def _report(record: dict[str, Any]) -> ConversionReport:
    """Return a report from its JSON; what `ConversionReport.to_json` adds to the fields is left out."""
    known = {field.name for field in fields(ConversionReport)}
    found = ConversionReport(**{key: value for key, value in record.items() if key in known})
    kinds: dict[str, Any] = {"fits": SiteFit, "layers": LayerFit, "stream": StreamError, "stages": StageMetrics}
    for key, kind in kinds.items():
        setattr(found, key, [kind(**row) for row in record[key]])
    found.worst = [_worst(row) for row in record["worst"]]
    if record["budget"] is not None:
        found.budget = read_budget(record["budget"])
    if record["finetuning"] is not None:
        found.finetuning = Finetuning(**record["finetuning"])
    if record.get("stress") is not None:  # folders of 0.1 have none
        found.stress = StressRecord.from_json(record["stress"])
    return found


def read_budget(record: dict[str, Any]) -> BudgetRecord:
    """Return the record of a search from its plain form."""
    lists: dict[str, Any] = {"trials": Trial, "costs": SiteCost}
    return BudgetRecord(**record | {key: [kind(**row) for row in record[key]] for key, kind in lists.items()})


def _worst(row: dict[str, Any]) -> WorstImage:
    answers = {side: [Answer(**answer) for answer in row[side]] for side in ("original", "converted")}
    return WorstImage(**row | answers)
