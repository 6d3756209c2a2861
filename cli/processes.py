"""Several processes that calibrate together, as torchrun starts them; the first one alone prints and writes.

And how a process ends that is told to.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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


class Terminated(BaseException):
    """SIGTERM came. Like KeyboardInterrupt it is no Exception, so that nothing but a clean-up catches it."""

    exit_code = 128 + signal.SIGTERM


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` inside the block, so that unfinished output is removed as after Ctrl-C.

    A handler that a caller has set stays. So does the default one in every process but the first: those write nothing,
    and end at once instead of waiting for the others.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not (in_main_thread and is_first() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL):
        yield
        return
    process = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked process that reads images: it ends as it would without a handler
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # timeout(1) sends two; the second must not stop the clean-up
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
