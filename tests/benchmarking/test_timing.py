"""Clocks, turns and the statistics of a benchmark: what they promise whatever the machine does."""

import gc
import os
import statistics
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normswap.benchmarking.results import AGAIN, BOUND, FUSED, ORIGINAL, Benchmark, Timing
from normswap.benchmarking.timing import (
    GPU_TURN_SECONDS,
    MOST_STEPS,
    TURN_SECONDS,
    cpu_clock,
    cuda_clock,
    is_drowned,
    speedups,
    spread,
    steps_per_turn,
    take_turns,
    wall_clock,
    warm_up,
)

# Products and quotients of floats: a few roundings of 1e-16.
ROUNDING = 1e-12

seconds = st.floats(1e-6, 1e3)
several = st.lists(seconds, min_size=2, max_size=30)


@given(drift=several, a=seconds, b=seconds)
def test_pairing_removes_what_slows_both(drift, a, b):
    """However the machine slows down, if it does so for both then each round's ratio is that of the models."""
    ratio = spread(speedups([d * a for d in drift], [d * b for d in drift]))
    assert ratio.median == pytest.approx(a / b, rel=ROUNDING)
    assert ratio.width <= ROUNDING * a / b
    if max(drift) > 2 * min(drift):  # the times alone are all over the place
        times = spread([d * a for d in drift])
        assert times.high > 1.9 * times.low


def test_unpaired_times_would_not_show_a_small_gain():
    """A drift of half the speed over the run hides 3 % in the times, and not in the ratios."""
    drift = [1 + i / 20 for i in range(21)]
    original, fused = [1.03 * d for d in drift], drift
    assert spread(fused).width > 0.03 * spread(fused).median
    assert not is_drowned(spread(speedups(original, fused)))


@given(values=several)
def test_spread_is_of_the_values_in_any_order(values):
    found = spread(values)
    assert found.low <= found.q25 <= found.median <= found.q75 <= found.high
    assert (found.low, found.high) == (min(values), max(values))
    assert found.median == pytest.approx(statistics.median(values), rel=ROUNDING)
    assert spread(values[::-1]) == found
    outside = sum(v < found.q25 for v in values), sum(v > found.q75 for v in values)
    assert max(outside) <= len(values) / 4 + 1


@given(reference=several, factor=seconds)
def test_twice_the_time_is_half_the_speed(reference, factor):
    times = [factor * s for s in reference]
    assert spread(speedups(reference, times)).median == pytest.approx(1 / factor, rel=ROUNDING)
    assert spread(speedups(times, reference)).median == pytest.approx(factor, rel=ROUNDING)


def _benchmark(**seconds: list[float]) -> Benchmark:
    """Return a record with these seconds per round for original, fused, bound and a second copy of the original."""
    names = {"original": ORIGINAL, "fused": FUSED, "bound": BOUND, "again": AGAIN}
    timings = [Timing(names[name], "eager", 2, 1, s, 10, None) for name, s in seconds.items()]
    return Benchmark("m", 32, {"rounds": len(seconds["original"])}, timings)


def _jitter(time: float, width: float) -> list[float]:
    """Return times whose ratios to 1 have quartiles about ``width`` apart."""
    return [time / (1 + width * (i - 5) / 5) for i in range(11)]


@given(gain=st.floats(-0.3, 0.5), width=st.floats(0.001, 0.4))
def test_a_spread_wider_than_the_gain_warns(gain, width):
    calm = [1.0] * 11
    fused = _jitter(1 / (1 + gain), width / (1 + gain))
    result = _benchmark(original=calm, fused=fused, bound=fused, again=calm)
    ratio = result.ratio("eager", 2)
    assert ratio.median == pytest.approx(1 + gain, rel=ROUNDING)
    assert ratio.width == pytest.approx(width, rel=1e-6)
    if abs(abs(gain) - width) > 1e-6:
        assert ("WARNING" in result.lines()[1]) == (width > abs(gain))
    assert ("slower than the original" in result.lines()[1]) == (ratio.q75 < 1)
    assert "within noise of the norm-free bound" in result.lines()[1]


def test_a_gain_within_the_noise_of_two_copies_warns():
    calm = [1.0] * 5
    sure = _benchmark(original=calm, fused=[0.95] * 5, bound=[0.95] * 5, again=[0.99] * 5)
    assert "WARNING" not in sure.lines()[1]
    assert "fused +5.3 %" in sure.lines()[1]
    unsure = _benchmark(original=calm, fused=[0.95] * 5, bound=[0.95] * 5, again=[0.93] * 5)
    assert "WARNING" in unsure.lines()[1]


def test_a_fused_model_behind_the_bound_is_named():
    calm = [1.0] * 5
    result = _benchmark(original=calm, fused=[0.96] * 5, bound=[0.9] * 5, again=calm)
    assert "behind the norm-free bound" in result.lines()[1]
    assert result.is_slower("eager", 2, BOUND)
    assert not result.is_slower("eager", 2)


def test_turns_are_taken_one_after_the_other():
    ran, told = [], []
    steps = {name: lambda name=name: ran.append(name) for name in "ABC"}
    times = take_turns(steps, wall_clock, rounds=3, count=2, progress=lambda name, done: told.append((name, done)))
    assert "".join(ran) == "AABBCC" * 3
    assert {name: len(t) for name, t in times.items()} == {"A": 3, "B": 3, "C": 3}
    assert told == [(name, i) for i, name in enumerate("ABC" * 3)]


def test_a_turn_is_the_median_of_its_steps():
    """One step that was interrupted does not count."""
    times = take_turns({"A": lambda: None}, lambda step, count: [0.1] * (count - 1) + [9.0], rounds=2, count=5)
    assert times == {"A": [0.1, 0.1]}


def test_garbage_is_not_collected_during_turns_and_is_afterwards():
    inside = []

    def step() -> None:
        inside.append(gc.isenabled())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        take_turns({"A": step}, wall_clock, rounds=1, count=1)
    assert inside == [False]
    assert gc.isenabled()


@given(seconds)
def test_a_turn_has_a_step_and_not_too_many(step):
    for gpu, turn in ((False, TURN_SECONDS), (True, GPU_TURN_SECONDS)):
        count = steps_per_turn(step, gpu)
        assert 1 <= count <= MOST_STEPS
        if 1 < count < MOST_STEPS:
            assert count * step == pytest.approx(turn, abs=step / 2 * (1 + ROUNDING))


def test_warming_up_forgets_the_first_step():
    later = iter([60.0, *[0.2] * 20])
    assert warm_up(lambda: None, lambda step, count: [next(later) for _ in range(count)]) == 0.2


def test_waiting_is_wall_time_and_not_cpu_time():
    assert min(wall_clock(lambda: time.sleep(0.02), 3)) >= 0.02
    assert max(cpu_clock(lambda: time.sleep(0.02), 3)) < 0.01


# Run in a process of its own: what earlier tests have freed is a heap in which 48 MiB may lie ready.
FAULTS = """
import os, resource
import torch
from normswap.benchmarking.timing import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 * 2**18)  # 48 MiB, more than glibc ever keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = min(faults() for _ in range(8))
with freed_memory_kept() as kept:
    # It settles after a few times, when small things have found their place; one that lands in the gap moves it again.
    settled = min(faults() for _ in range(8))
os.environ["MALLOC_TRIM_THRESHOLD_"] = "1"
with freed_memory_kept() as asked_otherwise:
    pass  # the user has said what is wanted
print(int(kept), usual, settled, int(asked_otherwise))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept_and_not_faulted_in_again():
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    kept, usual, settled, asked_otherwise = map(int, done.stdout.split())
    assert not asked_otherwise
    assert usual > 10_000
    if not kept:
        pytest.skip("another allocator")
    assert settled < 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_events_time_the_gpu_and_not_the_launch():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    times = cuda_clock(device)(lambda: a @ a, 10)
    assert len(times) == 10
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ a
    torch.cuda.synchronize()
    assert 0.3 < sum(times) / (time.perf_counter() - start) < 3
