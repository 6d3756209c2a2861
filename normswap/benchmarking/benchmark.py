"""The original, the fused model and the norm-free bound, timed in turn on each engine."""

import copy
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ambient import known_context
from ..errors import ArgumentError, BenchmarkError, MissingExtraError, one_line
from ..inputs.batches import rebatched
from ..model_utils import resolve_input_size
from ..module_state import check_state, check_weights
from ..progress import Progress, no_progress
from .engines import Runnable, check_engine, denormals_as_zero, prepare, workplace
from .options import CLOCKS, CPU, DEFAULT_ROUNDS, EAGER, ENGINES, FEWEST_ROUNDS, WALL
from .results import VARIANTS, Benchmark, Timing
from .timing import Clock, cpu_clock, cuda_clock, freed_memory_kept, steps_per_turn, take_turns, wall_clock, warm_up
from .variants import differences, norm_free, stand_in


@known_context(own_precision=False)
def benchmark_models(
    original: nn.Module,
    fused: nn.Module | None = None,
    *,
    images: Iterable[Any] | None = None,
    batch_sizes: Sequence[int] = (1,),
    engines: Sequence[str] = (EAGER,),
    optional: Collection[str] = (),
    rounds: int = DEFAULT_ROUNDS,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    clock: str = WALL,
    input_size: tuple[int, int, int] | None = None,
    name: str | None = None,
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: Progress = no_progress,
) -> Benchmark:
    """Time the original, the fused model and the same architecture without norms, one after the other in each round.

    A second copy of the original comes last in each round; its ratio to the first shows the noise. Where the weights
    lie in memory is changed three times on the way.

    A step is one call of a model on one batch of images. Its time is by CUDA events on a GPU. On a CPU as many threads
    as `torch.get_num_threads` says take part, and glibc is told to keep freed memory meanwhile.

    Time can depend on the images: on noise, which no image is like, a converted model's attention may become so
    peaked that its softmax gives denormal numbers, which many CPUs compute with several times slower. So those count
    as zero where the images are random; where they are given, everything is as it will be.

    Args:
        original: with LayerNorm, from timm; stays as it is, as does ``fused``.
        fused: the same converted; default: one is built that has the operators of a converted one, so that its time
            can be known before any image is looked at.
        images: batches `[B, C, H, W]`, or tuples that start with one, of which the first images are used, again and
            again if they are fewer than a batch wants; default: random ones.
        batch_sizes: images per step.
        engines: "eager", "compile" (torch.compile) and "onnxruntime".
        optional: engines that are left out with a note where they cannot run.
        rounds: how often each model has its turn, at least 3.
        device: "cpu" or a CUDA device; default: the original's.
        dtype: of the weights and images; default: the original's.
        amp_dtype: autocast to it.
        channels_last: memory layout of images and convolutions.
        clock: "wall", or "cpu" for the CPU time of one thread, which a shared core does not disturb.
        input_size: (channels, height, width); default: the original's own.
        name: what to call the model.
        alone: gives what is entered while a case is timed, as a lock, so that processes which prepare side by side do
            not time at once. What others do to get ready, compiling and a first step, they still feel.
        progress: called with ("benchmark: what", turns done, turns in all).

    Raises:
        ArgumentError: an invalid argument, or models with outputs of different shapes.
        NoLayerNormError, ModelRefusedError, CalibrationError, FoldError: without ``fused``, see `make_plan` and others.
        BenchmarkError: an engine cannot run a model.
        MissingExtraError: ONNX Runtime is not installed.

    >>> result = benchmark_models(timm.create_model("test_vit").eval(), rounds=3)
    >>> [timing.variant for timing in result.timings]
    ['original', 'fused', 'norm-free', 'original again']
    """
    check_state(original)
    check_weights(original)
    weight = next(original.parameters())
    target = torch.device(device) if device is not None else weight.device
    _check(batch_sizes, engines, rounds, target, clock)
    pixels = None if images is None else next(rebatched(images, max(batch_sizes)), None)
    if images is not None and pixels is None:
        raise ArgumentError("no images to run the models on")
    if pixels is not None:
        channels, height, width = pixels.shape[1:]
        input_size = (channels, height, width)
    size = resolve_input_size(original, input_size)
    place = _Place(target, dtype or weight.dtype, torch.channels_last if channels_last else torch.contiguous_format)
    usable, notes = _usable(engines, optional, place, amp_dtype)
    progress("benchmark: build", 0, 1)
    fused = stand_in(original, pixels) if fused is None else fused
    bound = norm_free(original, fused)
    models = {v: place.model(m) for v, m in zip(VARIANTS, (original, fused, bound, original), strict=True)}
    settings = {
        **place.settings(),
        "amp_dtype": None if amp_dtype is None else str(amp_dtype).removeprefix("torch."),
        "clock": "cuda events" if target.type == "cuda" else clock,
        "rounds": rounds,
        "images": "random" if pixels is None else getattr(images, "description", f"{len(pixels)} images"),
    }
    name = name or type(original).__name__
    result = Benchmark(name, size[-1], settings, differences=differences(fused, bound), notes=notes)
    tick = cuda_clock(target) if target.type == "cuda" else {WALL: wall_clock, CPU: cpu_clock}[clock]
    session = _Session(models, place, amp_dtype, pixels is None, tick, rounds, alone, notes)
    cases = list(itertools.product(usable, batch_sizes))
    turns = rounds * len(models)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), _steady(target), denormals_as_zero() if pixels is None else nullcontext():
        for i, (engine, batch_size) in enumerate(cases):
            batch = torch.randn(batch_size, *size, generator=generator) if pixels is None else pixels
            batch = place.images(batch[torch.arange(batch_size) % len(batch)])
            shown = _Shown(progress, f"{engine}, batch {batch_size}", i * turns, len(cases) * turns)
            try:
                result.timings += session.timings(engine, batch, shown)
            except (BenchmarkError, MissingExtraError) as error:
                if engine not in optional:
                    raise
                notes.append(f"{engine}, batch {batch_size}: not measured: {error}")
    if not result.timings:
        raise BenchmarkError(f"nothing could be measured: {'; '.join(notes)}")
    result.notes = list(dict.fromkeys(notes))
    progress("benchmark: done", len(cases) * turns, len(cases) * turns)
    return result


@dataclass(frozen=True)
class _Place:
    """Where and in which form models and images are: device, dtype and memory layout."""

    device: torch.device
    dtype: torch.dtype
    layout: torch.memory_format

    def model(self, model: nn.Module) -> nn.Module:
        moved = copy.deepcopy(model).to(self.device, self.dtype, memory_format=self.layout)  # type: ignore[call-overload]
        return moved.eval()

    def images(self, batch: torch.Tensor) -> torch.Tensor:
        return batch.to(self.device, self.dtype, memory_format=self.layout)

    def settings(self) -> dict[str, Any]:
        """Return what is recorded of it, and of torch's own settings."""
        return {
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "precision": str(self.dtype).removeprefix("torch."),
            "channels_last": self.layout == torch.channels_last,
            "float32_matmul": torch.get_float32_matmul_precision(),
            "threads": torch.get_num_threads(),
        }


def _usable(
    engines: Iterable[str], optional: Collection[str], place: _Place, amp_dtype: torch.dtype | None
) -> tuple[list[str], list[str]]:
    """Return the engines that can run here, and why the optional ones among the others cannot."""
    usable, notes = [], []
    for engine in engines:
        try:
            check_engine(engine, place.device, place.dtype, amp_dtype)
            usable.append(engine)
        except (BenchmarkError, MissingExtraError) as error:
            if engine not in optional:
                raise
            notes.append(f"{engine}: not measured: {error}")
    return usable, notes


@dataclass(frozen=True)
class _Session:
    """The variants and how they are timed; one case is one engine with one batch.

    Attributes:
        models: by variant.
        place: where they are.
        amp_dtype: autocast to it.
        random: whether the images are random, so that denormal numbers count as zero.
        clock: what times a step.
        rounds: how often each variant has its turn.
        alone: what is entered while a case is timed.
        notes: where to say what is odd.
    """

    models: dict[str, nn.Module]
    place: _Place
    amp_dtype: torch.dtype | None
    random: bool
    clock: Clock
    rounds: int
    alone: Callable[[], AbstractContextManager[Any]]
    notes: list[str]

    def timings(self, engine: str, images: torch.Tensor, shown: "_Shown") -> list[Timing]:
        """Return the timing of every variant on one engine and one batch `[B, C, H, W]`."""
        with workplace(engine) as folder:
            runs = _prepared(self.models, engine, images, folder, (self.amp_dtype, self.random), shown, self.notes)
            with self.alone():
                times, steps = _timed(runs, self.clock, self.rounds, self.place.device, shown)
                peaks = {variant: run.peak_memory() for variant, run in runs.items()}
        counts = {variant: sum(p.numel() for p in model.parameters()) for variant, model in self.models.items()}
        return [Timing(v, engine, len(images), steps, times[v], counts[v], peaks[v]) for v in self.models]


@dataclass(frozen=True)
class _Shown:
    """Progress of one case among all."""

    progress: Progress
    case: str
    before: int
    turns: int

    def __call__(self, variant: str, done: int) -> None:
        self.progress(f"benchmark: {self.case}, {variant}", self.before + done, self.turns)


def _prepared(
    models: dict[str, nn.Module],
    engine: str,
    images: torch.Tensor,
    folder: Path,
    settings: tuple[torch.dtype | None, bool],
    shown: Callable[[str, int], None],
    notes: list[str],
) -> dict[str, Runnable]:
    """Return all variants ready to run on one batch `[B, C, H, W]`, and having run once."""
    runs: dict[str, Runnable] = {}
    shapes = {}
    for variant, model in models.items():
        shown(f"{variant}, getting ready", 0)
        with _told(f"{variant}, {engine}, batch {len(images)}"):
            runs[variant] = prepare(engine, model, images, folder, *settings)
            output = torch.as_tensor(runs[variant].step())  # compiles, builds, allocates
        shapes[variant] = tuple(output.shape)
        if not torch.isfinite(output).all():
            notes.append(f"{variant}: its outputs are not finite; it is timed all the same")
    if len(set(shapes.values())) > 1:
        answers = ", ".join(f"{variant} {list(shape)}" for variant, shape in shapes.items())
        raise ArgumentError(f"outputs of different shapes ({answers}): not the same architecture")
    return runs


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Make one kind of error of whatever an engine runs into: out of memory, no compiler."""
    try:
        yield
    except (BenchmarkError, MissingExtraError):
        raise
    except Exception as error:
        raise BenchmarkError(f"{where}: cannot be run: {type(error).__name__}: {one_line(error)}") from error


def _timed(
    runs: dict[str, Runnable], clock: Clock, rounds: int, device: torch.device, shown: Callable[[str, int], None]
) -> tuple[dict[str, list[float]], int]:
    """Return the seconds per step of each round by variant, and how many steps a turn has."""
    seconds = []
    for variant, run in runs.items():
        shown(f"{variant}, warming up", 0)
        with _told(f"{variant}, warming up"):
            seconds.append(warm_up(run.step, clock))
    steps = steps_per_turn(seconds[0], gpu=device.type == "cuda")
    return _rounds(runs, clock, rounds, steps, shown), steps


def _rounds(
    runs: dict[str, Runnable], clock: Clock, rounds: int, steps: int, shown: Callable[[str, int], None]
) -> dict[str, list[float]]:
    """Take turns, and now and then put all weights elsewhere in memory, each time beginning with another model.

    So the luck of one place is no gain of one model: it becomes part of the spread.
    """
    times: dict[str, list[float]] = {variant: [] for variant in runs}
    names, done = list(runs), 0
    steps_of = {variant: run.step for variant, run in runs.items()}
    for place in range(len(names)):
        count = rounds // len(names) + (place < rounds % len(names))
        if place and count:
            for variant in names[place:] + names[:place]:
                runs[variant].move()
            for run in runs.values():
                run.step()  # touches everything once

        def told(variant: str, turn: int, before: int = done * len(names)) -> None:
            shown(variant, before + turn)

        part = take_turns(steps_of, clock, count, steps, told)
        for variant in names:
            times[variant] += part[variant]
        done += count
    return times


def _check(batch_sizes: Iterable[int], engines: Iterable[str], rounds: int, device: torch.device, clock: str) -> None:
    sizes, names = list(batch_sizes), list(engines)
    if not sizes or min(sizes) < 1:
        raise ArgumentError(f"batch sizes are whole numbers from 1, not {sizes}")
    unknown = [name for name in names if name not in ENGINES]
    if unknown or not names:
        raise ArgumentError(f"engines are {', '.join(ENGINES)}, not {', '.join(unknown) or 'none'}")
    if rounds < FEWEST_ROUNDS:
        raise ArgumentError(f"{rounds} rounds have no spread; at least {FEWEST_ROUNDS}")
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"{device.type}: only cpu and cuda can be timed")
    if clock not in CLOCKS:
        raise ArgumentError(f"`clock` must be one of {', '.join(CLOCKS)}, not {clock!r}")
    if clock == CPU and (device.type != "cpu" or torch.get_num_threads() != 1):
        raise ArgumentError("CPU time measures a model on one thread of a CPU only: set one thread, and `device` cpu")


@contextmanager
def _steady(device: torch.device) -> Iterator[None]:
    """Let the memory and the choice of convolutions settle, as timm's benchmark.py does on a GPU."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = device.type == "cuda" or before
    try:
        with freed_memory_kept() if device.type == "cpu" else nullcontext():
            yield
    finally:
        torch.backends.cudnn.benchmark = before
