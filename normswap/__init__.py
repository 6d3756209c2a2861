"""Take LayerNorm out of a pretrained timm vision transformer and prove that it still works.

Letters used everywhere: B batch, N tokens, C channels, H hidden width of the FFN, O outputs of a linear layer.
Accuracy and agreement are in percent, times in seconds, divergences in nats.
"""

from .benchmark import benchmark_models
from .calibrate import calibrate
from .checkpoint import load_model
from .continuation import finetune_swapped, fuse
from .data import load_images
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
from .evaluate import evaluate_models
from .export import ExportReport, export_model
from .finetune import finetune
from .fold import fold_norms
from .pipeline import Conversion, convert
from .plan import Plan, make_plan
from .recipe import FinetuneOptions
from .report import ConversionReport
from .save import load
from .swap import swap_norms
from .swapped import Swapped, load_swapped, save_swapped
from .throughput import Benchmark

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
