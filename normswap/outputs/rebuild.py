"""What timm makes of what config.json can record of a model, and the edits after which the weights fit."""

import copy
import json
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.models import get_model_args
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ..errors import ArgumentError, first_line
from ..layers import TokenAffine, TokenBatchNorm, TokenBound
from ..model_utils import eval_mode, find_module, pretrained_cfg
from ..surgery.fold import difference

# They run the one model inside them and do nothing else to an image.
_WRAPPERS = (
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
    AveragedModel,
    ModelEmaV2,
    ModelEmaV3,
)
# A model that timm builds anew rounds as the one it is compared with, or nearly so.
_SAME = 1e-4


def unwrapped(model: Any) -> nn.Module:
    """Return the model inside what only runs it in another way: DataParallel, a moving average, `torch.compile`.

    Compiled modules inside are replaced by what was compiled, in a copy that shares every tensor.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> unwrapped(nn.DataParallel(model)) is model
    True
    """
    model = innermost_model(model)
    modules = list(model.modules())
    if not any(map(_compiled, modules)):
        return model
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for module in reversed(modules):  # the innermost first
        if _compiled(module):
            memo[id(module)] = copy.deepcopy(module._orig_mod, memo)
    return copy.deepcopy(model, memo)


def innermost_model(model: Any) -> nn.Module:
    """Return the model inside what is around a whole model and only runs it in another way."""
    while True:
        if _compiled(model):
            model = model._orig_mod
        elif isinstance(model, ModelEma):
            model = model.ema
        elif isinstance(model, _WRAPPERS):
            model = model.module
        else:
            return model


def _compiled(module: Any) -> bool:
    return isinstance(module, nn.Module) and "_orig_mod" in module._modules


@dataclass(frozen=True)
class Rebuilt:
    """What can be rebuilt of a model.

    Attributes:
        base: what edits are made to, on the meta device: timm's architecture, the model's own if there is a problem.
        problem: why timm cannot; None if it can.
    """

    base: nn.Module
    problem: str | None


def rebuilt(model: nn.Module, shadow: nn.Module, probe: torch.Tensor | None = None) -> Rebuilt:
    """Build a model anew from what config.json can record of it, without memory for weights, and compare.

    Args:
        model: before its conversion.
        shadow: the same on the meta device.
        probe: images `[B, C, H, W]` on which both must answer alike; names and shapes are compared in any case.
    """
    problem = unrecorded(model)
    if problem is not None:
        return Rebuilt(shadow, problem)
    try:
        built = _built(model)
        edits = describe_edits(built, model)
        apply_edits(edited := copy.deepcopy(built), edits)
        problem = first_difference(edited.state_dict(), model.state_dict())
        if problem is None and probe is not None and _answers_otherwise(edited.eval(), model, probe):
            problem = "with the same weights it answers otherwise: an attribute or a layer without weights was changed"
    except Exception as error:  # whatever the architecture's own code runs into
        return Rebuilt(shadow, f"it cannot be built from its recorded arguments: {first_line(error)}")
    if problem is not None:
        return Rebuilt(shadow, f"built from its recorded arguments it is another model: {problem}")
    return Rebuilt(built, None)


def check_rebuilt(name: str, model: nn.Module) -> None:
    """Refuse, before any work, a model whose result could not be loaded by its folder alone.

    Raises:
        ArgumentError: what differs.
    """
    problem = rebuilt(model, model).problem
    if problem is not None:
        hint = "normswap.convert from Python saves it for normswap.load_into"
        raise ArgumentError(f"{name}: {problem}; so no folder could be loaded by its name: {hint}")


def unrecorded(model: nn.Module) -> str | None:
    """Say what config.json cannot record of a model; None if there is no such thing."""
    if not pretrained_cfg(model):
        return f"{type(model).__name__} does not come from timm"
    for name, value in model_arguments(model).items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            return f"config.json cannot hold the model's argument {name}={value!r}"
    return None


def _built(model: nn.Module) -> nn.Module:
    name, arguments = pretrained_cfg(model)["architecture"], model_arguments(model)
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **arguments)
    except (NotImplementedError, RuntimeError):  # an architecture that looks at numbers while it is made
        return timm.create_model(name, pretrained=False, **arguments)


def first_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Name the first tensor in which two state dicts differ in name or shape.

    >>> first_difference({"a": torch.zeros(2)}, {"a": torch.zeros(3)})
    'a is [3] instead of [2]'
    """
    for name, tensor in wanted.items():
        if not isinstance(tensor, torch.Tensor):
            return f"{name} is no tensor"
        if name not in found:
            return f"{name} is not in it"
        if found[name].shape != tensor.shape:
            return f"{name} is {list(tensor.shape)} instead of {list(found[name].shape)}"
    missing = next((name for name in found if name not in wanted), None)
    return None if missing is None else f"{missing} is missing"


def _answers_otherwise(built: nn.Module, model: nn.Module, probe: torch.Tensor) -> bool:
    """Lend a model on the meta device another one's tensors, and compare their answers."""
    built.load_state_dict(model.state_dict(), strict=True, assign=True)
    for name, buffer in model.named_buffers():  # those that no state dict holds
        path, _, attribute = name.rpartition(".")
        owner = find_module(built, path)
        if owner is not None and attribute in owner._buffers:
            owner._buffers[attribute] = buffer
    try:
        with eval_mode(model):
            return not difference(model, built, [probe]).relative <= _SAME
    except (RuntimeError, NotImplementedError):  # tensors outside parameters and buffers stay on the meta device
        return False


def as_recorded(model: nn.Module) -> nn.Module:
    """Return the model with the number of classes that its head has, where a head was put in by hand.

    What is returned shares modules and tensors with ``model``, which stays as it is.
    """
    owner: Any = model
    head = owner.get_classifier() if hasattr(owner, "get_classifier") else None
    if not isinstance(head, nn.Linear) or head.out_features == getattr(model, "num_classes", None):
        return model
    shadow = copy.copy(owner)
    shadow.num_classes = head.out_features
    return shadow


def model_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the arguments with which timm built a model, but for its norms."""
    # norm_layer may be a class, which JSON cannot hold; after the fold it does not matter.
    return {k: v for k, v in get_model_args(as_recorded(model)).items() if k != "norm_layer"}


def describe_edits(original: nn.Module, fused: nn.Module) -> dict[str, Any]:
    """Return what has to be done to timm's architecture so that the fused weights fit, as plain JSON types."""
    edits: dict[str, Any] = {"identity": [], "affine": {}, "keep": {}, "bound": {}, "biases": [], "buffers": []}
    for path, module in original.named_modules():
        now = find_module(fused, path)  # None inside a norm that is gone
        if isinstance(module, nn.LayerNorm):
            if isinstance(now, TokenAffine):
                edits["affine"][path] = {"num_features": now.num_features, "channel_dim": now.channel_dim}
            elif isinstance(now, nn.LayerNorm):
                edits["keep"][path] = {"eps": now.eps}
            else:
                edits["identity"].append(path)
            if isinstance(now, TokenBound | TokenBatchNorm) and now.lower is not None:
                edits["bound"][path] = list(now.lower.shape)
        elif getattr(module, "bias", 0) is None and getattr(now, "bias", None) is not None:
            edits["biases"].append(path)
        for name in sorted(module._non_persistent_buffers_set):
            if now is not None and name in now._buffers and name not in now._non_persistent_buffers_set:
                edits["buffers"].append(f"{path}.{name}")
    return edits


def apply_edits(model: nn.Module, edits: dict[str, Any]) -> None:
    """Do to the architecture, in place, what `describe_edits` found."""
    for path in edits["identity"]:
        model.set_submodule(path, nn.Identity())
    for path, arguments in edits["affine"].items():
        like = model.get_submodule(path).weight
        model.set_submodule(path, TokenAffine(**arguments, **_kind(like)))
    for path in edits.get("bound", ()):  # folders of 0.1 have none; what the bounds are is in a file of their own
        left = model.get_submodule(path)
        if not isinstance(left, nn.Identity | TokenAffine):
            raise KeyError(f"a bound at {path}, where there is a {type(left).__name__}")
        if isinstance(left, nn.Identity):
            model.set_submodule(path, TokenBound())
    for path, arguments in edits["keep"].items():
        model.get_submodule(path).eps = arguments["eps"]
    for path in edits["biases"]:
        layer = model.get_submodule(path)
        if layer.bias is None:
            width = layer.weight.shape[0]
            layer.register_parameter("bias", nn.Parameter(torch.zeros(width, **_kind(layer.weight))))
    for name in edits.get("buffers", ()):  # folders of 0.1 have none
        path, _, attribute = name.rpartition(".")
        model.get_submodule(path)._non_persistent_buffers_set.discard(attribute)


def _kind(like: Any) -> dict[str, Any]:
    """Return device and dtype of a tensor; the defaults where a norm without weights has none."""
    return {} if like is None else {"device": like.device, "dtype": like.dtype}
