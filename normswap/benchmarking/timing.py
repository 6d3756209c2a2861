"""How long a step takes, and how far that can be trusted: turns, clocks, medians and their spread.

What is compared is run in turn, A B C A B C, in one process: a machine that slows down or warms up slows all of them.
Each round gives one ratio, which such a drift leaves alone (paired measurements); their median and quartiles are told.
"""

import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

Step = Callable[[], Any]
# Takes a step and how many times to run it; gives the seconds of each.
Clock = Callable[[Step, int], list[float]]

# A turn lasts about as long, so that a switch between programs (some milliseconds) hits few of its steps. On a GPU
# events time the steps, and a turn may be short.
TURN_SECONDS, GPU_TURN_SECONDS = 0.2, 0.05
MOST_STEPS = 200
# As timm's benchmark.py; long steps are warm sooner.
WARM_STEPS, WARM_SECONDS = 10, 1.0


@dataclass(frozen=True)
class Spread:
    """Median, quartiles and extremes of repeated measurements, in the unit of these."""

    median: float
    q25: float
    q75: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Distance between the quartiles: half of the measurements lie within."""
        return self.q75 - self.q25

    def scaled(self, factor: float) -> "Spread":
        """Return the same in another unit."""
        return Spread(*(factor * v for v in (self.median, self.q25, self.q75, self.low, self.high)))


def spread(values: Sequence[float]) -> Spread:
    """Return the spread of at least two measurements."""
    q25, median, q75 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, q25, q75, min(values), max(values))


def speedups(reference: Sequence[float], times: Sequence[float]) -> list[float]:
    """Return, round by round, how many times as fast as the reference: ``reference[i] / times[i]``."""
    return [a / b for a, b in zip(reference, times, strict=True)]


def is_drowned(ratio: Spread, noise: float = 0.0) -> bool:
    """Return whether a ratio's median lies no further from 1 than its quartiles from each other, or than ``noise``."""
    return max(ratio.width, noise) >= abs(ratio.median - 1)


def wall_clock(step: Step, count: int) -> list[float]:
    """Time each of ``count`` steps on the CPU by the clock on the wall."""
    return _host(step, count, time.perf_counter)


def cpu_clock(step: Step, count: int) -> list[float]:
    """Time each step by the CPU time of this process: what other programs take of a shared core does not count."""
    return _host(step, count, time.process_time)


def cuda_clock(device: torch.device) -> Clock:
    """Return a clock of CUDA events on the device's current stream; it waits for the GPU before and after a turn."""

    def turn(step: Step, count: int) -> list[float]:
        with torch.cuda.device(device):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
            torch.cuda.synchronize()
            events[0].record()
            for event in events[1:]:
                step()
                event.record()
            torch.cuda.synchronize()
            return [start.elapsed_time(end) / 1000 for start, end in pairwise(events)]  # milliseconds -> seconds

    return turn


def _host(step: Step, count: int, now: Callable[[], float]) -> list[float]:
    seconds = []
    for _ in range(count):
        start = now()
        step()
        seconds.append(now() - start)
    return seconds


def warm_up(step: Step, clock: Clock) -> float:
    """Run a step until it is warm, and return the seconds it takes then."""
    clock(step, 1)  # compiles, builds, allocates
    seconds = clock(step, 1)
    while len(seconds) < WARM_STEPS and sum(seconds) < WARM_SECONDS:
        seconds += clock(step, 1)
    return statistics.median(seconds)


def steps_per_turn(seconds: float, gpu: bool = False) -> int:
    """Return how many steps of this length make a turn, at least one."""
    turn = GPU_TURN_SECONDS if gpu else TURN_SECONDS
    return min(MOST_STEPS, max(1, round(turn / max(seconds, 1e-9))))


def take_turns(
    steps: Mapping[str, Step],
    clock: Clock,
    rounds: int,
    count: int,
    progress: Callable[[str, int], None] = lambda name, done: None,
) -> dict[str, list[float]]:
    """Run every step ``count`` times in each round, one after the other: A B C A B C.

    Args:
        steps: by name, warm.
        clock: what times them.
        rounds: how many times each has its turn.
        count: steps per turn.
        progress: called with (name, turns done) before each turn.

    Returns:
        By name one number per round: the median seconds of a step of that turn.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    with _no_garbage_collection():
        for i in range(rounds):
            for j, (name, step) in enumerate(steps.items()):
                progress(name, i * len(steps) + j)
                times[name].append(statistics.median(clock(step, count)))
    return times


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_USUAL_MAPS, _USUAL_THRESHOLD = 65536, 32 * 2**20


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Let glibc keep what is freed, as tcmalloc and jemalloc do; yields whether it does so.

    Otherwise it gives large tensors back to the system at moments that depend on the history of the process, and
    taking them again costs page faults: two equal models then differ, always in favour of the same one.
    Does nothing elsewhere, or where MALLOC_* or GLIBC_TUNABLES say what the user wants.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    wanted = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    if mallopt is None or wanted:
        yield False
        return
    kept = bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
    try:
        yield kept
    finally:
        # Where glibc's own rule ends up after large tensors.
        mallopt(_M_MMAP_MAX, _USUAL_MAPS)
        mallopt(_M_MMAP_THRESHOLD, _USUAL_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, 2 * _USUAL_THRESHOLD)
