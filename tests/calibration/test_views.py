"""Calibration images with corruptions: which images change, that the result holds on noise, and what is refused."""

import pytest
import torch

import normswap
from normswap.calibration.views import viewed
from normswap.demo import FOLDER, MODEL
from normswap.evaluation.corruptions import CORRUPTIONS, without
from normswap.inputs.batches import ImageBatches
from normswap.inputs.normalisation import Normalisation, NormalisationError

UNIT = Normalisation((0.0,), (1.0,))


def _images(count: int = 60) -> ImageBatches:
    return ImageBatches([torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))], torch.zeros(1))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_corrupted_copies_come_behind_images_that_stay_to_the_bit(share):
    batches = _images()
    some = viewed(batches, UNIT, share)
    assert some.input_size == batches.input_size
    assert some.image_count == sum(map(len, some)) == batches.image_count * (1 + share)
    for batch, more in zip(batches, some, strict=True):
        copies = more[len(batch) :]
        assert torch.equal(more[: len(batch)], batch)
        changed = (copies - batch[: len(copies)]).abs().flatten(1).amax(1) > 1e-6
        assert int((~changed).sum()) <= 2  # the mildest strengths of a kind change nothing
    again = viewed(batches, UNIT, share)
    assert all(torch.equal(a, b) for a, b in zip(some, again, strict=True))


def test_a_family_can_be_left_out():
    kinds = {CORRUPTIONS[view.corruption].family for view in without("noise")}
    assert "noise" not in kinds
    assert kinds


def test_images_of_another_normalisation_are_refused():
    model = normswap.load_model(MODEL)
    swapped = normswap.swap_norms(model)
    options = normswap.CalibrationOptions(method="channel", views=0.5)
    with pytest.raises(NormalisationError, match="not from 0 to 1"):
        normswap.calibrate(swapped, [9 * torch.randn(8, 3, 32, 32)], model, options)
    with pytest.raises(normswap.ArgumentError, match="`views` must be a number of copies"):
        normswap.CalibrationOptions(views=1.5).check()


def test_calibration_with_views_holds_better_on_noise():
    """On the demo, with and without corrupted copies; the bound is far from both results."""
    model = normswap.load_model(MODEL)
    images = normswap.load_images(model, FOLDER, "train")
    validation = normswap.load_images(model, FOLDER, "validation").draw(120, seed=0)
    noise = CORRUPTIONS["Gaussian noise"]
    normalisation = Normalisation.of(validation, model)
    noisy = [(normalisation.images(noise(normalisation.pixels(x), 0.16)), y) for x, y in validation]
    agreement = {}
    for views in (0.0, 0.5):
        options = normswap.CalibrationOptions(views=views, refine_steps=2)
        result = normswap.convert(model, images, eval_images=noisy, calibration=options)
        agreement[views] = result.report.stages[-1].agreement
        assert result.report.views == views
    assert agreement[0.5] > agreement[0.0] + 5
