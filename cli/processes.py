"""Several processes that calibrate together, as torchrun starts them. The first one alone prints and writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    return world_size() == 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Let the processes that torchrun started add up what they measure; alone, do nothing."""
    if world_size() == 1:
        yield
        return
    import torch
    from torch import distributed

    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    # Most sums lie where the model does, a few small ones in main memory.
    distributed.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()
