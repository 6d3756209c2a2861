"""Top-1, top-5 and agreement with the original, over the same images, in one pass."""

from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from timm.utils import accuracy
from torch import nn
from torch.nn import functional

from ..ambient import known_context
from ..errors import ArgumentError
from ..inputs.batches import checked
from ..inputs.labels import check_labels
from ..model_utils import eval_mode, has_classes, single_output
from ..module_state import check_weights
from ..progress import Progress, no_progress
from ..records.report import StageMetrics
from .worst_images import WorstImages

# About so many images tell whether a step between the first and the last model broke something.
BRIEF = 512


def kl_divergence(output: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return KL(reference || output) of the softmax of logits `[B, K]` for every image `[B]`, in nats.

    >>> kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2))
    tensor([0.])
    """
    return functional.kl_div(output.log_softmax(1), reference.log_softmax(1), reduction="none", log_target=True).sum(1)


class Tally:
    """Running sums of one model's metrics, over batches."""

    def __init__(self) -> None:
        self.n = self.labelled = self.non_finite = 0
        self.top1 = self.top5 = self.agreement = self.kl = self.cosine = 0.0
        self.worst_kl = 0.0
        self.is_classifier = True

    def update(
        self, logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor | None, classifier: bool
    ) -> torch.Tensor | None:
        """Add one batch of outputs `[B, K]` in float64, the reference model's and the labels `[B]`.

        Return the KL of each image `[B]`, None for headless models.
        """
        n = len(logits)
        self.n += n
        self.is_classifier = classifier
        self.non_finite += int((~torch.isfinite(logits)).any(1).sum())
        self.cosine += float(functional.cosine_similarity(logits, reference).sum())
        if not classifier:
            return None
        self.agreement += float((logits.argmax(1) == reference.argmax(1)).sum())
        # A model that gives NaN is infinitely far away; a rounding below zero is zero.
        divergence = kl_divergence(logits, reference).nan_to_num(nan=float("inf")).clamp_min(0)
        self.kl += float(divergence.sum())
        self.worst_kl = max(self.worst_kl, float(divergence.max()))
        if labels is not None:
            top1, top5 = accuracy(logits, labels, topk=(1, 5))
            self.top1 += float(top1) * n / 100
            self.top5 += float(top5) * n / 100
            self.labelled += n
        return divergence

    def metrics(self, name: str) -> StageMetrics:
        """Return what the sums come to."""

        def percent(count: float, of: int) -> float | None:
            return 100 * count / of if of and self.is_classifier else None

        return StageMetrics(
            name=name,
            n=self.n,
            top1=percent(self.top1, self.labelled),
            top5=percent(self.top5, self.labelled),
            agreement=percent(self.agreement, self.n),
            kl=self.kl / self.n if self.is_classifier else None,
            worst_kl=self.worst_kl if self.is_classifier else None,
            cosine=self.cosine / self.n,
            non_finite=self.non_finite,
        )


@known_context()
@torch.no_grad()
def evaluate_models(
    models: Mapping[str, nn.Module],
    batches: Iterable[Any],
    amp_dtype: torch.dtype | None = None,
    progress: Progress = no_progress,
    total: int = 0,
    worst: WorstImages | None = None,
    answers: dict[int, torch.Tensor] | None = None,
    brief: Collection[str] = (),
) -> list[StageMetrics]:
    """Measure several models on the same images; the first one is the reference for agreement and KL.

    Args:
        models: by name; all with outputs of the same shape `[B, K]`.
        batches: images `[B, C, H, W]`, or pairs with labels `[B]` (or None), which count from 0; see
            `normswap.inputs.batches.checked`.
        amp_dtype: autocast to it; default: the models' own dtype.
        progress: called with ("evaluate", images done, ``total``).
        total: how many images there will be; 0 if nobody knows.
        worst: is shown every image with the first and the last model's outputs, to keep those furthest apart.
        answers: of the first model, by number of the batch: taken where there, else put there. So the original runs
            once if it is measured against again and again on the same batches.
        brief: names of models between the first and the last that are measured on every so manieth image only, on about
            `BRIEF` images in all, where ``total`` is more than that.

    Raises:
        ArgumentError: the first or the last model in ``brief``, no images, images that are not normalised, labels of no
            class, or models with outputs of different shapes.
        ModelRefusedError: a model answers with something else than one tensor.

    >>> model = timm.create_model("test_vit", num_classes=3).eval()
    >>> images, labels = torch.zeros(4, 3, 160, 160), torch.tensor([0, 1, 2, 0])
    >>> first, same = evaluate_models({"original": model, "copy": model}, [(images, labels)])
    >>> same.name, same.n, same.agreement, same.kl
    ('copy', 4, 100.0, 0.0)
    """
    check_weights(*models.values())
    if {next(iter(models)), list(models)[-1]} & set(brief):
        raise ArgumentError("`brief` holds the first or the last model: the one is the reference, the other the result")
    tallies = {name: Tally() for name in models}
    first = next(iter(models.values()))
    weight = next(first.parameters())
    classifier = has_classes(first)
    done, every = 0, max(total // BRIEF, 1)
    with eval_mode(*models.values()):
        for number, (images, labels) in enumerate(checked(batches)):
            images = images.to(weight)
            reference: torch.Tensor | None = None
            for name, model in models.items():
                # Folders are read class by class, so the part is spread over all images.
                part = slice(-done % every, None, every) if name in brief else slice(None)
                some = images[part]
                if not len(some):
                    continue
                known = answers.get(number) if answers and model is first else None
                cast = torch.autocast(weight.device.type, amp_dtype) if amp_dtype else nullcontext()
                with cast:
                    # One in half precision may stand beside the others in float32.
                    own = some.to(next(model.parameters(), weight))
                    output = single_output(model(own), name, len(some)) if known is None else known
                if answers is not None and model is first:
                    answers[number] = output
                logits = output.double().flatten(1)  # features of a headless model may be [B, N, C]
                if reference is None:
                    reference = logits
                    if labels is not None and classifier:
                        labels = check_labels(labels, len(images), logits.shape[1]).to(weight.device)
                if logits.shape[1:] != reference.shape[1:]:
                    raise ArgumentError(
                        f"{name} has outputs of shape {list(logits.shape)}, the reference {list(reference.shape)}"
                    )
                known_labels = None if labels is None else labels[part]
                divergence = tallies[name].update(logits, reference[part], known_labels, classifier)
            if worst is not None and divergence is not None and reference is not None:
                worst.update(images, divergence, reference, logits, labels)
            done += len(images)
            progress("evaluate", done, max(done, total))
    if not done:
        raise ArgumentError("no images to evaluate on")
    return [tally.metrics(name) for name, tally in tallies.items()]
