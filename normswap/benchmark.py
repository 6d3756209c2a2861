"""Speed: the original, the fused model and the norm-free bound, in turn, with the spread of what was measured."""

import copy
import csv
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from .calibrate import Progress, no_progress
from .engines import COMPILE, EAGER, ONNXRUNTIME, Runnable, fresh_engine, prepare
from .errors import ArgumentError, BenchmarkError, MissingExtraError, OutputError
from .graph import resolve_input_size
from .report import number, table, versions
from .timing import (
    Clock,
    Spread,
    cpu_clock,
    cuda_clock,
    freed_memory_kept,
    is_drowned,
    speedups,
    spread,
    steps_per_turn,
    take_turns,
    wall_clock,
    warm_up,
)
from .variants import differences, norm_free, stand_in

ENGINES = (EAGER, COMPILE, ONNXRUNTIME)
ORIGINAL, FUSED, BOUND = VARIANTS = ("original", "fused", "norm-free")
DEFAULT_ROUNDS = 25
_FEWEST_ROUNDS = 3
_MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """One model on one engine with one batch size.

    Attributes:
        variant: "original", "fused" or "norm-free".
        engine: "eager", "compile" or "onnxruntime".
        batch_size: images per step.
        steps: per turn.
        seconds: of a step, one number per round.
        param_count: how many parameters it has.
        peak_memory: bytes of weights and activations at most; None where nothing tells.
    """

    variant: str
    engine: str
    batch_size: int
    steps: int
    seconds: list[float]
    param_count: int
    peak_memory: int | None


@dataclass
class Benchmark:
    """What `benchmark_models` found out.

    Attributes:
        model: its name.
        img_size: height and width in pixels.
        settings: device, precision, layout, threads, clock, rounds.
        timings: of every variant, engine and batch size.
        differences: what the fused model still computes and the norm-free bound does not.
        notes: what could not be measured and why, and what is odd.
        versions: of what it ran on.
    """

    model: str
    img_size: int
    settings: dict[str, Any]
    timings: list[Timing] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=versions)

    def timing(self, engine: str, batch_size: int, variant: str) -> Timing:
        """Return one of the timings."""
        return next(t for t in self.timings if (t.engine, t.batch_size, t.variant) == (engine, batch_size, variant))

    def cases(self) -> list[tuple[str, int]]:
        """Return every (engine, batch size) that was measured, in order."""
        return list(dict.fromkeys((t.engine, t.batch_size) for t in self.timings))

    def ratio(self, engine: str, batch_size: int, variant: str = FUSED, reference: str = ORIGINAL) -> Spread:
        """Return how many times as fast as the reference a variant is: each round gives one ratio."""
        return spread(
            speedups(*(self.timing(engine, batch_size, name).seconds for name in (reference, variant))),
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat record per timing; columns that timm's benchmark.py has are named as there.

        Times in milliseconds, memory in MiB, parameters in millions. ``ratio`` is images/s over the original's,
        ``ratio_to_bound`` over the norm-free bound's; ``_q25`` and ``_q75`` are quartiles over the rounds.
        """
        return [self._row(t) for t in self.timings]

    def _row(self, timing: Timing) -> dict[str, Any]:
        step = spread(timing.seconds)
        row = {
            "model": self.model,
            "variant": timing.variant,
            "engine": timing.engine,
            "infer_samples_per_sec": round(timing.batch_size / step.median, 2),
            "infer_step_time": round(1000 * step.median, 3),
            "infer_batch_size": timing.batch_size,
            "infer_img_size": self.img_size,
            "param_count": round(timing.param_count / 1e6, 2),
            "infer_step_time_q25": round(1000 * step.q25, 3),
            "infer_step_time_q75": round(1000 * step.q75, 3),
        }
        for name, reference in (("ratio", ORIGINAL), ("ratio_to_bound", BOUND)):
            wanted = timing.variant not in (ORIGINAL, reference)
            of = self.ratio(timing.engine, timing.batch_size, timing.variant, reference) if wanted else None
            for part, value in (("", "median"), ("_q25", "q25"), ("_q75", "q75"), ("_min", "low"), ("_max", "high")):
                row[name + part] = None if of is None else round(getattr(of, value), 4)
        memory = timing.peak_memory
        row["infer_peak_memory"] = None if memory is None else round(memory / _MIB, 1)
        return {**row, "infer_steps": timing.steps, **self.settings}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types: what ``--json`` prints; every round's step times are in milliseconds."""
        rounds = [[round(1000 * s, 4) for s in t.seconds] for t in self.timings]
        results = [{**row, "infer_step_times": ms} for row, ms in zip(self.rows(), rounds, strict=True)]
        names = ("model", "img_size", "settings", "differences", "notes", "versions")
        whole = asdict(self)
        return {**{name: whole[name] for name in names}, "results": results}

    def write_csv(self, path: str | Path) -> None:
        """Write `rows` as a CSV file, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        path, rows = Path(path), self.rows()
        beside = path.with_name(f".{path.name}.normswap-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
            os.replace(beside, path)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error
        finally:
            beside.unlink(missing_ok=True)

    def table(self) -> Table:
        """Return the timings as a table."""
        numbers = ["batch", "ms/step", "images/s", "ratio", "quartiles", "to bound", "quartiles ", "peak MiB"]
        rows = []
        for row in self.rows():
            shown = [number(row["infer_step_time"]), number(row["infer_samples_per_sec"])]
            for name in ("ratio", "ratio_to_bound"):
                low, high = number(row[f"{name}_q25"], 3), number(row[f"{name}_q75"], 3)
                shown += [number(row[name], 3), "-" if row[name] is None else f"{low} to {high}"]
            cells = [row["engine"], str(row["infer_batch_size"]), row["variant"], *shown]
            rows.append([*cells, number(row["infer_peak_memory"], 1)])
        return table(["engine", "batch", "variant", *numbers[1:]], rows, right=numbers)

    def lines(self) -> list[str]:
        """Return what the ratios mean, what they say for each case, and how far the spread allows to say so."""
        lines = [
            f"ratio is images/s over the original's in the same round: median and quartiles of "
            f"{self.settings['rounds']} rounds; 1.05 is 5 % more images per second"
        ]
        lines += [f"{engine}, batch {batch_size}: {self._finding(engine, batch_size)}" for engine, batch_size in self.cases()]
        lines += [f"not in the norm-free bound: {difference}" for difference in self.differences]
        return lines + self.notes

    def _finding(self, engine: str, batch_size: int) -> str:
        gain, bound = self.ratio(engine, batch_size), self.ratio(engine, batch_size, FUSED, BOUND)
        text = f"fused {_percent(gain.median)} % ({_percent(gain.q25)} to {_percent(gain.q75)})"
        if gain.q75 < 1:
            text += ", slower than the original"
        if is_drowned(gain):
            points = 100 * gain.width
            text += f"; WARNING: the spread of {points:.1f} points is wider than that: more --rounds, a quieter machine"
        if bound.q75 < 1:
            return f"{text}; behind the norm-free bound by {-100 * (bound.median - 1):.1f} %"
        return f"{text}; within the spread of the norm-free bound"


def benchmark_models(
    original: nn.Module,
    fused: nn.Module | None = None,
    *,
    batch_sizes: Sequence[int] = (1,),
    engines: Sequence[str] = (EAGER,),
    optional: Collection[str] = (),
    rounds: int = DEFAULT_ROUNDS,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    amp_dtype: torch.dtype | None = None,
    channels_last: bool = False,
    clock: str = "wall",
    input_size: tuple[int, int, int] | None = None,
    name: str | None = None,
    progress: Progress = no_progress,
) -> Benchmark:
    """Time the original, the fused model and the same architecture without norms, one after the other in each round.

    A step is one call of a model on one batch of random images. Its time is by CUDA events on a GPU. On a CPU as many
    threads as `torch.get_num_threads` says take part, and glibc is told to keep freed memory meanwhile.

    Args:
        original: with LayerNorm, from timm; stays as it is, as does ``fused``.
        fused: the same converted; default: one is built that has the operators of a converted one, so that its time
            can be known before any image is looked at.
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
        progress: called with ("benchmark: what", turns done, turns in all).

    Raises:
        ArgumentError: an argument that cannot be meant, or models that answer in different shapes.
        NoLayerNormError, ModelRefusedError, CalibrationError, FoldError: without ``fused``, see `make_plan` and others.
        BenchmarkError: an engine cannot run a model.
        MissingExtraError: ONNX Runtime is not installed.
    """
    weight = next(original.parameters())
    target = torch.device(device) if device is not None else weight.device
    _check(batch_sizes, engines, rounds, target, clock)
    size = resolve_input_size(original, input_size)
    precision = dtype or weight.dtype
    layout = torch.channels_last if channels_last else torch.contiguous_format
    progress("benchmark: build", 0, 1)
    fused = stand_in(original) if fused is None else fused
    bound = norm_free(original, fused)
    models = {
        variant: copy.deepcopy(model).to(target, precision, memory_format=layout).eval()  # type: ignore[call-overload]
        for variant, model in zip(VARIANTS, (original, fused, bound), strict=True)
    }
    result = Benchmark(
        model=name or type(original).__name__,
        img_size=size[-1],
        settings={
            "device": _device_name(target),
            "precision": str(precision).removeprefix("torch."),
            "amp_dtype": None if amp_dtype is None else str(amp_dtype).removeprefix("torch."),
            "channels_last": channels_last,
            "float32_matmul": torch.get_float32_matmul_precision(),
            "threads": torch.get_num_threads(),
            "clock": "cuda events" if target.type == "cuda" else clock,
            "rounds": rounds,
        },
        differences=differences(fused, bound),
    )
    tick = cuda_clock(target) if target.type == "cuda" else {"wall": wall_clock, "cpu": cpu_clock}[clock]
    turns = len(engines) * len(batch_sizes) * rounds * len(models)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), _steady(target):
        for i, engine in enumerate(engines):
            for j, batch_size in enumerate(batch_sizes):
                images = torch.randn(batch_size, *size, generator=generator)
                images = images.to(target, precision, memory_format=layout)
                before = (i * len(batch_sizes) + j) * rounds * len(models)
                shown = _Shown(progress, f"{engine}, batch {batch_size}", before, turns)
                try:
                    result.timings += _case(models, engine, images, amp_dtype, tick, rounds, shown, result.notes)
                except (BenchmarkError, MissingExtraError) as error:
                    if engine not in optional:
                        raise
                    result.notes.append(f"{engine}, batch {batch_size}: not measured: {error}")
    if not result.timings:
        raise BenchmarkError(f"nothing could be measured: {'; '.join(result.notes)}")
    result.notes = list(dict.fromkeys(result.notes))
    progress("benchmark: done", turns, turns)
    return result


@dataclass(frozen=True)
class _Shown:
    """Progress of one case among all."""

    progress: Progress
    case: str
    before: int
    turns: int

    def __call__(self, variant: str, done: int) -> None:
        self.progress(f"benchmark: {self.case}, {variant}", self.before + done, self.turns)


def _case(
    models: dict[str, nn.Module],
    engine: str,
    images: torch.Tensor,
    amp_dtype: torch.dtype | None,
    clock: Clock,
    rounds: int,
    shown: Callable[[str, int], None],
    notes: list[str],
) -> list[Timing]:
    """Time all variants on one engine with one batch `[B, C, H, W]`."""
    with fresh_engine(engine):
        runs: dict[str, Runnable] = {}
        shapes, seconds = {}, []
        for variant, model in models.items():
            shown(f"{variant}, warming up", 0)
            try:
                runs[variant] = prepare(engine, model, images, amp_dtype)
                seconds.append(warm_up(runs[variant].step, clock))
                output = torch.as_tensor(runs[variant].step())
            except (BenchmarkError, MissingExtraError):
                raise
            except Exception as error:  # out of memory, no compiler: whatever the engine runs into
                text = " ".join(str(error).split())[:200]
                where = f"{variant}, {engine}, batch {len(images)}"
                raise BenchmarkError(f"{where}: cannot be run: {type(error).__name__}: {text}") from error
            shapes[variant] = tuple(output.shape)
            if not torch.isfinite(output).all():
                notes.append(f"{variant}: its answers to random images are not finite; it is timed all the same")
        if len(set(shapes.values())) > 1:
            answers = ", ".join(f"{variant} {list(shape)}" for variant, shape in shapes.items())
            raise ArgumentError(f"the models answer in different shapes ({answers}): not the same architecture")
        steps = steps_per_turn(seconds[0])
        times = take_turns({variant: run.step for variant, run in runs.items()}, clock, rounds, steps, shown)
        return [
            Timing(
                variant,
                engine,
                len(images),
                steps,
                times[variant],
                sum(p.numel() for p in models[variant].parameters()),
                run.peak_memory(),
            )
            for variant, run in runs.items()
        ]


def _check(
    batch_sizes: Iterable[int], engines: Iterable[str], rounds: int, device: torch.device, clock: str
) -> None:
    sizes, names = list(batch_sizes), list(engines)
    if not sizes or min(sizes) < 1:
        raise ArgumentError(f"batch sizes are whole numbers from 1, not {sizes}")
    unknown = [name for name in names if name not in ENGINES]
    if unknown or not names:
        raise ArgumentError(f"engines are {', '.join(ENGINES)}, not {', '.join(unknown) or 'none'}")
    if rounds < _FEWEST_ROUNDS:
        raise ArgumentError(f"{rounds} rounds have no spread; at least {_FEWEST_ROUNDS}")
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"{device.type}: only cpu and cuda can be timed")
    if clock not in ("wall", "cpu"):
        raise ArgumentError(f"the clock is wall or cpu, not {clock!r}")
    if clock == "cpu" and (device.type != "cpu" or torch.get_num_threads() != 1):
        raise ArgumentError("CPU time tells how fast a model is on one thread of a CPU only: --threads 1 --device cpu")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}" if math.isfinite(ratio) else "?"
