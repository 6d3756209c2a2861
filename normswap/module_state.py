"""State of modules that a conversion has to know of: what it cannot carry is refused by name, the rest carried."""

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .errors import ModelRefusedError, first_line
from .model_utils import find_module, meta_copy, widened

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_HALF = (torch.float16, torch.bfloat16)


def check_state(model: nn.Module) -> None:
    """Refuse a model whose weights are made by something else in each call, or that cannot be copied.

    Raises:
        ModelRefusedError: names the module and the attribute, and says what to do.

    >>> from torch.nn.utils import prune
    >>> pruned = nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5))
    >>> check_state(pruned)
    Traceback (most recent call last):
        ...
    normswap.errors.ModelRefusedError: 0.weight is pruned by a mask that is still live: make its zeros permanent ...
    """
    for path, module in model.named_modules():
        problem = _made_weight(path, module) or _history(path, module)
        if problem is not None:
            raise ModelRefusedError(problem)
    try:
        meta_copy(model)
    except Exception as error:  # whatever an attribute's own copying raises
        raise ModelRefusedError(_uncopyable(model, error)) from error


def check_weights(*models: nn.Module) -> None:
    """Refuse models whose weights are not there.

    Raises:
        ModelRefusedError: names one that is on the meta device.
    """
    for model in models:
        for name, tensor in _named_tensors(model):
            if tensor.is_meta:
                raise ModelRefusedError(
                    f"{name} is on the meta device, it has a shape and no numbers: load the weights"
                )


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _made_weight(path: str, module: nn.Module) -> str | None:
    """Say which tensor of a module is computed from others whenever the module is called; None if there is none."""
    if parametrize.is_parametrized(module):
        name, kinds = next(iter(module.parametrizations.items()))  # type: ignore[union-attr,operator]
        return (
            f"{_joined(path, name)} is parametrized ({', '.join(type(kind).__name__ for kind in kinds)}): make it "
            f"plain first, with torch.nn.utils.parametrize.remove_parametrizations(module, {name!r})"
        )
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            return (
                f"{_joined(path, hook._tensor_name)} is pruned by a mask that is still live: make its zeros permanent "
                f"first, with torch.nn.utils.prune.remove(module, {hook._tensor_name!r})"
            )
        if isinstance(hook, WeightNorm | SpectralNorm):
            kind = "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
            return (
                f"{_joined(path, hook.name)} is computed by {kind} in each call: make it plain first, with "
                f"torch.nn.utils.remove_{kind}(module, {hook.name!r})"
            )
    for name, parameter in module._parameters.items():
        if parameter is not None and nn.parameter.is_lazy(parameter):
            return f"{_joined(path, name)} has no shape yet: run the model once first"
        if parameter is None and isinstance(vars(module).get(name), torch.Tensor):
            return f"{_joined(path, name)} is a plain tensor where a parameter should be: make it an nn.Parameter"
    return None


def _history(path: str, module: nn.Module) -> str | None:
    """Say which attribute holds a tensor that carries its gradient history, which cannot be copied."""
    attributes = {name: value for name, value in vars(module).items() if name not in ("_modules", "_parameters")}
    for name, value in {**attributes, **module._buffers}.items():
        if any(tensor.grad_fn is not None for tensor in _tensors(value)):
            where = _joined(path, "a buffer" if name == "_buffers" else name)
            return f"{where} holds a tensor with its gradient history, which cannot be copied: detach or drop it first"
    return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple | set):
        for part in value:
            yield from _tensors(part)


def _uncopyable(model: nn.Module, error: Exception) -> str:
    """Say which attribute of which module cannot be copied."""
    known: dict[int, Any] = {id(module): module for module in model.modules()}
    for module in model.modules():
        known.update((id(t), t) for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in _REGISTRIES:
                continue
            try:
                copy.deepcopy(value, dict(known))
            except Exception as why:
                return (
                    f"{_joined(path, name)} cannot be copied ({type(value).__name__}: {first_line(why)}): "
                    "drop it before the conversion"
                )
    return f"{type(model).__name__} cannot be copied ({type(error).__name__}: {first_line(error)})"


def in_float32(model: nn.Module) -> nn.Module:
    """Return the model itself, or where some of it is in half precision a copy in float32, which loses nothing.

    >>> in_float32(nn.Linear(2, 2, dtype=torch.bfloat16)).weight.dtype
    torch.float32
    """
    if not _has_half(model):
        return model
    copied = copy.deepcopy(model)
    _cast(copied, lambda _, tensor: widened(tensor))
    return copied


def as_given(converted: nn.Module, given: nn.Module) -> nn.Module:
    """Return a converted model with the training flag of each module and the dtypes of the model it came from.

    Where some of that is in half precision the result is a copy, else it is ``converted`` itself. Numbers that are too
    large for it are said in a warning, and everything stays in float32.
    """
    if _has_half(given):
        converted = copy.deepcopy(converted)
        dtypes = _dtypes(converted, given)
        large = [name for name, tensor in _named_tensors(converted) if _overflows(tensor, dtypes[name])]
        if large:
            kind = str(dtypes[large[0]]).removeprefix("torch.")
            warnings.warn(f"{large[0]} has numbers too large for {kind}: the result stays in float32", stacklevel=2)
        else:
            _cast(converted, lambda name, tensor: tensor.to(dtypes[name]))
    for path, module in converted.named_modules():
        known = find_module(given, path)
        while known is None:  # new: it goes with what it is in
            path = path.rpartition(".")[0]
            known = find_module(given, path)
        module.training = known.training
    return converted


def _dtypes(converted: nn.Module, given: nn.Module) -> dict[str, torch.dtype]:
    """Return the dtype that each tensor of a converted model had before; of a new one, that of the weight beside it."""
    before = {name: tensor.dtype for name, tensor in _named_tensors(given)}
    fallback = next(tensor.dtype for tensor in given.parameters() if tensor.is_floating_point())
    found = {}
    for name, tensor in _named_tensors(converted):
        beside = before.get(_joined(name.rpartition(".")[0], "weight"), fallback)
        found[name] = before.get(name, beside if tensor.is_floating_point() else tensor.dtype)
    return found


def _overflows(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    return bool((torch.isfinite(tensor) & ~torch.isfinite(tensor.to(dtype))).any())


def _named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _has_half(model: nn.Module) -> bool:
    return any(tensor.dtype in _HALF for _, tensor in _named_tensors(model))


def _cast(model: nn.Module, cast: Any) -> None:
    """Give every parameter and buffer what ``cast`` returns for its name and itself, ties as they are."""
    with torch.no_grad():
        for name, tensor in _named_tensors(model):
            tensor.data = cast(name, tensor.data)
