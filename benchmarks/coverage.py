"""Convert the smallest model of every timm model file that holds LayerNorm, and write docs/coverage.md.

    python benchmarks/coverage.py [--only GLOB] [--out docs/coverage.md]

Each model gets random weights and goes the whole road twice. First every BatchNorm gets random statistics and the
fused model must answer as the unfused one does, in float64: that finds a wrong fold. Then `normswap.convert`
calibrates, re-solves, folds and saves, and the folder must load again without a difference. Exit code 1 if anything
fails.
"""

import argparse
import platform
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._registry import _model_to_module as MODEL_FILES
from torch import nn

import normswap
from normswap.layers import TokenBatchNorm
from normswap.planning.foldability import AFFINE, FOLD_BACKWARD, FOLD_FORWARD, KEEP
from normswap.surgery.fold import max_difference
from normswap.surgery.swap import batch_norms

# A fold reorders sums of float64 products; the largest output counts as 1. As FOLD_FLOAT64 in tests/tolerance.py.
TOLERANCE = 1e-9
# A conversion that was solved from few images amplifies rounding errors; a wrong fold is off by more than this.
CALIBRATED_TOLERANCE = 1e-6
# Without its norms a model must answer otherwise by at least this, relative to the largest output.
VISIBLE = 1e-4
# A few units in the last place of a float64 image.
NUDGE = 1e-15
IMAGES = 8
# Smaller images than the model's own keep the float64 check short, where they change no verdict.
SIZES = (64, 96, 112, 128, 160, 192, 224, 256, 384)


@dataclass
class Result:
    """What happened to one model; ``error`` is empty if all went well."""

    file: str
    model: str
    parameters: int
    size: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    random: float = float("nan")
    calibrated: float = float("nan")
    stock: bool = False
    seconds: float = 0.0
    error: str = ""

    @property
    def folded(self) -> int:
        return self.counts[FOLD_FORWARD] + self.counts[FOLD_BACKWARD]


def smallest_models(only: str = "*") -> dict[str, tuple[str, int]]:
    """Return, for each model file with LayerNorm, its smallest architecture with LayerNorm and the parameter count."""
    found: dict[str, tuple[str, int]] = {}
    for name in timm.list_models():
        file = MODEL_FILES[name]
        if not (fnmatch(file, only) or fnmatch(name, only)):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _on_meta(name)
        count = sum(p.numel() for p in model.parameters())
        if any(isinstance(m, nn.LayerNorm) for m in model.modules()) and (file not in found or count < found[file][1]):
            found[file] = name, count
    return dict(sorted(found.items()))


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter, and the statistics of BatchNorms that the model has, values no fold passes by accident."""
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        if parameter.ndim > 1 and len(parameter) > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:  # gains stay about 1, tokens and LayerScale become visible
            parameter.add_(noise * 0.2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


@torch.no_grad()
def randomise_statistics(swapped: nn.Module, images: torch.Tensor) -> None:
    """Give every BatchNorm random statistics, weight and bias around what passes it, so that no depth blows up.

    Scales have both signs, standard deviations are off by up to a factor of three, means by one of them.
    """

    def hook(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].movedim(norm.channel_dim, -1).reshape(-1, norm.num_features)  # [..., C] -> [M, C]
        var, mean = torch.var_mean(rows, 0, correction=0)
        sigma = var.sqrt().clamp(min=float(rows.std()) * 0.1 + 1e-6) * 10 ** (torch.rand_like(var) - 0.5)
        norm.running_var.copy_(sigma.square())
        norm.running_mean.copy_(mean + torch.randn_like(mean) * sigma)
        norm.weight.copy_((torch.rand_like(mean) + 0.5) * torch.randn_like(mean).sign())
        norm.bias.copy_(torch.randn_like(mean) * 0.5)

    handles = [m.register_forward_pre_hook(hook) for m in swapped.modules() if isinstance(m, TokenBatchNorm)]
    swapped(images)
    for handle in handles:
        handle.remove()


def convert_one(file: str, name: str, parameters: int) -> Result:
    """Take one architecture the whole road; what goes wrong is in the result's ``error``."""
    result, start = Result(file, name, parameters), time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old names and missing kernels, nothing that is checked here
            _convert(result)
    except Exception as error:  # whatever it is, it is listed
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error).strip().splitlines() or [""])[0]
        result.error = f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"
    result.seconds = time.perf_counter() - start
    return result


def _convert(result: Result) -> None:
    full = normswap.make_plan(_on_meta(result.model))
    for site in full.sites:
        result.counts[site.verdict] += 1
        if site.verdict in (AFFINE, KEEP):
            result.reasons[f"{site.verdict}: {_short(site.reason)}"] += 1

    arguments, plan = _smaller(result.model, full)
    result.size = plan.input_size[-1]
    torch.manual_seed(0)
    model = randomise(timm.create_model(result.model, pretrained=False, **arguments)).double().eval()
    images = torch.randn(IMAGES, *plan.input_size, dtype=torch.float64)
    swapped = normswap.swap_norms(model, plan).eval()
    randomise_statistics(swapped, images[:2])
    fused = normswap.fold_norms(swapped, input_size=plan.input_size)
    result.random = _relative(swapped, fused, images[:2])
    # Some random models amplify any rounding; then the fold may err as much as rounding of the images does.
    with torch.no_grad():
        nudged = float((swapped(images[:2] * (1 + NUDGE)) - swapped(images[:2])).abs().max())
        allowed = max(TOLERANCE, 10 * nudged / float(swapped(images[:2]).abs().max()))
    if not result.random <= min(allowed, CALIBRATED_TOLERANCE):
        raise ArithmeticError(f"wrong fold: fused and unfused differ by {result.random:.1e} of the largest output")
    for path in batch_norms(swapped):
        swapped.set_submodule(path, nn.Identity())
    if not _relative(fused, swapped, images[:2]) > VISIBLE:
        raise ArithmeticError("without its norms the model answers the same, so the check of the fold sees nothing")
    del swapped, fused

    done = normswap.convert(model, [images], plan=plan, evaluation=normswap.EvaluationOptions(atol=float("inf")))
    with torch.no_grad():
        scale = float(done.model(images).abs().max())
    result.calibrated = (done.report.fold_max_abs_err or 0.0) / scale
    if not result.calibrated <= CALIBRATED_TOLERANCE:
        raise ArithmeticError(f"calibrated and fused differ by {result.calibrated:.1e} of the largest output")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        done.save(Path(folder) / "out")
        loaded = normswap.load(Path(folder) / "out")
        result.stock = done.report.stock_timm is None
        probe = images[:2].float()
        if not torch.equal(loaded(probe), done.model.float()(probe)):  # a NaN is a difference
            raise ArithmeticError("the loaded model answers differently")


def _on_meta(name: str, **arguments: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **arguments).eval()


def _smaller(name: str, full: normswap.Plan) -> tuple[dict[str, Any], normswap.Plan]:
    """Return arguments for, and the plan of, the smallest images that the model takes with the very same verdicts."""
    for size in SIZES:
        for arguments in ({"img_size": size}, {}):
            if size >= full.input_size[-1]:
                continue
            try:
                plan = normswap.make_plan(_on_meta(name, **arguments), input_size=(full.input_size[0], size, size))
            except Exception:  # no such argument, or not at this size: whatever the model's own code runs into
                continue
            if [(s.path, s.verdict, s.targets) for s in plan.sites] == [
                (s.path, s.verdict, s.targets) for s in full.sites
            ]:
                return arguments, plan
    return {}, full


def _relative(a: nn.Module, b: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        scale = float(a(images).abs().max())
    return max_difference(a, b, [images]) / scale


def _short(reason: str) -> str:
    """Return a reason without what differs from block to block."""
    return re.sub(r"(\.\d+)+(?=\.|\b)", ".*", reason)


def document(results: list[Result], parts: Iterable[str]) -> str:
    """Return docs/coverage.md."""
    rows = [
        "| model file | smallest model | parameters (M) | pixels | LayerNorms | folded forward | folded backward "
        "| affine | kept | fold error, random | fold error, calibrated | loads in plain timm | seconds |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|--:|",
    ]
    for r in results:
        counts = [r.counts.total(), *(r.counts[v] for v in (FOLD_FORWARD, FOLD_BACKWARD, AFFINE, KEEP))]
        numbers = " | ".join(map(str, counts))
        rows.append(
            f"| {r.file} | {r.model} | {r.parameters / 1e6:.1f} | {r.size} | {numbers} | {r.random:.0e} "
            f"| {r.calibrated:.0e} | {'yes' if r.stock else 'no'} | {r.seconds:.0f} |"
        )
    reasons = ["| model file | LayerNorms | verdict and reason |", "|---|--:|---|"]
    reasons += [f"| {r.file} | {n} | {why} |" for r in results for why, n in r.reasons.most_common()]
    failed = [f"| {r.file} | {r.model} | {r.error} |" for r in results if r.error]
    failures = ["## Failures", "", "| model file | model | error |", "|---|---|---|", *failed, ""] if failed else []
    return "\n".join(
        [*parts, "", *failures, "## Every file", "", *rows, "", "## LayerNorms that are not folded", "", *reasons, ""]
    )


def summary(results: list[Result]) -> list[str]:
    """Return the lines that the script prints and the document begins with."""
    total = sum(r.counts.total() for r in results)
    folded = sum(r.folded for r in results)
    good = [r for r in results if not r.error]
    wrong = [r for r in results if "differ by" in r.error]
    kinds = Counter[str]()
    for r in results:
        kinds.update(r.counts)
    return [
        f"- {len(good)} of {len(results)} model files convert, calibrate, fold, save and load without error",
        f"- {total} LayerNorms: {folded} folded ({100 * folded / max(total, 1):.1f} %: {kinds[FOLD_FORWARD]} forward, "
        f"{kinds[FOLD_BACKWARD]} backward), {kinds[AFFINE]} remain as a scale and shift, {kinds[KEEP]} are kept",
        f"- {len(wrong)} wrong folds; the largest difference between fused and unfused is "
        f"{max((r.random for r in good), default=0.0):.0e} of the largest output with random statistics, "
        f"{max((r.calibrated for r in good), default=0.0):.0e} after calibration, both in float64",
        f"- {sum(r.stock for r in good)} of the folders load in plain timm, the others with `normswap.load`",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="*", help="model files or architectures to convert, a shell pattern")
    parser.add_argument("--out", type=Path, default=Path("docs/coverage.md"))
    arguments = parser.parse_args()
    results = []
    for file, (name, parameters) in smallest_models(arguments.only).items():
        result = convert_one(file, name, parameters)
        results.append(result)
        counts = ", ".join(f"{n} {verdict}" for verdict, n in sorted(result.counts.items()))
        print(f"{file:28} {name:36} {counts}; {result.seconds:.0f} s {result.error}", file=sys.stderr, flush=True)
    lines = summary(results)
    now = datetime.now(timezone.utc).date()
    parts = [
        "# Every timm model file with LayerNorm",
        "",
        f"Written by `python benchmarks/coverage.py` on {now}, {platform.machine()} with "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__.split('+')[0]}, timm {timm.__version__}, "
        f"normswap {normswap.__version__}.",
        "The smallest architecture of each file is converted twice, with random weights: with random statistics in",
        f"every BatchNorm, and calibrated on {IMAGES} random images (`--method reconstruct`). Both are folded; the",
        "second is saved and loaded again. The [glossary](glossary.md#plan-and-fold) explains the verdicts.",
        "",
        *lines,
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(document(results, parts))
    print("\n".join(lines))
    return int(not results or any(result.error for result in results))


if __name__ == "__main__":
    sys.exit(main())
