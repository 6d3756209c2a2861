"""When, where and with which versions a result was made."""

import os
import platform
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def versions(*more: str) -> dict[str, str]:
    """Return the versions that a result depends on, those of some more packages included."""
    found = {"python": platform.python_version()}
    for package in ("normswap", "torch", "torchvision", "timm", "safetensors", *more):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a source tree that was never installed, or a package of another name
            found[package] = "unknown"
    return found


def machine(device: "torch.device") -> dict[str, str]:
    """Return the date and the machine, as text; names of people and computers are left out.

    Args:
        device: where the model is.
    """
    import torch

    where = str(device)
    if device.type == "cuda":
        where += f" ({torch.cuda.get_device_name(device)})"
    return {
        "created": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        "device": where,
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "platform": f"{platform.system()} {platform.machine()}",
    }
