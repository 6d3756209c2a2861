"""Put the claims of Yao et al. 2021 to the test: a small ViT trained from scratch with LayerNorm and with BatchNorm.

"Leveraging Batch Normalization for Vision Transformers" says that a ViT whose LayerNorms become BatchNorms often
crashes in training, that one more BatchNorm in each FFN stops that, and that the result is as accurate as with
LayerNorm and faster. Here the same ViT is trained on Fashion-MNIST in four variants, at three learning rates, two
depths and several seeds, about 40 minutes on one thread; and a larger one for longer on photos, where there is a GPU:

    python examples/paper/train.py                # the grid; what results.json holds is not run again
    python examples/paper/train.py --inference    # time LayerNorm against fused and against no norm at all
    python examples/paper/train.py --task photos --device cuda --lr 1e-3 --lr 3e-3 --seeds 1
    python examples/paper/train.py --report       # docs/paper.md and its plots, from the results alone

The data is the Debian package ``dataset-fashion-mnist`` or the same four idx .gz files in any ``--data-dir``; for
photos a train.tar and a validation.tar with a folder for each class. What becomes of a run:

* crashed: a loss or a gradient is not finite. The run ends there and has no accuracy.
* diverged: it ends with a training loss over ln(10), that of guessing, or with less than 20 % top-1.
"""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from datetime import date
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import timm
import torch
from timm.models import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import functional as F

import normswap
from normswap.finetuning.augment import views
from normswap.surgery.swap import batch_norms

from tasks import FASHION, TASKS, Data, Recipe, Task  # isort: skip  # beside this file

HERE = Path(__file__).resolve().parent
VARIANTS = ("layernorm", "batchnorm", "pre-act", "post-act")


def build(variant: str, depth: int, seed: int, task: Task = FASHION) -> nn.Module:
    """Return an untrained ViT; the same seed gives every variant the same weights in its linear layers.

    Every BatchNorm is a fresh one as torch makes it (weight 1, bias 0, eps 1e-5), where `normswap.swap_norms`
    would hand on the LayerNorm's weight, bias and eps and start those of the FFN as the identity: that is for
    pretrained models. Attention, FFN and final norm are all replaced.
    """
    torch.manual_seed(seed)
    if variant == "norm-free":
        return VisionTransformer(**task.shape, depth=depth, norm_layer=nn.Identity)
    model = VisionTransformer(**task.shape, depth=depth)
    if variant == "layernorm":
        return model
    plan = normswap.make_plan(model, input_size=task.input_size)
    model = normswap.swap_norms(model, plan, ffn_bn="none" if variant == "batchnorm" else variant)  # type: ignore
    for norm in batch_norms(model).values():
        norm.reset_parameters()
        norm.eps = 1e-5
    return model


def fuse(model: nn.Module, task: Task = FASHION) -> nn.Module:
    """Return the model, in eval mode, with every BatchNorm folded away."""
    return normswap.fold_norms(model.eval(), input_size=task.input_size)


def train(
    variant: str, lr: float, depth: int, seed: int, data: Data, recipe: Recipe, task: Task = FASHION
) -> dict[str, Any]:
    """Return one row of the results: train, with BatchNorm on the batch's statistics, then test on running ones.

    AdamW without decay of norms and biases, cosine schedule to 0, no gradient clipping (it would hide what is looked
    for), no dropout, float32. On the device where the data is.
    """
    start = time.perf_counter()
    device = data.images.device
    model = build(variant, depth, seed, task).to(device).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=lr, weight_decay=recipe.weight_decay)
    per_epoch = len(data.images) // recipe.batch
    updates = recipe.epochs * per_epoch
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=updates,
        warmup_t=round(recipe.warmup * updates),
        warmup_lr_init=lr / 100,
        t_in_epochs=False,
    )
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    largest, crashed_at = 0.0, None
    for update in range(updates):
        if update % per_epoch == 0:
            batches = torch.randperm(len(data.images), generator=order).to(device).split(recipe.batch)
        batch = batches[update % per_epoch]
        schedule.step_update(update)
        images = views(data.images[batch], recipe.hflip, recipe.scale, seed * updates + update)
        loss = F.cross_entropy(model(images), data.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).item()
        losses.append(loss.item())
        if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
            crashed_at = update
            break
        largest = max(largest, norm)
        optimizer.step()
    crashed = crashed_at is not None
    final_loss = None if crashed else statistics.fmean(losses[-recipe.last_updates :])
    top1 = None if crashed else accuracy(model, data)
    return {
        **{"variant": variant, "lr": lr, "depth": depth, "seed": seed},
        "top1": top1,
        "final_loss": final_loss,
        "crashed": crashed,
        "crashed_at": crashed_at,
        "diverged": not crashed and (final_loss > math.log(task.shape["num_classes"]) or top1 < recipe.min_top1),  # type: ignore
        "max_grad_norm": largest,
        "seconds": round(time.perf_counter() - start, 1),
    }


@torch.inference_mode()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return top-1 in percent, in eval mode."""
    model.eval()
    answers = torch.cat([model(images).argmax(1) for images in data.test_images.split(500)])
    return 100 * int((answers == data.test_labels).sum()) / len(answers)


@torch.inference_mode()
def time_inference(depth: int, batch: int, rounds: int = 60, passes: int = 10) -> dict[str, Any]:
    """Return how long a forward pass takes with LayerNorm, fused, and with no norm at all, taken in turns.

    Each round times the three one after another, so that whatever else runs on the machine meets all of them; the
    speed-ups are ratios within a round.
    """
    images = torch.randn(batch, *FASHION.input_size, generator=torch.Generator().manual_seed(0))
    models = {
        "layernorm": build("layernorm", depth, 0).eval(),
        "fused": fuse(build("pre-act", depth, 0)),
        "norm_free": build("norm-free", depth, 0).eval(),
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(rounds + 3):
        for name, model in models.items():
            start = time.perf_counter()
            for _ in range(passes):
                model(images)
            if round_ >= 3:  # warm by now
                seconds[name].append((time.perf_counter() - start) / passes)
    row: dict[str, Any] = {"depth": depth, "batch": batch, "rounds": rounds, "passes": passes}
    row |= {f"{name}_ms": 1000 * statistics.median(times) for name, times in seconds.items()}
    for name in ("fused", "norm_free"):
        ratios = [a / b for a, b in zip(seconds["layernorm"], seconds[name], strict=True)]
        row[f"{name}_speedup"] = [statistics.median(ratios), min(ratios), max(ratios)]
    return row


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return what the numbers depend on besides the recipe."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = named[0].partition(":")[2].strip() if named else processor
    gpu = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device)}
    return gpu | {
        "machine": f"{platform.machine()} ({processor}), {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


class Results:
    """results.json: rows that are on disk as soon as they are known.

    Raises:
        ClickException: the file is of another recipe, model or environment; their rows would share a table.
    """

    def __init__(self, path: Path, recipe: Recipe, task: Task = FASHION, device: str = "cpu") -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "task": task.name,
            "recipe": asdict(recipe),
            "model": task.shape,
            "environment": environment(device),
            "runs": [],
            "inference": [],
        }
        if path.exists():
            found = json.loads(path.read_text())
            for part in ("task", "recipe", "model", "environment"):
                if found[part] != self.content[part]:
                    raise click.ClickException(f"{path}: has another {part}; choose another --results")
            self.content = found

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Add a row with today's date and write the file, whole or not at all."""
        self.content[part].append({**row, "date": date.today().isoformat()})
        beside = self.path.with_name(self.path.name + ".part")
        with beside.open("w") as file:
            json.dump(self.content, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)

    def has(self, part: str, **key: Any) -> bool:
        """Return whether there is a row with these values."""
        return any(all(row[name] == value for name, value in key.items()) for row in self.content[part])


Setting = tuple[str, float, int, int]  # variant, learning rate, depth, seed
_shared: dict[str, Any] = {}  # of a process of the pool: what all its runs have in common


def _enter(task: str, folder: Path, device: str) -> None:
    torch.set_num_threads(1)
    found = TASKS[task]
    _shared.update(task=found, data=found.load(folder, found.recipe).to(device))


def _train(setting: Setting) -> dict[str, Any]:
    return train(*setting, data=_shared["data"], recipe=_shared["task"].recipe, task=_shared["task"])


def rows(settings: Sequence[Setting], task: Task, folder: Path, device: str, jobs: int) -> Iterator[dict[str, Any]]:
    """Yield a row for every setting, as soon as it is known; several at a time if there are several jobs."""
    arguments = (task.name, folder, device)
    if jobs == 1:
        _enter(*arguments)
        yield from map(_train, settings)
        return
    task.load(folder, task.recipe)  # what is wrong with the images is said once, and here
    with ProcessPoolExecutor(jobs, get_context("spawn"), _enter, arguments) as pool:
        failed: BaseException | None = None
        futures = [pool.submit(_train, setting) for setting in settings]
        for done in as_completed(futures):
            if done.cancelled():
                continue
            if (error := done.exception()) is None:
                yield done.result()
                continue
            failed = failed or error
            for other in futures:
                other.cancel()  # those that run are still yielded
        if failed is not None:
            raise failed


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--task", "name", type=click.Choice(list(TASKS)), default=FASHION.name, show_default=True)
@click.option("--data-dir", type=click.Path(path_type=Path), help="Folder of the images.  [the task's own]")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Runs at the same time.")
@click.option("--results", "path", type=click.Path(path_type=Path), help="JSON of rows.  [beside this file]")
@click.option("--lr", "rates", type=float, multiple=True, help="Learning rates.  [the task's own]")
@click.option("--depth", "depths", type=int, multiple=True, default=(4, 8), help="Numbers of blocks.")
@click.option("--seeds", type=int, default=3, help="Seeds 0, 1, ... of each setting.")
@click.option("--inference", is_flag=True, help="Time inference instead of training.")
@click.option("--report", is_flag=True, help="Write paper.md and its plots from the results instead of training.")
@click.option(
    "--docs", type=click.Path(path_type=Path), default=HERE.parents[1] / "docs", help="Where --report writes."
)
def main(
    name: str,
    data_dir: Path | None,
    device: str,
    jobs: int,
    path: Path | None,
    rates: Sequence[float],
    depths: Sequence[int],
    seeds: int,
    inference: bool,
    report: bool,
    docs: Path,
) -> None:
    task = TASKS[name]
    if report:
        there = [p for p in ([path] if path else map(results_of, TASKS.values())) if p.exists()]
        if not there:
            raise click.ClickException(f"{path or results_of(task)}: not there yet; run without --report first")
        from report import write_report  # beside this file

        return write_report([json.loads(p.read_text()) for p in there], docs)
    torch.set_num_threads(1)
    if device != "cpu" and not torch.cuda.is_available():
        raise click.UsageError(f"--device {device}: torch finds no GPU here")
    results = Results(path or results_of(task), task.recipe, task, device)
    if inference and task is not FASHION:
        raise click.UsageError("--inference times the model of Fashion-MNIST; for others there is normswap benchmark")
    if inference:
        for depth, batch in product(depths, (1, 128)):
            if not results.has("inference", depth=depth, batch=batch):
                results.add("inference", time_inference(depth, batch))
        return None
    # Seeds outermost: whenever it is stopped, every setting has been seen about equally often.
    grid = [(v, lr, d, seed) for seed, lr, d, v in product(range(seeds), rates or task.rates, depths, VARIANTS)]
    missing = [
        s for s in grid if not results.has("runs", **dict(zip(("variant", "lr", "depth", "seed"), s, strict=True)))
    ]
    for row in rows(missing, task, data_dir or task.folder, device, jobs):
        results.add("runs", row)
        click.echo(json.dumps(row))
    return None


def results_of(task: Task) -> Path:
    """Return where the results of a task are kept."""
    return HERE / ("results.json" if task is FASHION else f"results-{task.name}.json")


if __name__ == "__main__":
    main()
