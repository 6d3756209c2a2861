"""The images that a conversion changed most, kept while evaluating: never more of them than asked for."""

import base64
import heapq
import io
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image

from ..records.worst_images import Answer, WorstImage

_ANSWERS = 3
_THUMBNAIL = 160  # pixels of the longer side
_LOSSLESS = 64  # smaller ones are PNG: JPEG would blur what little there is


class WorstImages:
    """Keeps the ``count`` images with the largest KL of those it is shown; ties go to the earlier one.

    Args:
        count: how many at most; images and answers of no others are held.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen = 0
        self._heap: list[tuple[float, int, Any]] = []  # smallest KL first; position negative, so no two are equal

    def __len__(self) -> int:
        return len(self._heap)

    def update(
        self,
        images: torch.Tensor,
        kl: torch.Tensor,
        original: torch.Tensor,
        converted: torch.Tensor,
        labels: torch.Tensor | None = None,
    ) -> None:
        """Look at one batch.

        Args:
            images: `[B, C, H, W]`, as the model sees them.
            kl: `[B]`, infinite where an output is not finite; images at 0 are not kept.
            original, converted: outputs `[B, K]`.
            labels: `[B]`.
        """
        for row, value in enumerate(kl.tolist()):
            place = -(self.seen + row)
            full = len(self._heap) >= self.count
            if value <= 0 or self.count < 1 or (full and (value, place) < self._heap[0][:2]):
                continue
            label = None if labels is None else int(labels[row])
            kept = (images[row].float().cpu().clone(), label, _best(original[row]), _best(converted[row]))
            (heapq.heapreplace if full else heapq.heappush)(self._heap, (value, place, kept))
        self.seen += len(images)

    def found(self, classes: Sequence[str] = (), name_of: Callable[[int], str] | None = None) -> list[WorstImage]:
        """Return what was kept, worst first.

        Args:
            classes: their names; the index stands for a class without one.
            name_of: gives the name of an image by its position.
        """

        def name(index: int) -> str:
            return classes[index] if 0 <= index < len(classes) else str(index)

        def named(answers: list[tuple[int, float]]) -> list[Answer]:
            return [Answer(index, name(index), percent) for index, percent in answers]

        result = []
        for kl, place, (_, label, original, converted) in self._sorted():
            file = name_of(-place) if name_of else f"image {-place}"
            text = None if label is None else name(label)
            result.append(WorstImage(-place, file, kl, text, named(original), named(converted)))
        return result

    def thumbnails(self, mean: Sequence[float], std: Sequence[float]) -> list[str]:
        """Return what was kept as small pictures, worst first, each a ``data:`` URI.

        Args:
            mean, std: of the normalisation that is to be undone.
        """
        return [thumbnail(kept[0], mean, std) for *_, kept in self._sorted()]

    def _sorted(self) -> list[tuple[float, int, Any]]:
        return sorted(self._heap, key=lambda entry: entry[:2], reverse=True)


def _best(logits: torch.Tensor) -> list[tuple[int, float]]:
    """Return the likeliest classes of `[K]` and their percentages, none if a number is not finite."""
    if not torch.isfinite(logits).all():
        return []
    values, indices = logits.double().softmax(0).topk(min(_ANSWERS, len(logits)))
    return list(zip(indices.tolist(), (100 * values).tolist(), strict=True))


def thumbnail(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> str:
    """Return a normalised image `[C, H, W]` as a small picture in a ``data:`` URI; of C other than 3 the first only."""
    channels = 3 if len(image) == 3 else 1
    shape = (channels, 1, 1)
    mean, std = (list(itertools.islice(itertools.cycle(v), channels)) for v in (mean, std))
    pixels = image[:channels].float() * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)
    bytes_ = (pixels.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8)
    array = bytes_.permute(1, 2, 0).squeeze(-1) if channels == 1 else bytes_.permute(1, 2, 0)  # [C, H, W] -> [H, W, C]
    picture = Image.fromarray(array.contiguous().numpy())
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    kind = "PNG" if max(picture.size) <= _LOSSLESS else "JPEG"
    file = io.BytesIO()
    picture.save(file, kind, **({"quality": 85} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
