"""Values that no transform has normalised: whole numbers are refused, odd ranges warned of, right ones not."""

import warnings

import pytest
import torch

import normswap
from normswap import ArgumentError, evaluate_models, load_images, load_model
from normswap.demo import FOLDER, MODEL
from normswap.inputs.ranges import check_range, range_problem

CHANNEL = normswap.CalibrationOptions(method="channel")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def images(model):
    return next(iter(load_images(model, FOLDER, "train", samples=40, batch_size=40)))[0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_refused_before_the_work(model, images, dtype):
    bytes_ = ((images * 0.5 + 0.5) * 255).round().to(dtype)
    calls = []
    with pytest.raises(ArgumentError, match=r"images are whole numbers .*normalise"):
        normswap.convert(model, [bytes_], calibration=CHANNEL, progress=lambda *call: calls.append(call))
    with pytest.raises(ArgumentError, match="images are whole numbers"):
        normswap.convert(model, [images], eval_images=[bytes_], progress=lambda *call: calls.append(call))
    assert not calls
    with pytest.raises(ArgumentError, match="images are whole numbers"):
        evaluate_models({"model": model}, iter([bytes_]))


@pytest.mark.parametrize("where", ["calibration", "evaluation"])
def test_floats_of_0_to_255_are_warned_of(model, images, where):
    wide = (images * 0.5 + 0.5) * 255
    sets = ([wide], [images]) if where == "calibration" else ([images], [wide])
    with pytest.warns(UserWarning, match=r"do not look normalised: values from 0 to 255, .* they lie in -1\.\.1"):
        normswap.convert(model, sets[0], eval_images=sets[1], calibration=CHANNEL)


@pytest.mark.parametrize("stats", [IMAGENET, ((0.5,) * 3, (0.5,) * 3)])
def test_the_right_range_is_let_pass_and_wrong_ones_are_not(model, monkeypatch, stats):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in stats)
    monkeypatch.setattr(model, "pretrained_cfg", {**model.pretrained_cfg, "mean": stats[0], "std": stats[1]})
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        dark, light = torch.rand(2, generator=generator).sort().values
        pixels = dark + (light - dark) * torch.rand(8, 3, 16, 16, generator=generator)  # of any brightness and contrast
        assert range_problem((pixels - mean) / std, model) is None
        assert range_problem(pixels * 255 + 100, model) is not None
    pixels = torch.rand(8, 3, 16, 16, generator=generator)
    assert range_problem(pixels, model) is not None
    assert range_problem(pixels * 255 - 127, model) is not None
    assert range_problem(torch.randn(8, 3, 16, 16, generator=generator), model) is None
    assert range_problem(torch.zeros(8, 3, 16, 16), model) is None


def test_images_of_load_images_and_models_without_a_config_pass(model, images):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normswap.convert(model, load_images(model, FOLDER, "train", samples=20), calibration=CHANNEL)
        check_range(images * 300, torch.nn.Linear(2, 2))
