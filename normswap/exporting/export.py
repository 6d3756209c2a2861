"""A deployable graph, ONNX or PyTorch's own, that is compared with the model before its file appears."""

import copy
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import nn

from ..ambient import known_context
from ..atomic import check_file, new_file
from ..errors import ArgumentError, CheckFailedError, first_line
from ..inputs.batches import checked, rebatched
from ..inputs.dataset import describe
from ..model_utils import eval_mode, example_batch, has_classes, pretrained_cfg, resolve_input_size
from ..module_state import check_state, check_weights
from ..planning.graph import export_program
from ..progress import Progress, no_progress
from ..records.json_types import plain
from ..records.report import versions
from .fp16 import HalfReport, check_fp16
from .int8 import Int8Report, check_int8
from .layernorm_search import Inventory, count_onnx, count_program
from .onnx_file import EXTRA_ONNX, OnnxModel, read_onnx, require_onnx, write_onnx
from .options import ATOL, DEFAULT_OPSET, DTYPES, FORMATS, Format

_TORCH_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
_RANDOM, _BATCH = 16, 64


@dataclass(frozen=True)
class Comparison:
    """An exported graph against the PyTorch model in float32, on the same images.

    Attributes:
        images: which they were.
        n: how many.
        max_abs_diff: largest absolute difference of an output; infinite if one is NaN.
        agreement: percent of images where the highest logit is the same; None for headless models.
        non_finite: images for which the graph gives NaN or infinity.
    """

    images: str
    n: int
    max_abs_diff: float
    agreement: float | None
    non_finite: int

    def line(self) -> str:
        same = "" if self.agreement is None else f", top-1 agreement {self.agreement:.2f} %"
        return f"largest difference {self.max_abs_diff:.3g}{same}, {self.non_finite} not finite, on {self.images}"


@dataclass(frozen=True)
class ExportReport:
    """What `export_model` wrote and found.

    Attributes:
        model: its name.
        format: "onnx" or "pt2".
        files: paths, the graph first; with its weights in a file of their own there are two.
        size: bytes of all of them.
        dtype: "fp32" or "fp16", of weights, input and output.
        opset: of ONNX; None for pt2.
        input_shape: `[B, C, H, W]`; B is "batch" where it is open.
        layer_norms: module paths of the LayerNorms that stayed in the graph.
        graph: what it is made of.
        comparison: the file, loaded again, against the model.
        atol: the largest difference that was allowed.
        half: the FP16 check, None if it was not asked for.
        int8: the INT8 check, None if it was not asked for.
        seconds: wall time per step.
        versions: of what the result depends on.
    """

    model: str
    format: str
    files: tuple[str, ...]
    size: int
    dtype: str
    opset: int | None
    input_shape: tuple[int | str, ...]
    layer_norms: tuple[str, ...]
    graph: Inventory
    comparison: Comparison
    atol: float
    half: HalfReport | None
    int8: Int8Report | None
    seconds: Mapping[str, float]
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return plain(asdict(self))


@known_context()
def export_model(
    model: nn.Module,
    path: str | Path,
    images: Iterable[Any] | None = None,
    format: Format = "onnx",
    *,
    dtype: str = "fp32",
    opset: int = DEFAULT_OPSET,
    static: int | None = None,
    external_data: bool = False,
    atol: float | None = None,
    original: nn.Module | None = None,
    int8_images: Iterable[Any] | None = None,
    kept: Iterable[str] | None = None,
    overwrite: bool = False,
    name: str | None = None,
    progress: Progress = no_progress,
) -> ExportReport:
    """Write a model as one graph, load the file again and compare it with the model. ``model`` stays as it is.

    Args:
        model: a timm model in float32, with or without LayerNorms.
        path: the file, ending in .onnx or .pt2.
        images: what the comparison is made on: any iterable of batches `[B, C, H, W]`, or of pairs with labels `[B]`.
            Default: 16 random images, nearly grey, which say whether the translation is right, no more.
        format: "onnx", by torch's dynamo exporter and run in ONNX Runtime, or "pt2", by `torch.export.save`.
        dtype: "fp32", or "fp16" for weights, input and output in half precision; with `exporting.fp16.check_fp16`.
        opset: of ONNX.
        static: fix B to this number, as many NPUs want it; default: leave it open.
        external_data: ONNX weights in a file of their own even below 2 GB, where they have to be.
        atol: largest absolute difference of an output from ``model``; default: 0.001, for fp16 0.1.
        original: the model before conversion, for the FP16 and INT8 checks to compare with.
        int8_images: calibration images for `normswap.exporting.int8.check_int8`; default: no INT8 check.
        kept: module paths of the LayerNorms that may be in the graph; default: those in ``model``.
        overwrite: replace the file.
        name: what to call the model.
        progress: called with (what, done, total).

    Raises:
        ArgumentError: an invalid argument, a file that is there already, no images.
        MissingExtraError: ONNX without the extra ``onnx``.
        ModelRefusedError: the model cannot be exported or translated, or not with B open.
        CheckFailedError: outputs differ by more than ``atol`` or are not finite, a LayerNorm is in the graph that
            should not be, or a tensor has no FP16 number; its ``report`` is the `ExportReport`. Nothing is saved.
        OutputError: the file cannot be written.

    >>> import tempfile
    >>> model = timm.create_model("test_vit").eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = export_model(model, f"{folder}/model.pt2", format="pt2")
    >>> report.comparison.max_abs_diff, len(report.layer_norms)
    (0.0, 13)
    """
    check_state(model)
    check_weights(model)
    path = Path(path)
    check_export(path, format, dtype, overwrite)
    atol = ATOL[dtype] if atol is None else atol
    _check_arguments(format, dtype, static, atol, images, int8_images)
    source = _random(resolve_input_size(model)) if images is None else list(checked(images))
    batches = list(rebatched(source, _BATCH))
    if not batches:
        raise ArgumentError("no images to compare the graph on")
    size = (batches[0].shape[1], batches[0].shape[2], batches[0].shape[3])
    count = sum(len(batch) for batch in batches)
    described = f"{count} random images" if images is None else describe(images, count)
    name = name or str(pretrained_cfg(model).get("architecture", type(model).__name__))
    clock = _Clock()
    exported = copy.deepcopy(model).cpu().eval().requires_grad_(False).to(_TORCH_DTYPES[dtype])
    program = export_program(exported, example_batch(exported, size, static or 2), dynamic=static is None)
    stayed = count_program(program)
    record = _metadata(model, name, dtype, size, stayed.norms)
    with new_file(path, overwrite) as beside:
        if format == "onnx":
            output = "logits" if has_classes(model) else "features"
            write_onnx(program, beside, opset, output, record, external_data)
            graph = count_onnx(read_onnx(beside))
            loaded: nn.Module = OnnxModel(beside)
        else:
            torch.export.save(program, beside, extra_files={"normswap.json": json.dumps(record)})
            graph, loaded = stayed, _load_program(beside)
        del program
        clock.note("export")
        comparison = _compare(model, loaded, batches, static, _TORCH_DTYPES[dtype], described, progress)
        clock.note("compare")
        half = check_fp16(model, batches, original) if dtype == "fp16" else None
        int8 = None
        if int8_images is not None:
            models = {"original": original, name: model} if original is not None else {name: model}
            int8 = check_int8(models, rebatched(int8_images, _BATCH), source, opset, progress, count)
        clock.note("checks")
        files = sorted(beside.parent.iterdir(), key=lambda file: file != beside)
        report = ExportReport(
            model=name,
            format=format,
            files=tuple(str(path.parent / file.name) for file in files),
            size=sum(file.stat().st_size for file in files),
            dtype=dtype,
            opset=opset if format == "onnx" else None,
            input_shape=(static or "batch", *size),
            layer_norms=graph.norms,
            graph=graph,
            comparison=comparison,
            atol=atol,
            half=half,
            int8=int8,
            seconds=clock.seconds,
            versions=versions(*(EXTRA_ONNX if format == "onnx" else ())),
        )
        _judge(report, set(stayed.norms) if kept is None else set(kept))
    _drop_old_weights(path, files)
    return report


class _Clock:
    """Wall-clock seconds of one step after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def note(self, step: str) -> None:
        """Take down how long the step took that ends here."""
        now = time.perf_counter()
        self.seconds[step], self._since = round(now - self._since, 3), now


def _check_arguments(format: str, dtype: str, static: int | None, atol: float, images: Any, int8_images: Any) -> None:
    if not atol >= 0:
        raise ArgumentError(f"`atol` must be 0 or more, not {atol}")
    if images is None and (dtype == "fp16" or int8_images is not None):
        raise ArgumentError("FP16 and INT8 are checked on real images: give `images`")
    if int8_images is not None and (format != "onnx" or static is not None):
        raise ArgumentError("the INT8 check is made on an ONNX graph with an open batch size")


def check_export(path: Path, format: str, dtype: str = "fp32", overwrite: bool = False) -> None:
    """Raise before any work is done if ``path`` cannot be written in this format.

    Raises:
        ArgumentError, MissingExtraError, OutputError: see `export_model`.
    """
    if format not in FORMATS or dtype not in DTYPES:
        raise ArgumentError(f"format is one of {', '.join(FORMATS)}, dtype one of {', '.join(DTYPES)}")
    if path.suffix != f".{format}":
        raise ArgumentError(f"{path}: the name of a file in this format ends in .{format}")
    if format == "onnx":
        require_onnx()
    check_file(path, overwrite)


def _random(size: tuple[int, int, int]) -> list[torch.Tensor]:
    # Nearly grey: noise of full contrast is like no picture, and a model without LayerNorm answers it with logits of
    # any size, whose rounding errors are as large.
    return [0.1 * torch.randn(_RANDOM, *size, generator=torch.Generator().manual_seed(0))]


def _metadata(
    model: nn.Module, name: str, dtype: str, size: tuple[int, int, int], stayed: tuple[str, ...]
) -> dict[str, str]:
    """Return what the file says of itself: who made it, and how its input has to be prepared."""
    record = {
        "normswap.version": versions()["normswap"],
        "normswap.model": name,
        "normswap.dtype": dtype,
        "normswap.layer_norms": ", ".join(stayed) or "none",
    }
    if pretrained_cfg(model):
        config = get_model_input_config(model) | {"input_size": size}
        record["normswap.preprocessing"] = json.dumps(config, default=str)
    return record


def _load_program(path: Path) -> nn.Module:
    try:
        return torch.export.load(path).module()
    except Exception as error:  # whatever deserialisation runs into
        raise CheckFailedError(f"the program cannot be loaded again: {first_line(error)}: not saved") from error


@torch.no_grad()
def _compare(
    model: nn.Module,
    loaded: nn.Module,
    batches: list[torch.Tensor],
    static: int | None,
    dtype: torch.dtype,
    described: str,
    progress: Progress,
) -> Comparison:
    weight = next(model.parameters())
    worst, same, non_finite, done = 0.0, 0, 0, 0
    total = sum(len(batch) for batch in batches)
    with eval_mode(model):
        for batch in batches:
            expected = model(batch.to(weight)).double().flatten(1).cpu()  # [B, K], or [B, N, C] without a head
            found = _run(loaded, batch.cpu().to(dtype), static).double().flatten(1)
            if found.shape != expected.shape:
                raise CheckFailedError(
                    f"the graph has outputs of shape {list(found.shape)}, the model {list(expected.shape)}"
                )
            difference = float((found - expected).abs().max())
            worst = max(worst, math.inf if math.isnan(difference) else difference)
            same += int((found.argmax(1) == expected.argmax(1)).sum())
            non_finite += int((~torch.isfinite(found)).any(1).sum())
            done += len(batch)
            progress("compare", done, total)
    agreement = 100 * same / total if has_classes(model) else None
    return Comparison(described, total, worst, agreement, non_finite)


def _run(loaded: nn.Module, batch: torch.Tensor, static: int | None) -> torch.Tensor:
    if static is None:
        return loaded(batch)
    outputs = []
    for part in batch.split(static):
        missing = static - len(part)  # a fixed batch is filled up with the last image
        whole = part if not missing else torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])
        outputs.append(loaded(whole)[: len(part)])
    return torch.cat(outputs)


def _judge(report: ExportReport, allowed: set[str]) -> None:
    """Raise `CheckFailedError` with the report if the file must not appear."""
    comparison = report.comparison
    unexpected = [site for site in report.layer_norms if site not in allowed]
    problem = None
    if unexpected:
        problem = f"the graph has {len(unexpected)} LayerNorms that were not kept, as {unexpected[0]}"
    elif comparison.non_finite:
        problem = f"the graph gives NaN or infinity for {comparison.non_finite} of {comparison.n} images"
    elif not comparison.max_abs_diff <= report.atol:
        difference = f"{comparison.max_abs_diff:.3g}"
        problem = f"graph and model differ by {difference} in an output, more than `atol` {report.atol:g}"
    elif report.half is not None:
        problem = report.half.problem
    if problem is not None:
        raise CheckFailedError(f"{problem}: not saved", report)


def _drop_old_weights(path: Path, files: list[Path]) -> None:
    """Remove the weights file of a graph that was replaced."""
    new = {file.name for file in files}
    for old in path.parent.glob(f"{path.name}.????????.data"):
        if old.name not in new:
            old.unlink(missing_ok=True)
