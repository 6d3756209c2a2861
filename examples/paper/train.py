"""Put the claims of Yao et al. 2021 to the test: a small ViT trained from scratch with LayerNorm and with BatchNorm.

"Leveraging Batch Normalization for Vision Transformers" says that a ViT whose LayerNorms become BatchNorms often
crashes in training, that one more BatchNorm in each FFN stops that, and that the result is as accurate as with
LayerNorm and faster. Here the same ViT is trained on Fashion-MNIST in four variants, at three learning rates, two
depths and several seeds, about 40 minutes on one thread:

    python examples/paper/train.py                # the grid; what results.json holds is not run again
    python examples/paper/train.py --inference    # time LayerNorm against fused and against no norm at all
    python examples/paper/train.py --report       # docs/paper.md and docs/paper.png, from results.json alone

The data is the Debian package ``dataset-fashion-mnist`` or the same four idx .gz files in any ``--data-dir``. What
becomes of a run:

* crashed: a loss or a gradient is not finite. The run ends there and has no accuracy.
* diverged: it ends with a training loss over ln(10), that of guessing, or with less than 20 % top-1.
"""

import gzip
import json
import math
import os
import platform
import statistics
import struct
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import click
import timm
import torch
from timm.models import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F

import normswap
from normswap.swap import batch_norms

HERE = Path(__file__).resolve().parent
INPUT_SIZE = (1, 28, 28)
SHAPE = {"img_size": 28, "in_chans": 1, "patch_size": 7, "embed_dim": 64, "num_heads": 4, "num_classes": 10}
VARIANTS = ("layernorm", "batchnorm", "pre-act", "post-act")
MEAN, STD = 0.286, 0.353  # of Fashion-MNIST's training pixels


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run besides variant, learning rate, depth and seed; stored with the results.

    Attributes:
        train_images: the first so many of the 60,000.
        test_images: the first so many of the 10,000.
        warmup: share of the updates in which the learning rate rises in a line.
        last_updates: the final loss is the mean over so many updates, each before its own step.
    """

    train_images: int = 16384
    test_images: int = 10000
    epochs: int = 3
    batch: int = 128
    weight_decay: float = 0.05
    warmup: float = 0.1
    last_updates: int = 20
    min_top1: float = 20.0


@dataclass(frozen=True)
class Data:
    """Images `[N, 1, 28, 28]` and labels `[N]`, normalised."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def read_idx(path: Path) -> Tensor:
    """Return the bytes of an idx file (two zeros, type 8, the number of dimensions, the dimensions, the data)."""
    try:
        content = gzip.decompress(path.read_bytes())
    except OSError as error:
        raise click.ClickException(
            f"{path}: {error.strerror or error}; apt-get install dataset-fashion-mnist, or pass --data-dir"
        ) from error
    if content[:3] != b"\0\0\x08":
        raise click.ClickException(f"{path}: no idx file of bytes; take Fashion-MNIST's own")
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    return torch.frombuffer(bytearray(content[4 + 4 * len(shape) :]), dtype=torch.uint8).reshape(shape)


def load_data(folder: Path, recipe: Recipe) -> Data:
    """Return the images that the recipe names."""

    def part(name: str, count: int) -> tuple[Tensor, Tensor]:
        images = read_idx(folder / f"{name}-images-idx3-ubyte.gz")[:count]  # [N, 28, 28]
        labels = read_idx(folder / f"{name}-labels-idx1-ubyte.gz")[:count]
        return ((images.float() / 255 - MEAN) / STD).unsqueeze(1), labels.long()

    return Data(*part("train", recipe.train_images), *part("t10k", recipe.test_images))


def build(variant: str, depth: int, seed: int) -> nn.Module:
    """Return an untrained ViT; the same seed gives every variant the same weights in its linear layers.

    Every BatchNorm is a fresh one as torch makes it (weight 1, bias 0, eps 1e-5), where `normswap.swap_norms`
    would hand on the LayerNorm's weight, bias and eps and start those of the FFN as the identity: that is for
    pretrained models. Attention, FFN and final norm are all replaced.
    """
    torch.manual_seed(seed)
    if variant == "norm-free":
        return VisionTransformer(**SHAPE, depth=depth, norm_layer=nn.Identity)
    model = VisionTransformer(**SHAPE, depth=depth)
    if variant == "layernorm":
        return model
    plan = normswap.make_plan(model, input_size=INPUT_SIZE)
    model = normswap.swap_norms(model, plan, ffn_bn="none" if variant == "batchnorm" else variant)  # type: ignore
    for norm in batch_norms(model).values():
        norm.reset_parameters()
        norm.eps = 1e-5
    return model


def fuse(model: nn.Module) -> nn.Module:
    """Return the model, in eval mode, with every BatchNorm folded away."""
    return normswap.fold_norms(model.eval(), input_size=INPUT_SIZE)


def train(variant: str, lr: float, depth: int, seed: int, data: Data, recipe: Recipe) -> dict[str, Any]:
    """Return one row of the results: train, with BatchNorm on the batch's statistics, then test on running ones.

    AdamW without decay of norms and biases, cosine schedule to 0, no gradient clipping (it would hide what is looked
    for), no augmentation, no dropout, float32.
    """
    start = time.perf_counter()
    model = build(variant, depth, seed).train()
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
            batches = torch.randperm(len(data.images), generator=order).split(recipe.batch)
        batch = batches[update % per_epoch]
        schedule.step_update(update)
        loss = F.cross_entropy(model(data.images[batch]), data.labels[batch])
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
        "diverged": not crashed and (final_loss > math.log(SHAPE["num_classes"]) or top1 < recipe.min_top1),  # type: ignore
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
    images = torch.randn(batch, *INPUT_SIZE, generator=torch.Generator().manual_seed(0))
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


def environment() -> dict[str, Any]:
    """Return what the numbers depend on besides the recipe."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        processor = named[0].partition(":")[2].strip() if named else processor
    return {
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

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.content: dict[str, Any] = {
            "recipe": asdict(recipe) | {"mean": MEAN, "std": STD},
            "model": SHAPE,
            "environment": environment(),
            "runs": [],
            "inference": [],
        }
        if path.exists():
            found = json.loads(path.read_text())
            for part in ("recipe", "model", "environment"):
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


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--data-dir", type=click.Path(path_type=Path), default="/usr/share/datasets/fashion-mnist")
@click.option("--results", "path", type=click.Path(path_type=Path), default=HERE / "results.json", help="JSON of rows.")
@click.option("--lr", "rates", type=float, multiple=True, default=(3e-3, 3e-2, 1.0), help="Learning rates.")
@click.option("--depth", "depths", type=int, multiple=True, default=(4, 8), help="Numbers of blocks.")
@click.option("--seeds", type=int, default=3, help="Seeds 0, 1, ... of each setting.")
@click.option("--inference", is_flag=True, help="Time inference instead of training.")
@click.option("--report", is_flag=True, help="Write paper.md and paper.png from the results instead of training.")
@click.option(
    "--docs", type=click.Path(path_type=Path), default=HERE.parents[1] / "docs", help="Where --report writes."
)
def main(
    data_dir: Path,
    path: Path,
    rates: Sequence[float],
    depths: Sequence[int],
    seeds: int,
    inference: bool,
    report: bool,
    docs: Path,
) -> None:
    if report:
        if not path.exists():
            raise click.ClickException(f"{path}: not there yet; run without --report first")
        from report import write_report  # beside this file

        return write_report(json.loads(path.read_text()), docs)
    torch.set_num_threads(1)
    recipe = Recipe()
    results = Results(path, recipe)
    if inference:
        for depth, batch in product(depths, (1, 128)):
            if not results.has("inference", depth=depth, batch=batch):
                results.add("inference", time_inference(depth, batch))
        return
    data = load_data(data_dir, recipe)
    # Seeds outermost: whenever it is stopped, every setting has been seen about equally often.
    for seed, lr, depth, variant in product(range(seeds), rates, depths, VARIANTS):
        key = {"variant": variant, "lr": lr, "depth": depth, "seed": seed}
        if not results.has("runs", **key):
            results.add("runs", row := train(**key, data=data, recipe=recipe))
            click.echo(json.dumps(row))


if __name__ == "__main__":
    main()
