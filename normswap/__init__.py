"""Take LayerNorm out of a pretrained timm vision transformer and prove that it still works.

Letters used everywhere: B batch, N tokens, C channels, H hidden width of the FFN, O outputs of a linear layer.
Accuracy and agreement are in percent, times in seconds, divergences in nats.
"""

from .benchmarking.benchmark import benchmark_models
from .benchmarking.results import Benchmark
from .calibration.calibrate import calibrate
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
from .exporting.export import ExportReport, export_model
from .finetuning.finetune import finetune
from .finetuning.options import FinetuneOptions
from .inputs.checkpoint import load_model
from .inputs.dataset import load_images
from .outputs.save import load
from .outputs.swapped_checkpoint import Swapped, load_swapped, save_swapped
from .pipeline.conversion import Conversion
from .pipeline.convert import convert
from .pipeline.from_swapped import finetune_swapped, fuse
from .planning.plan import Plan, make_plan
from .records.report import ConversionReport
from .surgery.fold import fold_norms
from .surgery.swap import swap_norms

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Benchmark",
    "BenchmarkError",
    "CalibrationError",
    "CheckFailedError",
    "CheckpointError",
    "Conversion",
    "ConversionReport",
    "DataError",
    "ExportReport",
    "FinetuneOptions",
    "FoldError",
    "HubError",
    "MissingExtraError",
    "ModelRefusedError",
    "NoLayerNormError",
    "NormswapError",
    "OutputError",
    "Plan",
    "Swapped",
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
    "load_model",
    "load_swapped",
    "make_plan",
    "save_swapped",
    "swap_norms",
]
