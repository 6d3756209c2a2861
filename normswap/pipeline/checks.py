"""What `convert` and `fuse` both hold a result against, and how they describe it."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..evaluation.worst_images import WorstImages
from ..inputs.dataset import ImageSet
from ..model_utils import pretrained_cfg
from ..planning.plan import Plan
from ..records.worst_images import WorstImage
from ..surgery.fold import fold_norms, max_difference


def pictured(worst: WorstImages, images: Iterable[Any], model: nn.Module) -> tuple[list[WorstImage], list[str]]:
    """Return the images that changed most and their thumbnails, named as the set they came from names them."""
    seen = images if isinstance(images, ImageSet) else None
    config = pretrained_cfg(model)
    found = worst.found(class_names(config, seen), seen.filename if seen else None)
    normalised = (seen.mean, seen.std) if seen else (config.get("mean") or (0.0,), config.get("std") or (1.0,))
    return found, worst.thumbnails(*normalised)


def class_names(config: dict[str, Any], images: ImageSet | None) -> list[str]:
    """Return the names of the classes: those in timm's config, else those of the folders; empty if there are none."""
    names, told = config.get("label_names"), config.get("label_descriptions")
    if not isinstance(names, list | tuple):
        return images.classes if images else []
    return [str(told.get(name, name)) if isinstance(told, dict) else str(name) for name in names]


def fold_problem(
    unfused: nn.Module, batches: Sequence[torch.Tensor], plan: Plan, difference: float, atol: float
) -> str:
    """Say whether the fold or the model's own conditioning is at fault, by folding once more in float64."""
    text = f"fused and unfused differ by {difference:.3g} in a logit, more than `atol` {atol:g}"
    double = copy.deepcopy(unfused).double()
    exact = max_difference(double, fold_norms(double, input_size=plan.input_size), (b.double() for b in batches))
    if exact > atol:
        return f"{text} (in float64 by {exact:.3g})"
    dtype = next(unfused.parameters()).dtype
    if dtype in (torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        return f"{text}; in float64 by {exact:.1g}, so the fold is right but {name} is coarse: convert model.float()"
    return f"{text}; in float64 by {exact:.1g}, so the fold is right but this conversion amplifies rounding errors"
