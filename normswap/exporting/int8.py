"""What INT8 would cost: a check with ONNX Runtime's static quantisation, nothing that is saved.

Without LayerNorm the residual stream itself, outlier channels and all, is what the linear layers read. One scale per
activation tensor can be too coarse for it: what is easier in FP16 can be harder in INT8, so it is measured here.
"""

import copy
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError, ModelRefusedError, first_line
from ..evaluation.evaluate import evaluate_models
from ..model_utils import example_batch
from ..planning.graph import export_program, quiet
from ..progress import Progress, no_progress
from ..records.report import StageMetrics
from .onnx_file import OnnxModel, write_onnx

# The layers that hold a ViT's weights and its attention products; what lies between them stays in float.
OPERATORS = ("Conv", "Gemm", "MatMul")
_BATCH = 16


@dataclass(frozen=True)
class Int8Report:
    """What static quantisation does to a model, and to the original where there is one.

    Attributes:
        calibration_images: how many set the ranges of the activations.
        scheme: how it was quantised.
        stages: the models in float and in INT8; agreement and KL are with the first.
    """

    calibration_images: int
    scheme: str
    stages: tuple[StageMetrics, ...]


SCHEME = (
    f"{', '.join(OPERATORS)} in INT8: weights per channel, symmetric; activations per tensor, asymmetric, ranges by "
    "minimum and maximum; run as quantise-dequantise pairs in float"
)


def check_int8(
    models: Mapping[str, nn.Module],
    calibration: Iterable[torch.Tensor],
    images: Iterable[Any],
    opset: int,
    progress: Progress = no_progress,
    total: int = 0,
) -> Int8Report:
    """Quantise models with ONNX Runtime and compare each with itself in float.

    Args:
        models: by name, in float32; the first one is the reference.
        calibration: image batches `[B, C, H, W]` that set the ranges; no labels needed.
        images: what is measured on, in the form that `normswap.evaluation.evaluate.evaluate_models` takes.
        opset: of the graphs that are quantised.
        progress: called with ("evaluate", images done, ``total``).

    Raises:
        ArgumentError: no calibration images.
        ModelRefusedError: a model cannot be exported or quantised.
        CheckFailedError: ONNX Runtime cannot run a graph.
    """
    batches = [batch.detach().cpu().float() for batch in calibration]
    if not batches:
        raise ArgumentError("no images to set INT8 ranges with")
    size = (batches[0].shape[1], batches[0].shape[2], batches[0].shape[3])
    with tempfile.TemporaryDirectory(prefix="normswap-int8-") as folder:
        stages: dict[str, nn.Module] = {}
        for i, (name, model) in enumerate(models.items()):
            exported = copy.deepcopy(model).cpu()
            program = export_program(exported, example_batch(exported, size), dynamic=True)
            plain, quantised = Path(folder) / f"{i}.onnx", Path(folder) / f"{i}.int8.onnx"
            write_onnx(program, plain, opset)
            _quantise(plain, quantised, batches)
            stages[name] = model
            stages[f"{name} INT8"] = OnnxModel(quantised, optimise=False)
        found = evaluate_models(stages, images, progress=progress, total=total)
    return Int8Report(sum(len(batch) for batch in batches), SCHEME, tuple(found))


def _quantise(source: Path, target: Path, batches: list[torch.Tensor]) -> None:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = source.with_suffix(".prepared.onnx")
    with quiet():
        try:
            # The exporter has written every shape already.
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                target,
                _Reader(batches),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=list(OPERATORS),
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
        except Exception as error:  # its own classes, without a common base
            raise ModelRefusedError(f"ONNX Runtime cannot quantise the graph: {first_line(error)}") from error


class _Reader:
    """Gives ONNX Runtime the calibration images, a few at a time: it keeps every activation of them."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.parts: Iterator[torch.Tensor] = (part for batch in batches for part in batch.split(_BATCH))

    def get_next(self) -> dict[str, Any] | None:
        part = next(self.parts, None)
        return None if part is None else {"images": part.contiguous().numpy()}
