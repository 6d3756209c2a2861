"""Images in every form that can mean one thing only are read alike; everything else is refused in one line."""

from collections import UserDict

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import normswap
from normswap.inputs.batches import BATCH_SIZE, ImageBatches, checked, gather, rebatched
from normswap.records.report import ConversionReport

from ..models import family, images

COUNT, CLASSES = 40, 7
PIXELS = torch.randn(COUNT, 3, 32, 32, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(COUNT) % CLASSES
ONE_HOT = torch.nn.functional.one_hot(LABELS, CLASSES)


class _Singles(Dataset):
    """As users write it: no `__iter__`, and no IndexError at the end."""

    def __init__(self, item) -> None:
        self.item = item

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int):
        return self.item(index % COUNT)


class _Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(PIXELS, LABELS.tolist(), strict=True))


def _split(*tensors: torch.Tensor):
    return zip(*(tensor.split(9) for tensor in tensors), strict=True)


# Each as a function, since some can be gone through only once.
WITH_LABELS = {
    "pairs": lambda: list(_split(PIXELS, LABELS)),
    "generator": lambda: ([x, y] for x, y in _split(PIXELS, LABELS)),
    "one pair": lambda: (PIXELS, LABELS),
    "one pair of arrays": lambda: (PIXELS.numpy(), LABELS.numpy()),
    "hugging face": lambda: [{"pixel_values": x, "labels": y} for x, y in _split(PIXELS, LABELS)],
    "hugging face, label": lambda: [UserDict({"pixel_values": x, "label": y}) for x, y in _split(PIXELS, LABELS)],
    "hugging face, one batch": lambda: {"pixel_values": PIXELS, "labels": LABELS},
    "hugging face, single": lambda: [{"pixel_values": x, "labels": y} for x, y in zip(PIXELS, LABELS, strict=True)],
    "dataset": lambda: _Singles(lambda i: (PIXELS[i], int(LABELS[i]))),
    "dataset of dicts": lambda: _Singles(lambda i: {"image": PIXELS[i].numpy(), "label": np.int64(LABELS[i])}),
    "tensor dataset": lambda: TensorDataset(PIXELS, LABELS),
    "iterable dataset": _Stream,
    "loader": lambda: DataLoader(TensorDataset(PIXELS, LABELS), batch_size=9),
    "numpy": lambda: [(x.numpy(), y.numpy()) for x, y in _split(PIXELS, LABELS)],
    "lists of labels": lambda: [(x, y.tolist()) for x, y in _split(PIXELS, LABELS)],
    "one-hot": lambda: list(_split(PIXELS, ONE_HOT)),
    "one-hot, float": lambda: list(_split(PIXELS, ONE_HOT.float())),
    "one-hot, single": lambda: list(zip(PIXELS, ONE_HOT, strict=True)),
    "column": lambda: list(_split(PIXELS, LABELS[:, None])),
    "float labels": lambda: list(_split(PIXELS, LABELS.double())),
    "int16 labels": lambda: list(_split(PIXELS, LABELS.short())),
    "an empty batch between": lambda: [(PIXELS[:9], LABELS[:9]), (PIXELS[:0], LABELS[:0]), (PIXELS[9:], LABELS[9:])],
}
WITHOUT = {
    "tensor": lambda: PIXELS,
    "array": PIXELS.numpy,
    "batches stacked": lambda: PIXELS.reshape(5, 8, 3, 32, 32),
    "read-only array": lambda: _read_only(PIXELS.numpy().copy()),
    "reversed array": lambda: PIXELS.flip(0).numpy()[::-1],
    "big-endian array": lambda: PIXELS.numpy().astype(">f4"),
    "dataset of tensors": lambda: _Singles(lambda i: PIXELS[i]),
    "single images": lambda: list(PIXELS),
    "file names": lambda: [(x, ["name"] * len(x)) for x in PIXELS.split(9)],
    "no labels": lambda: [(x, None) for x in PIXELS.split(9)],
    "tensors that want gradients": lambda: [PIXELS.clone().requires_grad_() * 1],
}


def _read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize("form", [*WITH_LABELS, *WITHOUT])
def test_every_form_is_read_alike(form):
    make = WITH_LABELS.get(form) or WITHOUT[form]
    pixels, labels = gather(make(), torch.zeros(1))
    assert torch.equal(pixels, PIXELS)
    assert not pixels.requires_grad
    if form in WITH_LABELS:
        assert labels.dtype == torch.int64
        assert torch.equal(labels, LABELS)
    else:
        assert labels is None
    assert torch.equal(torch.cat(list(rebatched(make(), 7))), PIXELS)
    batches = ImageBatches(make(), torch.zeros(1))
    assert all(torch.equal(a, b) for a, b in zip(batches, ImageBatches([PIXELS], torch.zeros(1)), strict=True))


def test_single_images_come_in_batches_and_are_read_one_batch_ahead_at_most():
    read = []
    found = iter(checked(_Singles(lambda i: (read.append(i), PIXELS[i])[1])))
    assert len(next(found)[0]) == BATCH_SIZE
    assert read == list(range(BATCH_SIZE))
    assert len(next(found)[0]) == COUNT - BATCH_SIZE


X = torch.zeros(4, 3, 8, 8)
REFUSED = {
    "images are whole numbers .uint8.": X.to(torch.uint8),
    "images are whole numbers .int64.": [X.long()],
    "a path: read the images with normswap.load_images": "train",
    "this is NoneType|this is None": None,
    "one Tensor of images must be .*not .3, 8, 8.": X[0],
    "one ndarray of images must be": X[:, 0].numpy(),
    "there is str": ["train/a.png"],
    "there is a dict with 'x'": [{"x": X}],
    "there is an empty tuple": [()],
    "there is Tensor .4.": [torch.zeros(4)],
    "there is None": [None],
    "4 images with 3 labels": [(X, torch.zeros(3, dtype=torch.long))],
    "4 images with 5 labels": {"pixel_values": X, "labels": np.zeros(5)},
    "not one-hot": [(X, torch.full((4, 7), 1 / 7))],
    "some are no whole numbers": [(X, torch.tensor([0.5, 1, 2, 3]))],
    "one is -1": [(X, [0, 1, -1, 2])],
    "class numbers .B., not float32 .4, 3, 8, 8.": [(X, X)],
    "must all have one size; there are .3, 8, 8. and .3, 9, 9.": [X[0], torch.zeros(3, 9, 9)],
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_is_no_batch_of_images_is_refused_in_one_line(says):
    with pytest.raises(normswap.ArgumentError, match=says) as caught:
        list(checked(REFUSED[says]))
    assert "\n" not in str(caught.value)


def test_an_image_without_a_transform_says_so():
    from PIL import Image

    with pytest.raises(normswap.ArgumentError, match="there is Image: a transform to tensors is missing"):
        list(checked([(Image.new("RGB", (8, 8)), 3)]))


@pytest.mark.parametrize("form", ["hugging face", "one pair of arrays", "dataset"])
def test_convert_and_finetune_take_them(form):
    make = WITH_LABELS[form]
    options = normswap.CalibrationOptions(method="channel")
    stage = normswap.FinetuneStage(normswap.FinetuneOptions(batch_size=16, labels=0.5), make(), make())
    report = normswap.convert(family("vit"), make(), eval_images=make(), calibration=options, finetune=stage).report
    assert (report.calib_samples, report.finetuning.images, report.finetuning.held_out) == (COUNT, COUNT, COUNT)
    assert all(stage.n == COUNT and stage.top1 is not None for stage in report.stages)


@pytest.mark.parametrize("form", ["hugging face", "one pair of arrays", "dataset"])
def test_the_other_entry_points_take_them(form, tmp_path, monkeypatch):
    monkeypatch.setattr("normswap.benchmarking.benchmark.warm_up", lambda step, clock: 1.0)
    monkeypatch.setattr("normswap.benchmarking.benchmark.steps_per_turn", lambda *_, **__: 1)
    model, make = family("vit"), WITH_LABELS[form]
    swapped = normswap.swap_norms(model)
    normswap.calibrate(swapped, make(), model, normswap.CalibrationOptions(method="channel"))
    report = ConversionReport("vit", "vit", "channel", "pre-act", COUNT, {}, [], [], "", "")
    fused = normswap.fuse(normswap.Swapped(swapped, model, normswap.make_plan(model), report), make(), original=model)
    (measured,) = normswap.evaluate_models({"fused": fused.model}, make())
    assert (fused.report.stages[-1].n, measured.n) == (COUNT, COUNT)
    assert fused.report.stages[-1].top1 == pytest.approx(measured.top1)
    exported = normswap.export_model(fused.model, tmp_path / "model.pt2", make(), "pt2")
    assert exported.comparison.n == COUNT
    timed = normswap.benchmark_models(model, fused.model, images=make(), rounds=3, batch_sizes=(2,))
    assert timed.settings["images"] == "2 images"


def test_labels_beyond_the_models_classes_are_refused():
    model = family("vit")
    with pytest.raises(normswap.ArgumentError, match="label 7, and the model's classes are 0 to 6"):
        normswap.evaluate_models({"original": model}, [(images(model, 2), [7, 0])])
