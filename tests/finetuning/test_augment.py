"""Corrupted training images: which change, what the default is, and what is refused."""

import pytest
import torch

import normswap
from normswap import FinetuneOptions
from normswap.demo import FOLDER, MODEL
from normswap.finetuning.augment import Corrupted
from normswap.inputs.normalisation import Normalisation, NormalisationError


@pytest.fixture(scope="module")
def model():
    return normswap.load_model(MODEL)


@pytest.fixture(scope="module")
def pictures(model):
    return normswap.load_images(model, FOLDER, "train").draw(60, 0)


def pixels_of(images) -> torch.Tensor:
    return torch.cat([x for x, _ in images])


def test_about_a_share_is_corrupted_and_another_seed_corrupts_others(model, pictures):
    x = pixels_of(pictures)
    corrupted = Corrupted.of(0.5, pictures, x, model)
    once, again, other = corrupted(x, 1), corrupted(x, 1), corrupted(x, 2)
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    changed = (once - x).abs().flatten(1).amax(1) > 1e-5  # the way to pixels and back rounds
    assert 15 <= int(changed.sum()) <= 45
    Normalisation.of(pictures, model).pixels(once)  # still pixels in 0..1, or this raises


def test_half_of_the_images_unless_they_are_no_pixels(model, pictures):
    noise = [9 * torch.randn(8, 3, 32, 32)]
    assert Corrupted.of(None, pictures, pixels_of(pictures), model).share == 0.5
    assert Corrupted.of(None, noise, noise[0], model) == Corrupted.of(0.0, noise, noise[0], model)
    with pytest.raises(NormalisationError, match="not from 0 to 1"):
        Corrupted.of(0.25, noise, noise[0], model)
    with pytest.raises(normswap.ArgumentError, match="`views` must be a share"):
        FinetuneOptions(views=1.5).check()


def test_training_sees_them_and_says_so(model, pictures):
    weights = {}
    for share in (None, 0.0):
        swapped = normswap.swap_norms(model)
        options = normswap.CalibrationOptions(method="channel")
        normswap.calibrate(swapped, pictures, model, options)
        found = normswap.finetune(swapped, pictures, model, FinetuneOptions(batch_size=27, lr=1e-3, views=share))
        assert found.options["views"] == str(0.5 if share is None else 0.0)
        weights[share] = torch.cat([found.kl_after * torch.ones(1), *(p.flatten() for p in swapped.parameters())])
    assert not torch.equal(weights[None], weights[0.0])
