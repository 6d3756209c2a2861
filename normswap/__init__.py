"""Take LayerNorm out of a pretrained timm vision transformer and prove that it still works.

Letters used everywhere: B batch, N tokens, C channels, H hidden width of the FFN, O outputs of a linear layer.
Accuracy and agreement are in percent, times in seconds, divergences in nats.
"""

from .calibrate import calibrate
from .checkpoint import load_model
from .data import load_images
from .errors import (
    ArgumentError,
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
from .finetune import finetune
from .fold import fold_norms
from .pipeline import Conversion, convert
from .plan import Plan, make_plan
from .recipe import FinetuneOptions
from .report import ConversionReport
from .save import load
from .swap import swap_norms

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "CalibrationError",
    "CheckFailedError",
    "CheckpointError",
    "Conversion",
    "ConversionReport",
    "DataError",
    "FinetuneOptions",
    "FoldError",
    "HubError",
    "MissingExtraError",
    "ModelRefusedError",
    "NoLayerNormError",
    "NormswapError",
    "OutputError",
    "Plan",
    "calibrate",
    "convert",
    "evaluate_models",
    "finetune",
    "fold_norms",
    "load",
    "load_images",
    "load_model",
    "make_plan",
    "swap_norms",
]
