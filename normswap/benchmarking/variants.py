"""The models a benchmark compares: the fused one, or one built like it, and the bound that no fold can beat."""

import copy

import timm
import torch
from timm.models import get_model_args
from torch import nn

from ..calibration.calibrate import calibrate
from ..calibration.options import CalibrationOptions
from ..layers import TokenAffine, TokenBound
from ..model_utils import pretrained_cfg
from ..planning.plan import make_plan
from ..surgery.fold import created_biases, fold_norms
from ..surgery.swap import swap_norms

_IMAGES = 4
_NAMED = 3


def stand_in(model: nn.Module, images: torch.Tensor | None = None, bound: str = "tight") -> nn.Module:
    """Return a fused model with the operators that `convert` would leave, set from a few images.

    Its answers mean nothing, but on images like these it takes the time of a real one.

    Args:
        model: a timm model with LayerNorms, in eval mode; stays as it is.
        images: `[B, C, H, W]`; default: random ones.
        bound: "none" for a model without bounds.

    Raises:
        NoLayerNormError, ModelRefusedError: see `make_plan`.
        CalibrationError, FoldError: weights with which the model overflows.
    """
    plan = make_plan(model, input_size=None if images is None else tuple(images.shape[1:]))  # type: ignore[arg-type]
    if images is None:
        images = torch.randn(_IMAGES, *plan.input_size, generator=torch.Generator().manual_seed(0))
    images = images[:_IMAGES].to(next(model.parameters()))
    swapped = swap_norms(model, plan)
    calibrate(swapped, [images], model, CalibrationOptions(method="moments", bound=bound))
    return fold_norms(swapped.eval(), inplace=True, input_size=plan.input_size)


def norm_free(original: nn.Module, fused: nn.Module) -> nn.Module:
    """Return the same architecture with ``norm_layer=torch.nn.Identity``: what no way to remove LayerNorm can beat.

    Where timm does not take that argument, or means other norms by it too, every LayerNorm of a copy becomes an
    Identity. It has the fused model's weights where it has such a weight, so that it computes with numbers of the same
    size; where the fused model has nothing but folded norms its outputs are the same.

    Args:
        original: with LayerNorm.
        fused: the same without.
    """
    bound = _built_without(original) or _stripped(original)
    weight = next(original.parameters())
    bound = bound.to(weight.device, weight.dtype).train(original.training)
    shapes = {name: tensor.shape for name, tensor in bound.state_dict().items()}
    fitting = {name: tensor for name, tensor in fused.state_dict().items() if shapes.get(name) == tensor.shape}
    bound.load_state_dict(fitting, strict=False)
    return bound


def differences(fused: nn.Module, bound: nn.Module) -> list[str]:
    """Return in words what the fused model computes and the norm-free bound does not."""
    affine = [path for path, module in fused.named_modules() if isinstance(module, TokenAffine)]
    bounded = [path for path, m in fused.named_modules() if isinstance(m, TokenBound) and m.lower is not None]
    kept = [path for path, module in fused.named_modules() if isinstance(module, nn.LayerNorm)]
    biases = [n for n in created_biases(bound, fused) if n.rpartition(".")[0] not in kept]
    return [
        f"{len(paths)} {what}: {', '.join(paths[:_NAMED])}{', ...' if len(paths) > _NAMED else ''}"
        for paths, what in (
            (affine, "LayerNorms left a scale and shift"),
            (bounded, "LayerNorms left a bound"),
            (kept, "LayerNorms are kept"),
            (biases, "biases were added by the fold"),
        )
        if paths
    ]


def _stripped(original: nn.Module) -> nn.Module:
    bound = copy.deepcopy(original)
    for path in _layer_norms(bound):
        bound.set_submodule(path, nn.Identity())
    return bound


def _built_without(original: nn.Module) -> nn.Module | None:
    """Return the architecture as timm builds it with ``norm_layer=Identity``; None if that is not the model it was."""
    architecture = pretrained_cfg(original).get("architecture")
    if architecture is None:
        return None
    arguments = {**get_model_args(original), "norm_layer": nn.Identity}
    try:
        bound = timm.create_model(architecture, pretrained=False, **arguments)
    except Exception:  # whatever an architecture does with the weights of a norm that has none
        return None
    inside = tuple(f"{path}." for path in _layer_norms(original))
    wanted = {n: t.shape for n, t in original.state_dict().items() if not n.startswith(inside)}
    found = {n: t.shape for n, t in bound.state_dict().items()}
    return bound if found == wanted and not _layer_norms(bound) else None


def _layer_norms(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
