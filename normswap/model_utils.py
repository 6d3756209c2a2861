"""What timm and `nn.Module` do not say by themselves: size, config, ties, a copy without weights, eval mode."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from timm.models import get_model_input_config
from torch import nn

from .errors import ArgumentError, ModelRefusedError


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return half-precision values as float32 and others as they are, since half-precision sums are useless."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def find_tensor(model: nn.Module, name: str) -> torch.Tensor | None:
    """Return the parameter or buffer of that dotted name; None where the module has the attribute, but no tensor in it.

    >>> find_tensor(nn.Sequential(nn.Linear(2, 3, bias=False)), "0.bias") is None
    True
    """
    path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Return, for each parameter or buffer that shares its memory with others, their names."""
    names: dict[int, list[str]] = {}
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    for name, tensor in (*parameters, *buffers):
        # Without memory (the meta device) there is only the object itself to go by.
        names.setdefault(tensor.data_ptr() or id(tensor), []).append(name)
    return {name: [n for n in group if n != name] for group in names.values() for name in group if len(group) > 1}


def meta_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy on the meta device: the structure and the ties, no memory for weights."""
    memo: dict[int, object] = {}
    for module in model.modules():
        tensors = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and id(tensor) not in memo:
                meta = torch.empty_like(tensor, device="meta")
                is_parameter = isinstance(tensor, nn.Parameter)
                memo[id(tensor)] = nn.Parameter(meta, tensor.requires_grad) if is_parameter else meta
    return copy.deepcopy(model, memo)


def find_module(model: nn.Module, path: str) -> nn.Module | None:
    """Return the module at ``path``, None if there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def has_classes(model: nn.Module) -> bool:
    """Return whether a timm model answers with logits; headless ones, built with num_classes=0, give features."""
    return getattr(model, "num_classes", 1) != 0


def single_output(output: Any, name: str, count: int) -> torch.Tensor:
    """Return what a model answers for ``count`` images: logits `[B, K]` or features `[B, ...]`.

    Raises:
        ModelRefusedError: it is not one tensor with a row for each image.
    """
    if not isinstance(output, torch.Tensor):
        keys = f" ({', '.join(map(str, output))})" if isinstance(output, Mapping) else ""
        raise ModelRefusedError(
            f"{name} answers with a {type(output).__name__}{keys}, not with one tensor [B, K]: wrap it in a module "
            "whose forward returns the logits alone"
        )
    if output.ndim < 2 or len(output) != count:
        raise ModelRefusedError(f"{name} answers {count} images with a tensor {list(output.shape)}, not with [B, K]")
    return output


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Return timm's record of where the model comes from; empty for a model that timm did not build."""
    return getattr(model, "pretrained_cfg", None) or {}


def resolve_input_size(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> tuple[int, int, int]:
    """Return the model's input size (channels, height, width), as timm records it.

    Raises:
        ArgumentError: the model does not come from timm and no size was given.
    """
    if input_size is not None:
        return input_size
    if not pretrained_cfg(model):
        raise ArgumentError(f"{type(model).__name__} carries no timm config: pass input_size=(channels, height, width)")
    return tuple(get_model_input_config(model)["input_size"])


def example_batch(model: nn.Module, size: tuple[int, int, int], batch_size: int = 2) -> torch.Tensor:
    """Return zeros `[B, C, H, W]` in the device and dtype of the model's weights."""
    weight = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.zeros(batch_size, *size, device=weight.device, dtype=weight.dtype)


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Switch whole models to eval (dropout and drop path off) and give every module its flag back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
