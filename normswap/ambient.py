"""The torch context in which results are made: the same whatever the caller has switched on around the call."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

# What autocast can be on for; "cpu" and "cuda" it knows everywhere.
_DEVICES = ("cpu", "cuda", "mps", "xpu", "hpu", "mtia")


@contextmanager
def known_context(own_precision: bool = True) -> Iterator[None]:
    """Run with torch's defaults, and give the caller everything back: also a decorator, for every long entry point.

    Off are inference mode, autocast and other default dtypes and devices; gradients are recorded unless the work itself
    says otherwise. Where the caller wants deterministic algorithms they are used as far as there are any, and where
    there is none the run goes on. How many threads take part stays the caller's choice: that is a matter of the
    machine, and moves results by rounding errors only.

    Args:
        own_precision: float32 matrix products are exact, whatever `torch.set_float32_matmul_precision` says; False to
            leave that as the caller has set it, as a benchmark must.

    >>> with torch.inference_mode(), torch.autocast("cpu"):
    ...     with known_context():
    ...         inside = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
    ...     torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), inside
    (True, True, (False, False, True))
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
        if torch.are_deterministic_algorithms_enabled() and not warns_only:
            stack.callback(torch.use_deterministic_algorithms, True)
            torch.use_deterministic_algorithms(True, warn_only=True)
        if own_precision and torch.get_float32_matmul_precision() != "highest":
            stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        yield


def thaw(model: nn.Module) -> None:
    """Replace, in place, tensors that were made in inference mode: no gradient passes them, and nothing may set them.

    >>> with torch.inference_mode():
    ...     layer = nn.Linear(2, 2)
    >>> thaw(layer)
    >>> layer.weight.is_inference(), layer.weight.requires_grad
    (False, True)
    """
    thawed: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in model.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in registries:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_inference():
                    if id(tensor) not in thawed:
                        thawed[id(tensor)] = copy.deepcopy(tensor)
                    tensors[name] = thawed[id(tensor)]


def thawed(model: nn.Module) -> nn.Module:
    """Return the model itself, or a copy if it was made in inference mode."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model) if any(tensor.is_inference() for tensor in tensors) else model
