"""Original and converted model side by side on corrupted images: where accuracy ends, and where numbers run away.

Nothing in a model without LayerNorm bounds the size of a token, so an image unlike those that it was calibrated on may
give answers, logits and activations that the original never gives, and clean images do not show it.
"""

import copy
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..ambient import known_context
from ..errors import ArgumentError
from ..inputs.batches import checked
from ..inputs.dataset import ImageSet, describe
from ..inputs.normalisation import Normalisation, NormalisationError
from ..model_utils import eval_mode, has_classes, widened
from ..progress import Progress, no_progress
from ..records.stress import StressRecord, StressRow
from .corruptions import CORRUPTIONS, Case
from .evaluate import Tally

STRESS: tuple[Case, ...] = tuple(Case(c, strength) for c in CORRUPTIONS.values() for strength in c.strengths)

_BRIEF = (
    ("Gaussian noise", 0.08),
    ("Gaussian noise", 0.16),
    ("impulse noise", 5),
    ("defocus blur", 9),
    ("brighter", 0.4),
    ("contrast", 0.25),
    ("JPEG", 10),
    ("occlusion", 25),
    ("black", 1),
    ("uniform noise", 1),
)
# At least one row a family, those first where a model without LayerNorm was seen to fail.
BRIEF: tuple[Case, ...] = tuple(Case(CORRUPTIONS[name], strength) for name, strength in _BRIEF)
BRIEF_SAMPLES, _BRIEF_FP16 = 256, 1 / 16

_LARGEST_FP16 = torch.finfo(torch.float16).max
# Where no module puts out more, no number in FP16 passes 65,504: a residual sum is 2 * 64 then, a product 64 * 64, a
# score of attention over 128 channels 128 * 64 * 64 / sqrt(128) = 46,341. Sums inside an operator are in float32.
_SAFE = 64.0


@known_context()
@torch.no_grad()
def stress_models(
    original: nn.Module,
    converted: nn.Module,
    images: Iterable[Any],
    rows: Sequence[Case] = STRESS,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    fp16: float = 1.0,
    amp_dtype: torch.dtype | None = None,
    progress: Progress = no_progress,
) -> StressRecord:
    """Compare two models on images as they are and on the same images corrupted, row by row.

    Images are read once. Each row costs a pass of both models over them, and a run of the converted model in half
    precision over those whose activations are not too small to overflow. A CPU takes several times as long for that.

    Args:
        original: the reference for agreement and KL.
        converted: a model with outputs of the same shape `[B, K]`.
        images: an `ImageSet`, or batches `[B, C, H, W]` (or pairs with labels `[B]`) normalised for the models.
        rows: which corruptions; `STRESS` are all, `BRIEF` ten of them.
        mean, std: of the normalisation of ``images``; default: the `ImageSet`'s, else those in timm's config.
        seed: draws the corruptions.
        fp16: share of each batch that a half-precision copy of the converted model sees, the largest logits first;
            0 for none.
        amp_dtype: autocast to it; default: the models' own dtype.
        progress: called with ("stress: row", images done in all rows, how many there are).

    Raises:
        ArgumentError: no images, or images of which `mean` and `std` are not known.

    >>> model = timm.create_model("test_vit", num_classes=3).eval()
    >>> grey = torch.zeros(4, 3, 160, 160)  # its mean and std are 0.5
    >>> record = normswap.stress_models(model, model, [grey])
    >>> len(record.rows), record.clean.agreement
    (36, 100.0)
    >>> record.rows[3].name, record.rows[3].worst_kl
    ('Gaussian noise 0.30', 0.0)
    """
    normalisation = Normalisation.of(images, original, mean, std)
    total = len(images) * (len(rows) + 1) if isinstance(images, ImageSet) else 0
    weight = next(original.parameters())
    half = _Half(converted, fp16) if fp16 else None
    tallies = [_RowTally(case) for case in (None, *rows)]
    seen = 0
    with _watched(original) as first, _watched(converted) as second:
        for batch, labels in checked(images):
            pixels = normalisation.pixels(widened(batch.to(weight.device)))
            labels = None if labels is None else labels.to(weight.device)
            for i, tally in enumerate(tallies):
                corrupted = normalisation.images(tally.corrupted(pixels, seed, seen)).to(weight)
                with torch.autocast(weight.device.type, amp_dtype) if amp_dtype else nullcontext():
                    answers = first(corrupted), second(corrupted)
                tally.update(*answers, labels, has_classes(original))
                if half is not None:
                    tally.update_half(*half(corrupted, *answers[1]))
                progress(f"stress: {tally.name}", seen * len(tallies) + (i + 1) * len(batch), total)
            seen += len(batch)
    if not seen:
        raise ArgumentError("no images to stress the models with")
    clean, *others = (tally.row() for tally in tallies)
    return StressRecord(describe(images, seen), seed, clean, others)


def brief_stress(
    original: nn.Module,
    converted: nn.Module,
    images: Iterable[Any],
    samples: int = BRIEF_SAMPLES,
    seed: int = 0,
    amp_dtype: torch.dtype | None = None,
    progress: Progress = no_progress,
) -> StressRecord:
    """Return the rows of `BRIEF` on some of the images: what every conversion can afford.

    Images whose normalisation is not known give a record without rows and with the reason.

    Args:
        original, converted, images, seed, amp_dtype, progress: see `stress_models`.
        samples: how many images at most, drawn from an `ImageSet`, the first ones of others.
    """
    some = images.draw(samples, seed) if isinstance(images, ImageSet) else list(_first(images, samples))
    try:
        return stress_models(
            original, converted, some, BRIEF, seed=seed, fp16=_BRIEF_FP16, amp_dtype=amp_dtype, progress=progress
        )
    except NormalisationError as error:
        return StressRecord(describe(some, samples), seed, None, reason=str(error))


def _first(images: Iterable[Any], count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    for batch, labels in checked(images):
        yield batch[:count], None if labels is None else labels[:count]
        count -= len(batch)
        if count <= 0:
            return


class _Watched:
    """A model that gives its outputs `[B, K]` in float64 and the largest absolute value that any module put out."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.largest: torch.Tensor | None = None

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, float]:
        self.largest = None
        logits = self.model(images).double().flatten(1)  # features of a headless model may be [B, N, C]
        return logits, _size(self.largest)

    def see(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Look at a module's output; only a number of it is kept."""
        for tensor in _tensors(output):
            if any(tensor is argument for argument in arguments):  # an identity, in a folded norm's place
                continue
            low, high = tensor.detach().aminmax()  # of a NaN, NaN
            size = torch.maximum(-low, high).float()
            self.largest = size if self.largest is None else torch.maximum(self.largest, size)


class _Half:
    """The converted model in half precision, for the images at risk.

    Args:
        model: stays as it is.
        share: of each batch.
    """

    def __init__(self, model: nn.Module, share: float) -> None:
        weights = [w for w in model.state_dict().values() if w.is_floating_point() and w.numel()]
        largest = max((_size(w.abs().max()) for w in weights), default=0.0)
        self.fits = largest <= _LARGEST_FP16
        self.runs = True
        self.model = copy.deepcopy(model).half().eval()
        self.share = share

    def __call__(self, images: torch.Tensor, logits: torch.Tensor, largest: float) -> tuple[int, int]:
        """Return of how many images the answer is known, and how many have an output that is not finite.

        Args:
            images: `[B, C, H, W]`.
            logits: the model's outputs for them `[B, K]`.
            largest: activation of the model for them.
        """
        if self.fits and largest <= _SAFE:
            return len(images), 0
        if not self.runs:
            return 0, 0
        risk = logits.abs().amax(1).nan_to_num(nan=math.inf)  # [B]
        chosen = risk.topk(math.ceil(self.share * len(images))).indices
        try:
            output = self.model(images[chosen].half())
        except RuntimeError as error:
            if "Half" not in str(error):
                raise
            self.runs = False  # an operator that has no half precision on this device; the table shows a dash
            return 0, 0
        finite = torch.isfinite(output.flatten(1)).all(1)
        return len(chosen), int((~finite).sum())


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Watched]:
    """Give a model in eval mode that is watched, and take the hooks away again."""
    watched = _Watched(model)
    handles = [module.register_forward_hook(watched.see) for module in model.modules()]
    try:
        with eval_mode(model):
            yield watched
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, Mapping):
        yield from itertools.chain.from_iterable(map(_tensors, output.values()))
    elif isinstance(output, list | tuple):
        yield from itertools.chain.from_iterable(map(_tensors, output))


def _size(value: torch.Tensor | None) -> float:
    number = 0.0 if value is None else float(value)
    return number if math.isfinite(number) else math.inf


class _RowTally:
    """Running sums of one row.

    Args:
        case: None for the images as they are.
    """

    def __init__(self, case: Case | None) -> None:
        self.case = case
        self.name = case.label if case else "clean"
        self.original, self.converted = Tally(), Tally()
        self.logits, self.activations = [0.0, 0.0], [0.0, 0.0]
        self.n_fp16 = self.non_finite_fp16 = 0

    def corrupted(self, pixels: torch.Tensor, seed: int, start: int) -> torch.Tensor:
        return pixels if self.case is None else self.case.corruption(pixels, self.case.strength, seed, start)

    def update(
        self,
        original: tuple[torch.Tensor, float],
        converted: tuple[torch.Tensor, float],
        labels: torch.Tensor | None,
        classifier: bool,
    ) -> None:
        """Add one batch: outputs `[B, K]` and the largest activation of each model, and the labels `[B]`."""
        reference = original[0]
        if converted[0].shape != reference.shape:
            shapes = [list(output.shape) for output, _ in (converted, original)]
            raise ArgumentError(f"the converted model has outputs of shape {shapes[0]}, the original {shapes[1]}")
        for i, (tally, (logits, activation)) in enumerate(
            zip((self.original, self.converted), (original, converted), strict=True)
        ):
            tally.update(logits, reference, labels, classifier)
            self.logits[i] = max(self.logits[i], _size(logits.abs().max()))
            self.activations[i] = max(self.activations[i], activation)

    def update_half(self, count: int, non_finite: int) -> None:
        """Add one batch in half precision: how many images are judged, and how many have no finite output."""
        self.n_fp16 += count
        self.non_finite_fp16 += non_finite

    def row(self) -> StressRow:
        before, after = self.original.metrics("original"), self.converted.metrics("converted")
        corruption = self.case.corruption if self.case else None
        return StressRow(
            name=self.name,
            corruption=corruption.name if corruption else "clean",
            family=corruption.family if corruption else "clean",
            strength=self.case.strength if self.case else 0.0,
            n=after.n,
            top1_original=before.top1,
            top1=after.top1,
            agreement=after.agreement,
            kl=after.kl,
            worst_kl=after.worst_kl,
            cosine=after.cosine if math.isfinite(after.cosine) else None,
            largest_logit_original=self.logits[0],
            largest_logit=self.logits[1],
            largest_activation_original=self.activations[0],
            largest_activation=self.activations[1],
            non_finite_original=before.non_finite,
            non_finite=after.non_finite,
            n_fp16=self.n_fp16,
            non_finite_fp16=self.non_finite_fp16,
        )
