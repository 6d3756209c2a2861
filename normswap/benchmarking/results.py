"""How fast each model was: the record of a benchmark, as a table, CSV or JSON, and what it lets one say."""

import csv
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from ..atomic import new_file
from ..records.provenance import versions
from ..tables import number, table
from .timing import Spread, is_drowned, speedups, spread

# The last is a second copy of the original: what it differs by is noise.
ORIGINAL, FUSED, BOUND, AGAIN = VARIANTS = ("original", "fused", "norm-free", "original again")
_MIB = 2**20


@dataclass(frozen=True)
class Timing:
    """One model on one engine with one batch size.

    Attributes:
        variant: "original", "fused", "norm-free" or "original again".
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
            wanted = timing.variant != reference and (reference == ORIGINAL or timing.variant == FUSED)
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
            ArgumentError, OutputError: see `normswap.atomic.new_file`.
        """
        rows = self.rows()
        with new_file(Path(path), overwrite=True) as file, open(file, "w", newline="", encoding="utf-8") as text:
            writer = csv.DictWriter(text, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

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
        """Return what the ratios mean, what they say for each case, and how far the noise allows to say so."""
        lines = [
            "ratio is images/s over the original's in the same round, median and quartiles of "
            f"{self.settings['rounds']} rounds: 1.05 is 5 % more; of 'original again' it is pure noise"
        ]
        lines += [f"{engine}, batch {size}: {self._finding(engine, size)}" for engine, size in self.cases()]
        lines += [f"not in the norm-free bound: {difference}" for difference in self.differences]
        return lines + self.notes

    def noise(self, engine: str, batch_size: int) -> float:
        """Return how far two copies of the original are apart, as a share of their time: the median over rounds."""
        return abs(self.ratio(engine, batch_size, AGAIN).median - 1)

    def is_slower(self, engine: str, batch_size: int, reference: str = ORIGINAL) -> bool:
        """Return whether fused is slower than the reference beyond the spread and the noise."""
        ratio = self.ratio(engine, batch_size, FUSED, reference)
        return ratio.q75 < 1 and 1 - ratio.median > self.noise(engine, batch_size)

    def _finding(self, engine: str, batch_size: int) -> str:
        gain, noise = self.ratio(engine, batch_size), self.noise(engine, batch_size)
        text = f"fused {_percent(gain.median)} % ({_percent(gain.q25)} to {_percent(gain.q75)})"
        if self.is_slower(engine, batch_size):
            text += ", slower than the original"
        if is_drowned(gain, noise):
            text += (
                f"; WARNING: no larger than the spread ({100 * gain.width:.1f} points) or than the difference of two "
                f"copies of the original ({100 * noise:.1f} %): more `rounds`, or a quieter machine"
            )
        behind = 100 * (1 - self.ratio(engine, batch_size, FUSED, BOUND).median)
        if self.is_slower(engine, batch_size, BOUND):
            return f"{text}; {behind:.1f} % behind the norm-free bound"
        return f"{text}; within noise of the norm-free bound"


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f}" if math.isfinite(ratio) else "?"
