"""Put a BatchNorm where the plan says, with everything the LayerNorm had, and one between the FFN's linear layers."""

import copy

import torch
from torch import nn

from ..ambient import known_context, thaw
from ..errors import ArgumentError
from ..layers import TokenBatchNorm, TokenBatchNorm2d, attach_norm
from ..model_utils import find_module
from ..module_state import check_state
from ..planning.options import FFN_BN, FfnBn
from ..planning.plan import Plan, make_plan


@known_context()
def swap_norms(
    model: nn.Module, plan: Plan | None = None, ffn_bn: FfnBn = "pre-act", inplace: bool = False
) -> nn.Module:
    """Return the model with BatchNorm in place of each LayerNorm that the plan does not keep.

    Weight, bias, eps, dtype, device, ``requires_grad`` and training flag are the LayerNorm's. The statistics
    start at mean 0 and variance 1: call `normswap.calibrate` next. The FFN BatchNorms start as an exact identity
    in eval mode.

    Args:
        model: the pretrained model.
        plan: from `make_plan`; made here if absent.
        ffn_bn: "pre-act" (between the first linear layer and the activation, folds into that layer), "post-act"
            (timm's own norm slot, folds into the last layer) or "none".
        inplace: change ``model`` itself instead of a deep copy.

    Raises:
        ArgumentError: unknown ``ffn_bn``, or a plan of another model.
        NoLayerNormError, ModelRefusedError: from `make_plan`.

    >>> swapped = swap_norms(timm.create_model("test_vit"))
    >>> type(swapped.norm).__name__, type(swapped.blocks[0].mlp.fc1).__name__
    ('TokenBatchNorm', 'NormedLinear')
    """
    if ffn_bn not in FFN_BN:
        raise ArgumentError(f"`ffn_bn` must be one of {', '.join(FFN_BN)}, not {ffn_bn!r}")
    check_state(model)
    plan = plan or make_plan(model)
    for site in plan.swapped_sites:
        if not isinstance(find_module(model, site.path), nn.LayerNorm):
            raise ArgumentError(f"the plan is of another model: {site.path} is no LayerNorm in {type(model).__name__}")
    if inplace:
        thaw(model)
    else:
        model = copy.deepcopy(model)
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    for site in plan.swapped_sites:
        norm = model.get_submodule(site.path)
        model.set_submodule(site.path, _batch_norm(norm, site.num_features, site.channel_dim, weight))  # type: ignore
    for ffn in plan.ffns:
        for path in ffn.positions(ffn_bn):
            _insert(model, path, ffn.slot)
    return model


def batch_norms(model: nn.Module) -> dict[str, TokenBatchNorm]:
    """Return every BatchNorm that `swap_norms` put in and `fold_norms` has not taken out, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, TokenBatchNorm)}


def _batch_norm(norm: nn.LayerNorm, num_features: int, channel_dim: int, like: torch.Tensor | None) -> TokenBatchNorm:
    kind = TokenBatchNorm if channel_dim == -1 else TokenBatchNorm2d
    # A LayerNorm without affine part has no tensor of its own that would tell device and dtype.
    batch_norm = _new(kind, num_features, norm.eps, like if norm.weight is None else norm.weight, norm.training)
    with torch.no_grad():
        for name in ("weight", "bias"):
            source, copied = getattr(norm, name), getattr(batch_norm, name)
            if source is not None:  # a LayerNorm without affine part has weight 1 and bias 0, as a fresh BatchNorm
                copied.copy_(source)
                copied.requires_grad_(source.requires_grad)
    return batch_norm


def _insert(model: nn.Module, path: str, slot: str | None) -> None:
    """Put an identity BatchNorm into the FFN's slot, or on the output of the layer at ``path``."""
    layer = model.get_submodule(path if path != slot else f"{path.rpartition('.')[0]}.fc2")
    weight = layer.get_parameter("weight")
    width = weight.shape[0] if path != slot else weight.shape[1]
    kind = TokenBatchNorm if isinstance(layer, nn.Linear) else TokenBatchNorm2d
    norm = _new(kind, width, 1e-5, weight, layer.training)
    norm.set_identity()
    model.set_submodule(path, norm if path == slot else attach_norm(layer, norm))  # type: ignore[arg-type]


def _new(
    kind: type[TokenBatchNorm], num_features: int, eps: float, like: torch.Tensor | None, training: bool
) -> TokenBatchNorm:
    device, dtype = (None, None) if like is None else (like.device, like.dtype)
    return kind(num_features, eps=eps, device=device, dtype=dtype).train(training)
