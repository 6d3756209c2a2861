"""The loop: one step after the other, from the start or from a saved state, until images held out decide."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F

from ..distributed import all_sum, world
from ..errors import ArgumentError, CalibrationError, MissingExtraError
from ..layers import TokenBatchNorm
from ..model_utils import eval_mode, find_module, has_classes
from ..progress import Progress
from ..records.report import Finetuning
from ..surgery.swap import batch_norms
from .augment import Corrupted, views
from .batch_norm_statistics import estimate_statistics
from .holdout import held_out_of
from .losses import distance, gain_of, hints, taps
from .norm_blending import Fade
from .options import FinetuneOptions, learning_rate
from .run_state import TrainingState

# A gain counts from so many standard errors on; a smaller one may well be chance, and a loss on other images.
SURE = 2.0


def steps_per_epoch(count: int, held_out: int, options: FinetuneOptions) -> int:
    """Return how many steps all processes make of ``count`` images, ``held_out`` of which are not trained on.

    Raises:
        ArgumentError: they are not enough for one.
    """
    train, per_step = count - held_out, options.batch_size * options.accumulate * world()[1]
    if train < per_step:
        raise ArgumentError(
            f"{train} images to train on ({held_out} held out) are fewer than one step takes, {per_step}: "
            f"give more images or a smaller batch size"
        )
    return train // per_step


class Run:
    """One run: what is trained, on what, and how far it is."""

    def __init__(
        self,
        swapped: nn.Module,
        original: nn.Module,
        options: FinetuneOptions,
        pixels: torch.Tensor,
        labels: torch.Tensor | None,
        held_out: torch.Tensor | None = None,
        corrupted: Corrupted | None = None,
    ) -> None:
        self.corrupted = corrupted or Corrupted(0.0, None)
        options = replace(options, views=self.corrupted.share)  # what is written down is what was done
        self.student, self.teacher, self.options = swapped, original, options
        self.pixels, self.labels = pixels, labels
        self.norms = batch_norms(swapped)
        layer_norms = [path for path, module in original.named_modules() if isinstance(module, nn.LayerNorm)]
        kinds = (TokenBatchNorm, nn.LayerNorm)
        self.sites = [path for path in layer_norms if isinstance(find_module(swapped, path), kinds)]
        if not self.sites:
            raise ArgumentError(f"{type(swapped).__name__} has no norm where the original has a LayerNorm")
        swapped_sites = [path for path in self.sites if path in self.norms]
        self.fade = Fade(swapped, original, swapped_sites, options.fade, options.fade_order)
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(options.seed))
        held = held_out_of(len(pixels)) if held_out is None else 0
        self.held, self.train = pixels[order[:held]] if held_out is None else held_out, order[held:]
        rank, size = world()
        self.steps_per_epoch = steps_per_epoch(len(pixels), held, options)
        self.rank, self.size = rank, size
        self.total = self.steps_per_epoch * options.epochs
        self.step = self.dropped = self.in_a_row = 0
        self.losses: list[float] = []
        self.resumed_at: int | None = None
        self._check_heads()
        self.start = {name: tensor.clone() for name, tensor in swapped.state_dict().items()}
        self.before = self.measure(swapped)
        self.stem = [] if options.stem else list(_first_layer(swapped, pixels[:1]))
        with self._stem_kept():
            self.accelerator, self.optimizer, self.model = _prepared(swapped, options)
        self.average = _average(swapped, options.ema)

    def _check_heads(self) -> None:
        with eval_mode(self.student, self.teacher), torch.no_grad():
            shapes = [tuple(model(self.pixels[:1]).shape[1:]) for model in (self.student, self.teacher)]
        if shapes[0] != shapes[1]:
            raise ArgumentError(
                f"the models have different heads: {shapes[0]} outputs against the original's {shapes[1]}"
            )
        # Softmax wants two classes at least.
        self.logits = has_classes(self.teacher) and len(shapes[0]) == 1 and shapes[0][0] > 1
        if self.options.labels > 0:
            if not self.logits:
                raise ArgumentError("the labels' loss is wanted, but the model has no classes")
            if self.labels is None:
                raise ArgumentError("the labels' loss is wanted, but the images have no labels")
            if int(self.labels.min()) < 0 or int(self.labels.max()) >= shapes[0][0]:
                raise ArgumentError(
                    f"labels go from {int(self.labels.min())} to {int(self.labels.max())}, "
                    f"the model has classes 0 to {shapes[0][0] - 1}"
                )

    @contextmanager
    def _stem_kept(self) -> Iterator[None]:
        for parameter in self.stem:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.stem:
                parameter.requires_grad_(True)

    def fingerprint(self) -> dict[str, Any]:
        """Return what must be the same for a state to belong to this run."""
        plain = {key: str(value) for key, value in asdict(self.options).items()}
        start, teacher = list(self.start.values())[:4], list(self.teacher.state_dict().values())[-4:]
        images = (self.pixels[self.train[:8]], self.held[:8])
        sums = [float(tensor.double().sum()) for tensor in (*images, *start, *teacher)]
        return {"options": plain, "images": len(self.pixels), "processes": self.size, "sums": sums}

    def go(self, kept: TrainingState | None, save_every: float, progress: Progress) -> Finetuning:
        began = saved = time.monotonic()
        first = self.step
        agreement = self.before[1]
        if self.resumed_at is None:
            self._save(kept)  # a kill in the first minutes loses nothing that was done before
        with _trained(self.norms.values(), self.options), self.fade.blended(), self._stem_kept():
            while self.step < self.total:
                self.fade.at(self.step / self.total)
                if not self._take():
                    self.in_a_row += 1
                    self.dropped += 1
                    if self.in_a_row >= self.options.bad_steps:
                        self._save(kept)  # a dropped step changes nothing, so this is the last good one
                        self._restore(self.start)
                        raise CalibrationError(
                            f"fine-tuning: {self.in_a_row} steps in a row gave no finite loss or gradient, at step "
                            f"{self.step + 1} of {self.total}: lower the learning rate (now {self.options.lr:g})"
                        )
                else:
                    self.in_a_row = 0
                self.step += 1
                if self.step % self.steps_per_epoch == 0 and self.step < self.total:
                    agreement = self.measure(self.student)[1]  # blended as it is now
                if kept is not None and self.in_a_row == 0 and time.monotonic() - saved >= save_every:
                    self._save(kept)
                    saved = time.monotonic()
                rate = (self.step - first) * self._per_step() / (time.monotonic() - began)
                progress(self._said(agreement, rate), self.step, self.total)
        if kept is not None and kept.stays:
            self._save(kept)
        found = self._finish(time.monotonic() - began)
        if kept is not None and self.rank == 0 and not kept.stays:
            kept.remove()
        return found

    def _save(self, kept: TrainingState | None) -> None:
        if kept is not None and self.rank == 0:
            kept.save(self.state())

    def _finish(self, seconds: float) -> Finetuning:
        if self.average is not None:
            self._restore(self.average.module.state_dict())
        if self.options.bn_mode == "train":
            estimate_statistics(self.student, list(self._plain()))
        after = self.measure(self.student)
        gain, error = gain_of(self.before[0], after[0])
        # A student that was its own teacher, as the unconverted model of a control, has no distance to lose.
        taken = gain > SURE * error or not self.before[0].any()
        if not taken:
            self._restore(self.start)
        tenth = max(len(self.losses) // 10, 1)
        return Finetuning(
            options={key: str(value) for key, value in asdict(self.options).items()},
            images=len(self.train),
            held_out=len(self.held),
            steps=self.total,
            dropped=self.dropped,
            loss_first=_mean(self.losses[:tenth]),
            loss_last=_mean(self.losses[-tenth:]),
            kl_before=float(self.before[0].mean()),
            kl_after=float(after[0].mean()),
            kl_gain_error=error,
            agreement_before=self.before[1],
            agreement_after=after[1],
            taken=taken,
            seconds=round(seconds, 2),
            resumed_at=self.resumed_at,
        )

    def _per_step(self) -> int:
        return self.options.batch_size * self.options.accumulate * self.size

    def _said(self, agreement: float | None, rate: float) -> str:
        loss = f"loss {_mean(self.losses[-20:]):.3f}" if self.losses else "loss -"
        same = "" if agreement is None else f", agreement {agreement:.1f} %"
        dropped = f", {self.dropped} dropped" if self.dropped else ""
        return f"finetune: {loss}{same}, {rate:.0f} images/s{dropped}"

    def _batches(self) -> Iterator[torch.Tensor]:
        """Yield the indices of this process's batches of the step at hand."""
        epoch, at = divmod(self.step, self.steps_per_epoch)
        generator = torch.Generator().manual_seed(self.options.seed + 1 + epoch)
        order = self.train[torch.randperm(len(self.train), generator=generator)]
        of_step = order[at * self._per_step() : (at + 1) * self._per_step()]
        yield from of_step.view(self.size, -1)[self.rank].split(self.options.batch_size)  # [S] -> [ranks, S / ranks]

    def _take(self) -> bool:
        """Make one step; False if it was dropped because a number was not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * learning_rate(self.step, self.total, self.options.warmup)
        self.optimizer.zero_grad()
        total = 0.0
        for index in self._batches():
            loss = self._loss(index) / self.options.accumulate
            total += float(loss.detach())
            self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.clip_grad)
        fine = torch.tensor([float(math.isfinite(total) and bool(torch.isfinite(norm)))], device=self.pixels.device)
        all_sum(fine)
        if float(fine) < self.size:  # one process's bad numbers are in everyone's gradients
            self.optimizer.zero_grad()
            return False
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.student)
        self.losses.append(total)
        return True

    def _loss(self, index: torch.Tensor) -> torch.Tensor:
        o = self.options
        seed = (o.seed * 1_000_003 + self.step) * 4_099 + int(index[0])  # another view in every epoch
        x = self.corrupted(views(self.pixels[index], o.hflip, o.scale, seed % 2**63), seed)
        device = x.device.type
        cast = torch.autocast(device, o.amp_dtype or torch.bfloat16, enabled=o.amp_dtype is not None)
        with cast, taps(self.teacher, self.sites) as wanted, torch.no_grad():
            answer = self.teacher(x)
        with cast, taps(self.student, self.sites) as found:
            output = self.model(x)
        loss = output.new_zeros((), dtype=torch.float32)
        if o.kl:
            loss = loss + o.kl * distance(output.float(), answer.float(), self.logits).mean()
        if o.features:
            loss = loss + o.features * hints(found, wanted)
        if o.labels and self.labels is not None:
            loss = loss + o.labels * F.cross_entropy(output.float(), self.labels[index])
        return loss

    @torch.no_grad()
    def measure(self, model: nn.Module) -> tuple[torch.Tensor, float | None]:
        """Return each held out image's distance `[B]` from the original, float64, and the agreement in percent."""
        distances, same = [], 0
        for x in self.held.split(self.options.batch_size):
            with eval_mode(model, self.teacher):
                output, answer = model(x), self.teacher(x)
            distances.append(distance(output.float(), answer.float(), self.logits).double().cpu())
            same += int((output.argmax(-1) == answer.argmax(-1)).sum()) if self.logits else 0
        return torch.cat(distances), 100 * same / len(self.held) if self.logits else None

    def _plain(self) -> Iterator[torch.Tensor]:
        """Yield the images, not mirrored and not cropped; some of them corrupted, as they were in training."""
        for index in self.train.split(self.options.batch_size)[self.rank :: self.size]:
            yield self.corrupted(self.pixels[index], self.options.seed + int(index[0]))

    def _restore(self, weights: dict[str, torch.Tensor]) -> None:
        self.student.load_state_dict(weights)

    def state(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        return {
            "model": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.module.state_dict() if self.average is not None else None,
            "start": self.start,
            "before": list(self.before),
            "counts": [self.step, self.dropped],
            "losses": self.losses,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._restore(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.start, self.before = state["start"], tuple(state["before"])
        self.step, self.dropped = state["counts"]
        self.resumed_at = self.step
        self.losses = list(state["losses"])


def require_accelerate() -> None:
    """Raise `MissingExtraError` if accelerate is not installed."""
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("fine-tuning needs accelerate: pip install 'normswap[train]'") from error


def _prepared(student: nn.Module, options: FinetuneOptions) -> tuple[Any, torch.optim.Optimizer, nn.Module]:
    """Return accelerate's Accelerator, the optimiser, and the model to call (wrapped where there are processes)."""
    require_accelerate()
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    device = next(student.parameters()).device
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(cpu=device.type == "cpu", device_placement=False, kwargs_handlers=[unused])
    optimizer = create_optimizer_v2(student, opt=options.opt, lr=options.lr, weight_decay=options.weight_decay)
    return accelerator, optimizer, accelerator.prepare_model(student, device_placement=False)


@torch.no_grad()
def _first_layer(model: nn.Module, image: torch.Tensor) -> Iterator[nn.Parameter]:
    """Yield the parameters, of those that are trained, of the first layer with weights that runs on an image."""
    first: list[nn.Module] = []

    def hook(module: nn.Module, _: tuple[Any, ...]) -> None:
        first.append(module)

    layers = [
        m for m in model.modules() if any(p.ndim > 1 for p in m.parameters(recurse=False)) and not [*m.children()]
    ]
    handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        with eval_mode(model):
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    if first:
        yield from (parameter for parameter in first[0].parameters() if parameter.requires_grad)


def _average(student: nn.Module, decay: float | None) -> ModelEmaV3 | None:
    return None if decay is None else ModelEmaV3(student, decay=decay)


@contextmanager
def _trained(norms: Iterable[TokenBatchNorm], options: FinetuneOptions) -> Iterator[None]:
    """Let the BatchNorms use the statistics of each batch if they are to; everything else is in eval mode."""
    norms = list(norms)
    before = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = options.momentum
            norm.training = options.bn_mode == "train"
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum, norm.training = momentum, False


def _mean(numbers: Sequence[float]) -> float | None:
    return sum(numbers) / len(numbers) if numbers else None
