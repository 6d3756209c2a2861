"""Write docs/paper.md and its plots from the results: every figure and every finding comes from their rows."""

import math
import statistics
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

import click

from tasks import FASHION, TASKS  # isort: skip  # beside this file

NAMES = {
    "layernorm": "LayerNorm",
    "batchnorm": "BatchNorm only",
    "pre-act": "BatchNorm + FFN, pre-act",
    "post-act": "BatchNorm + FFN, post-act",
}
SAME = 0.5  # points of top-1: a smaller difference of means is not called one
Row = dict[str, Any]

CLAIMS = (
    "frequent crashes in training when BatchNorm simply replaces LayerNorm, attributed to the FFN",
    "a BatchNorm between the FFN's linear layers stabilises training",
    "as accurate as with LayerNorm",
    "about 20 % faster",
)
REPLICATION = (
    "BatchNorm only did not crash in 300 epochs",
    "69.04 against 68.70 without it: +0.34 points. A bug had removed the biases of its FFNs, so this is a lower bound",
    "LayerNorm 71.89, BatchNorm only 68.70 (-3.19), with FFN BatchNorm 69.04 (-2.85)",
    "no published figure found",
)
SOURCES = """\
- Zhuliang Yao, Yue Cao, Yutong Lin, Ze Liu, Zheng Zhang, Han Hu: "Leveraging Batch Normalization for Vision
  Transformers", ICCV Workshops 2021, pp. 413-422,
  [abstract](https://openaccess.thecvf.com/content/ICCV2021W/NeurArch/html/Yao_Leveraging_Batch_Normalization_for_Vision_Transformers_ICCVW_2021_paper.html).
  Only the abstract was available. It names neither the hardware of the 20 % nor the position of the FFN's BatchNorm,
  before or after the activation, so both positions are tested here.
  [Notes by a reader](https://patrick-llgc.github.io/Learning-Deep-Learning/paper_notes/bn_ffn_bn.html) say that the
  20 % refers to inference.
- [zeyuanyin/BN-ViT](https://github.com/zeyuanyin/BN-ViT), unofficial, the only public replication found on ImageNet:
  DeiT-T, 300 epochs, one run each, top-1 of the last epoch. It also replaces the final norm; its author suspects that
  this is why nothing crashed. Its FFN BatchNorm comes before the activation.
"""
LIMITS = """\
- Small models and a few epochs on small data sets. DeiT on ImageNet for 300 epochs may behave differently, in either
  direction: nothing here proves or refutes the paper at its own scale.
- Few learning rates. None was tuned for any variant, and the best rate may differ between variants.
- Few seeds, a single one for photos: the ranges are of single runs, not confidence intervals.
- Warm-up, float32 and AdamW may all prevent crashes: nothing was tried without them.
- BatchNorm's running statistics have momentum 0.1 and come from one process.
- The machine did other work at the same time, so seconds per run are only a rough measure of training speed.
"""


def write_report(contents: list[dict[str, Any]], docs: Path) -> None:
    """Write paper.md and a plot for each task.

    Args:
        contents: of the files of results.
        docs: folder, made if absent.

    Raises:
        ClickException: there are no runs, or matplotlib is missing.
    """
    from plot import plot  # beside this file

    if not all(content["runs"] for content in contents):
        raise click.ClickException("there are no runs in the results; run without --report first")
    docs.mkdir(parents=True, exist_ok=True)
    for content in contents:
        plot(content["runs"], docs / picture(content))
    (docs / "paper.md").write_text(markdown(contents))


def picture(content: dict[str, Any]) -> str:
    """Return the name of a task's plot."""
    return "paper.png" if content["task"] == FASHION.name else f"paper-{content['task']}.png"


def pick(rows: Iterable[Row], **key: Any) -> list[Row]:
    """Return the rows with these values."""
    return [row for row in rows if all(row[name] == value for name, value in key.items())]


def distinct(rows: Iterable[Row], name: str) -> list[Any]:
    """Return the sorted values of a column."""
    return sorted({row[name] for row in rows})


def known(rows: Iterable[Row], name: str) -> list[float]:
    """Return a column without the crashed runs, which lack it."""
    return [row[name] for row in rows if row[name] is not None]


def spread(values: list[float], form: str = ".2f") -> str:
    """Return mean and range; a dash if there is no value."""
    if not values:
        return "-"
    return f"{statistics.fmean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def failures(rows: list[Row]) -> str:
    """Return how many runs crashed and how many diverged."""
    return f"{sum(r['crashed'] for r in rows)} + {sum(r['diverged'] for r in rows)} of {len(rows)}"


def failed(rows: list[Row]) -> float:
    """Return the share of runs that crashed or diverged."""
    return statistics.fmean(row["crashed"] or row["diverged"] for row in rows)


def differences(runs: list[Row], variant: str, other: str, **key: Any) -> list[float]:
    """Return top-1 of ``variant`` less that of ``other``: same seed, rate and depth, neither crashed."""
    pairs: dict[tuple, dict[str, float]] = {}
    for row in pick(runs, **key):
        if row["top1"] is not None:
            pairs.setdefault((row["lr"], row["depth"], row["seed"]), {})[row["variant"]] = row["top1"]
    return [pair[variant] - pair[other] for pair in pairs.values() if variant in pair and other in pair]


def judge(values: list[float]) -> str:
    """Return what paired differences say: a mean under half a point or seeds of both signs say nothing sure."""
    if not values:
        return "no pair to compare"
    mean = statistics.fmean(values)
    if abs(mean) < SAME:
        return "no difference to speak of"
    if min(values) < 0 < max(values):
        return "on average better, but not in every run" if mean > 0 else "on average worse, but not in every run"
    return "better in every run" if mean > 0 else "worse in every run"


def more_often(a: float, b: float) -> str:
    """Return how one share of failures compares with another."""
    return "as often as" if a == b else "more often than" if a > b else "less often than"


def table(runs: list[Row]) -> str:
    """Return one row per depth, learning rate and variant."""
    lines = [
        "| depth | learning rate | variant | top-1 (%), mean (range) | difference from LayerNorm, same seed "
        "| final loss | crashed | diverged | largest gradient norm | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for depth, lr, variant in product(distinct(runs, "depth"), distinct(runs, "lr"), NAMES):
        rows = pick(runs, depth=depth, lr=lr, variant=variant)
        if not rows:
            continue
        own = variant == "layernorm"
        against = "" if own else spread(differences(runs, variant, "layernorm", depth=depth, lr=lr), "+.2f")
        loss = known(rows, "final_loss")
        cells = [
            *(str(depth), f"{lr:g}", NAMES[variant], spread(known(rows, "top1")), against),
            f"{statistics.fmean(loss):.3f}" if loss else "-",
            *(f"{sum(r[what] for r in rows)} of {len(rows)}" for what in ("crashed", "diverged")),
            f"{statistics.median(r['max_grad_norm'] for r in rows):.3g}",
            f"{statistics.fmean(r['seconds'] for r in rows):.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def by_variant(runs: list[Row], value: Callable[[list[Row]], str], variants: Iterable[str] = NAMES) -> str:
    """Return a value for each variant that has rows, as a clause."""
    there = ((name, pick(runs, variant=name)) for name in variants)
    return "; ".join(f"{NAMES[name]} {value(rows)}" for name, rows in there if rows)


def crashes(runs: list[Row]) -> str:
    """Return the finding on the paper's first claim."""
    plain, own = pick(runs, variant="batchnorm"), pick(runs, variant="layernorm")
    seen = sum(row["crashed"] for row in plain)
    return (
        f"{'crashes seen' if seen else 'not seen: no crash'} in {len(plain)} runs. Crashed + diverged: "
        f"{by_variant(runs, failures, ['layernorm', 'batchnorm'])}; BatchNorm alone fails "
        f"{more_often(failed(plain), failed(own))} LayerNorm"
    )


def stabilises(runs: list[Row]) -> str:
    """Return the finding on the paper's second claim."""
    plain, parts = pick(runs, variant="batchnorm"), [f"BatchNorm only {failures(pick(runs, variant='batchnorm'))}"]
    for name in ("pre-act", "post-act"):
        rows = pick(runs, variant=name)
        parts.append(f"{name} {failures(rows)}, {more_often(failed(rows), failed(plain))} without")
    return f"crashed + diverged: {'; '.join(parts)}. Top-1 {at_best(runs, 'batchnorm', ('pre-act', 'post-act'))}"


def against(runs: list[Row], other: str, variants: Iterable[str], lr: float) -> str:
    """Return how the top-1 of some variants compares with that of another at one learning rate, all depths."""
    parts = []
    for name in variants:
        values = differences(runs, name, other, lr=lr)
        parts.append(f"{NAMES[name]} {spread(values, '+.2f')} points, {judge(values)}")
    return f"at learning rate {lr:g} against {NAMES[other]}: {'; '.join(parts)}"


def best_rate(runs: list[Row], depth: int, variant: str) -> float:
    """Return the learning rate with the best mean top-1; the lowest where every run crashed."""

    def top1(lr: float) -> float:
        return statistics.fmean(known(pick(runs, depth=depth, variant=variant, lr=lr), "top1") or [0])

    return max(distinct(runs, "lr"), key=top1)


def at_best(runs: list[Row], other: str, variants: Iterable[str]) -> str:
    """Return how the top-1 of some variants compares with that of another, each at the rate that suits it best."""
    parts = []
    for name in variants:
        values: list[float] = []
        for depth in distinct(runs, "depth"):
            tops = [
                {row["seed"]: row["top1"] for row in pick(runs, depth=depth, variant=v, lr=best_rate(runs, depth, v))}
                for v in (name, other)
            ]
            pairs = ((tops[0][seed], tops[1][seed]) for seed in tops[0] if seed in tops[1])
            values += [a - b for a, b in pairs if a is not None and b is not None]
        parts.append(f"{NAMES[name]} {spread(values, '+.2f')} points over {len(values)} pairs, {judge(values)}")
    return f"each at its best learning rate against {NAMES[other]}: {'; '.join(parts)}"


def accurate(runs: list[Row], lr: float) -> str:
    """Return the finding on the paper's third claim at one learning rate, all depths."""
    return against(runs, "layernorm", list(NAMES)[1:], lr)


def faster(inference: list[Row]) -> str:
    """Return the finding on the paper's fourth claim."""
    if not inference:
        return "not measured yet"
    medians = [row["fused_speedup"][0] for row in inference]
    return f"fused against LayerNorm: {min(medians):.2f} to {max(medians):.2f} times as fast (medians, table below)"


def best(runs: list[Row]) -> list[str]:
    """Return each variant's best mean top-1 over the learning rates, by depth."""
    lines = []
    for depth in distinct(runs, "depth"):
        parts = []
        for name in NAMES:
            means = {
                lr: statistics.fmean(values)
                for lr in distinct(runs, "lr")
                if (values := known(pick(runs, depth=depth, variant=name, lr=lr), "top1"))
            }
            if means:
                lr = max(means, key=means.__getitem__)
                parts.append(f"{NAMES[name]} {means[lr]:.2f} (at {lr:g})")
        lines.append(f"Best mean top-1 at depth {depth}: {'; '.join(parts)}.")
    return lines


def speed_table(inference: list[Row]) -> str:
    """Return one row per depth and batch size."""
    lines = [
        "| depth | batch | LayerNorm ms | fused ms | no norm ms | LayerNorm / fused | LayerNorm / no norm |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in inference:
        ratios = ("{:.3f} ({:.3f} to {:.3f})".format(*row[f"{name}_speedup"]) for name in ("fused", "norm_free"))
        times = (f"{row[f'{name}_ms']:.2f}" for name in ("layernorm", "fused", "norm_free"))
        lines.append(f"| {' | '.join([str(row['depth']), str(row['batch']), *times, *ratios])} |")
    return "\n".join(lines)


def markdown(contents: list[dict[str, Any]]) -> str:
    """Return the text of paper.md."""
    titles = [TASKS[content["task"]].title for content in contents]
    heads = [
        "the paper (abstract)",
        "BN-ViT, DeiT-T on ImageNet",
        *(f"here, a small ViT on {title}" for title in titles),
    ]
    columns = [CLAIMS, REPLICATION]
    for content in contents:
        runs = content["runs"]
        columns.append(
            (crashes(runs), stabilises(runs), at_best(runs, "layernorm", list(NAMES)[1:]), faster(content["inference"]))
        )
    rows = [heads, ["---"] * len(heads), *zip(*columns, strict=True)]
    claims = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    inference = [row for content in contents for row in content["inference"]]
    what_came_out = "\n".join(section(content) for content in contents)
    recipes = "\n\n".join(f"On {title}:\n\n{recipe(content)}" for title, content in zip(titles, contents, strict=True))
    return f"""\
# BatchNorm in a ViT trained from scratch: a test of the claims of Yao et al. 2021

Written by `python examples/paper/train.py --report` from the results in `examples/paper`, including the sentences about
results. Do not edit.

## Claims, the public replication, and this test

{claims}

Runs of the same depth and seed are compared, that is with the same initial weights of the linear layers and the same
order of images. The range is over runs. A mean under {SAME} points is called "no difference to speak of".

{what_came_out}
## Inference

The model of {titles[0]} with LayerNorm, with BatchNorm (pre-act) folded by `normswap.fold_norms`, and built without
any norm, which is the bound. The models are timed round-robin in one process with one thread, in eager float32 on
random images. The table shows the median of the times, and the median (range) over rounds of the ratio within a
round. A ratio over 1 means faster than LayerNorm.

{speed_table(inference)}

This does not carry over to other models and machines: 64 channels and 17 tokens are few, so everything that is not a
matrix product weighs more here than in a deployed model.

## Recipe

{recipes}

- BatchNorm: inserted by `normswap.swap_norms` in place of the attention, FFN and final norms, all freshly initialised
  (weight 1, bias 0, eps 1e-5, momentum 0.1). Trained with the batch's statistics over images and tokens, tested with
  the running ones.
- Crashed: a loss or a gradient is not finite; the run ends there, without an accuracy. Diverged: the run ends with a
  training loss (mean over its last updates) over ln(10) = {math.log(10):.3f}, or with chance-level top-1. A crashed run
  does not also count as diverged.

## Limits

{LIMITS}
## Sources

{SOURCES}"""


def section(content: dict[str, Any]) -> str:
    """Return what came out of one task."""
    runs, env = content["runs"], content["environment"]
    dates, seeds = distinct([*runs, *content["inference"]], "date"), len(distinct(runs, "seed"))
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    gpu = f"{env['gpu']}, " if "gpu" in env else ""
    many = f"range over {seeds} seeds" if seeds > 1 else "range over one seed, a single run"
    return f"""\
## On {TASKS[content["task"]].title}

{len(runs)} runs on {when}; {gpu}{env["machine"]}, {env["threads"]} thread, torch {env["torch"]}, timm {env["timm"]},
Python {env["python"]}.

{findings(runs)}

![Top-1 by learning rate, variant and depth]({picture(content)})

Mean and {many}, of the runs that did not crash. The gradient norm is the median over seeds of the largest in each run.

{table(runs)}
"""


def findings(runs: list[Row]) -> str:
    """Return what came out, one point a line."""
    rates = distinct(runs, "lr")
    gradients = by_variant(runs, lambda rows: f"{statistics.median(r['max_grad_norm'] for r in rows):.3g}")
    loss = by_variant(pick(runs, lr=rates[0]), lambda rows: spread(known(rows, "final_loss"), ".3f"))
    points = [f"Crashed + diverged, of all runs: {by_variant(runs, failures)}."]
    points += [
        f"At learning rate {lr:g}, crashed + diverged: {by_variant(pick(runs, lr=lr), failures)}." for lr in rates
    ]
    points += [f"Top-1 {accurate(runs, lr)}." for lr in rates]
    points += [f"Top-1 {against(runs, 'batchnorm', ('pre-act', 'post-act'), lr)}." for lr in rates]
    points.append(f"Top-1 {at_best(runs, 'layernorm', list(NAMES)[1:])}.")
    points += best(runs)
    points += [
        f"Final training loss at learning rate {rates[0]:g}, mean (range): {loss}.",
        f"Largest gradient norm of a run, median over all runs: {gradients}.",
    ]
    return "\n".join(f"- {point}" for point in points)


def recipe(content: dict[str, Any]) -> str:
    """Return how the runs were made, as Markdown."""
    runs, model, how = content["runs"], content["model"], content["recipe"]
    depths = " or ".join(str(depth) for depth in distinct(runs, "depth"))
    rates = ", ".join(f"{lr:g}" for lr in distinct(runs, "lr"))
    crops = f"mirrored with a chance of {how['hflip']:g}, random crops of {how['scale']:.0%} of the area or more"
    return f"""\
- Data: {TASKS[content["task"]].source}, the first {how["train_images"]:,} training images and
  the first {how["test_images"]:,} test images, pixels less {how["mean"]} over {how["std"]}, \
{crops if how["hflip"] or how["scale"] < 1 else "no augmentation"}.
- Model: timm `VisionTransformer`, {model["img_size"]}x{model["img_size"]} pixels, patch {model["patch_size"]}, width
  {model["embed_dim"]}, {model["num_heads"]} heads, depth {depths}, class token.
- Training: {how["epochs"]} epochs, batches of {how["batch"]}, timm's AdamW with weight decay {how["weight_decay"]} (not
  on norms and biases), timm's cosine schedule to 0 after a warm-up over {how["warmup"]:.0%} of the updates. **No
  gradient clipping**, no dropout, float32, cross-entropy. The final loss is over the last {how["last_updates"]}
  updates; top-1 under {how["min_top1"]:g} % counts as chance-level.
- Learning rates {rates}; seeds {", ".join(str(seed) for seed in distinct(runs, "seed"))}."""
