"""What decides whether a fine-tuned model is taken, and what is refused before anything is computed."""

import re
import sys

import pytest
import torch
from hypothesis import given, strategies

import normswap
from normswap import ArgumentError, FinetuneOptions
from normswap.demo import FOLDER
from normswap.finetuning import trainer as training
from normswap.finetuning.losses import gain_of

from ..models import family, images
from .test_finetune import LEARN, copied, same_weights, started


@pytest.fixture(scope="module")
def start():
    return started()


def test_never_worse_than_before(start):
    original, swapped, batches = start
    student = copied(swapped)
    found = normswap.finetune(student, batches, original, FinetuneOptions(lr=0.02, batch_size=24))
    assert not found.taken
    assert not found.kl_after < found.kl_before
    assert same_weights(student, swapped.state_dict())
    assert "no sure gain, so the weights before it stay" in found.line()


@pytest.mark.parametrize("sure", [0.0, 1e9])
def test_a_gain_must_be_surer_than_chance(start, monkeypatch, sure):
    original, swapped, batches = start
    monkeypatch.setattr(training, "SURE", sure)
    student = copied(swapped)
    found = normswap.finetune(student, batches, original, LEARN)
    assert found.kl_after < found.kl_before
    assert found.taken is (sure == 0)
    assert same_weights(student, swapped.state_dict()) is not found.taken


@given(
    distances=strategies.lists(strategies.floats(0, 100), min_size=1, max_size=40),
    shift=strategies.floats(-5, 5),
    seed=strategies.integers(0, 99),
)
def test_a_gain_and_its_error(distances, shift, seed):
    before = torch.tensor(distances, dtype=torch.float64)
    same, none = gain_of(before, before - shift)
    assert same == pytest.approx(shift, abs=1e-9)
    assert none == pytest.approx(0, abs=1e-9)  # every image alike: no chance in it
    after = before + torch.randn(len(before), generator=torch.Generator().manual_seed(seed))
    gain, error = gain_of(before, after)
    differences = (before - after).numpy()
    assert gain == pytest.approx(differences.mean(), abs=1e-9)
    assert error == pytest.approx(differences.std() / len(differences) ** 0.5, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"opt": "nosuch"}, "timm cannot make the optimiser 'nosuch' here"),
        ({"batch_size": 200}, "144 images to train on (16 held out) are fewer than one step takes, 200"),
    ],
)
def test_mistakes_are_found_before_calibration(start, options, text):
    original, _, batches = start
    said = []
    chosen = FinetuneOptions(**{**vars(LEARN), **options})
    with pytest.raises(ArgumentError, match=re.escape(text)):
        normswap.convert(
            original,
            batches,
            finetune=normswap.FinetuneStage(options=chosen, images=batches),
            progress=lambda *args: said.append(args),
        )
    assert not said


def test_more_images_than_memory_are_refused_unread(start, monkeypatch):
    original, swapped, _ = start
    monkeypatch.setattr(sys.modules["normswap.finetuning.finetune"], "default_budget", lambda: 2**20)
    split = normswap.load_images(original, FOLDER, "train")
    split.transform = None  # reading one would fail
    with pytest.raises(ArgumentError, match=r"320 images of \[3, 32, 32\] need 0\.0 GiB of memory, 0\.0 are free"):
        normswap.finetune(copied(swapped), split, original, LEARN)


def test_features_of_a_headless_model_are_no_logits(tmp_path):
    """Their distance is the squared error relative to their variance; a softmax over features would mean nothing."""
    original = family("headless")
    swapped = normswap.swap_norms(original)
    batches = [images(original, 40)]
    normswap.calibrate(swapped, batches, original=original, options=normswap.CalibrationOptions(method="channel"))
    held = images(original, 6, seed=5)
    with torch.no_grad():
        answer = original(held)
        expected = (swapped.eval()(held) - answer).square().mean() / answer.var()
    found = normswap.finetune(swapped, batches, original, FinetuneOptions(5, batch_size=8), held_out=[held])
    assert found.kl_before == pytest.approx(float(expected), rel=1e-4)
    assert found.agreement_before is found.agreement_after is None
    assert found.kl_after < found.kl_before
    with pytest.raises(ArgumentError, match="the model has no classes"):
        normswap.finetune(swapped, [(batches[0], torch.zeros(40))], original, FinetuneOptions(batch_size=8, labels=1.0))
