"""Take LayerNorm out of a pretrained timm vision transformer and prove that it still works.

Letters used everywhere: B batch, N tokens, C channels, H hidden width of the FFN, O outputs of a linear layer.
Accuracy and agreement are in percent, times in seconds, divergences in nats.

Names are imported when they are first used, so that ``import normswap`` does not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .benchmarking.benchmark import benchmark_models
    from .benchmarking.results import Benchmark
    from .calibration.calibrate import calibrate
    from .calibration.options import CalibrationOptions
    from .errors import (
        ArgumentError,
        BenchmarkError,
        CalibrationError,
        CheckFailedError,
        CheckpointError,
        DataError,
        FoldError,
        HubError,
        MissingExtraError,
        ModelRefusedError,
        NoLayerNormError,
        NormswapError,
        OutputError,
    )
    from .evaluation.evaluate import evaluate_models
    from .evaluation.stress import stress_models
    from .exporting.export import ExportReport, export_model
    from .finetuning.finetune import finetune
    from .finetuning.options import FinetuneOptions
    from .inputs.checkpoint import load_model
    from .inputs.dataset import load_images
    from .layers import TokenBound
    from .outputs.options import SaveOptions
    from .outputs.save import load, load_into
    from .outputs.swapped_checkpoint import Swapped, load_swapped, save_swapped
    from .pipeline.conversion import Conversion
    from .pipeline.convert import convert
    from .pipeline.from_swapped import finetune_swapped, fuse
    from .pipeline.options import EvaluationOptions, FinetuneStage
    from .planning.plan import Plan, make_plan
    from .records.report import ConversionReport
    from .records.stress import StressRecord
    from .search.budget import AccuracyBudget
    from .surgery.fold import fold_norms
    from .surgery.swap import swap_norms

__version__ = "0.1.0"

_HOMES = {
    "benchmarking.benchmark": "benchmark_models",
    "benchmarking.results": "Benchmark",
    "calibration.calibrate": "calibrate",
    "calibration.options": "CalibrationOptions",
    "errors": "ArgumentError BenchmarkError CalibrationError CheckFailedError CheckpointError DataError FoldError "
    "HubError MissingExtraError ModelRefusedError NoLayerNormError NormswapError OutputError",
    "evaluation.evaluate": "evaluate_models",
    "evaluation.stress": "stress_models",
    "exporting.export": "ExportReport export_model",
    "finetuning.finetune": "finetune",
    "finetuning.options": "FinetuneOptions",
    "inputs.checkpoint": "load_model",
    "inputs.dataset": "load_images",
    "layers": "TokenBound",
    "outputs.options": "SaveOptions",
    "outputs.save": "load load_into",
    "outputs.swapped_checkpoint": "Swapped load_swapped save_swapped",
    "pipeline.conversion": "Conversion",
    "pipeline.convert": "convert",
    "pipeline.from_swapped": "finetune_swapped fuse",
    "pipeline.options": "EvaluationOptions FinetuneStage",
    "planning.plan": "Plan make_plan",
    "records.report": "ConversionReport",
    "records.stress": "StressRecord",
    "search.budget": "AccuracyBudget",
    "surgery.fold": "fold_norms",
    "surgery.swap": "swap_norms",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "AccuracyBudget",
    "ArgumentError",
    "Benchmark",
    "BenchmarkError",
    "CalibrationError",
    "CalibrationOptions",
    "CheckFailedError",
    "CheckpointError",
    "Conversion",
    "ConversionReport",
    "DataError",
    "EvaluationOptions",
    "ExportReport",
    "FinetuneOptions",
    "FinetuneStage",
    "FoldError",
    "HubError",
    "MissingExtraError",
    "ModelRefusedError",
    "NoLayerNormError",
    "NormswapError",
    "OutputError",
    "Plan",
    "SaveOptions",
    "StressRecord",
    "Swapped",
    "TokenBound",
    "benchmark_models",
    "calibrate",
    "convert",
    "evaluate_models",
    "export_model",
    "finetune",
    "finetune_swapped",
    "fold_norms",
    "fuse",
    "load",
    "load_images",
    "load_into",
    "load_model",
    "load_swapped",
    "make_plan",
    "save_swapped",
    "stress_models",
    "swap_norms",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
