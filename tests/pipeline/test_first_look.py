"""What is wrong with images, labels or answers is said before the work, and nothing is lost by looking."""

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap import FinetuneOptions, FinetuneStage

from ..models import family, images

CHANNEL = normswap.CalibrationOptions(method="channel")


class _Answers(nn.Module):
    """A model whose answer is not the logits alone."""

    def __init__(self, change) -> None:
        super().__init__()
        self.net, self.change = family("vit"), change

    def forward(self, x):
        return self.change(self.net(x))


X, LABELS = torch.randn(12, 3, 32, 32), torch.arange(12) % 7
FOUND = {
    "a dict without images": ([{"x": X}], "`eval_images`: images must be .*there is a dict with 'x'"),
    "wrong length": ([(X, LABELS[:11])], "`eval_images`: 12 images with 11 labels"),
    "wrong length, numpy": ([(X, np.arange(11))], "`eval_images`: 12 images with 11 labels"),
    "soft labels": ([(X, torch.full((12, 7), 1 / 7))], "`eval_images`: .*not one-hot"),
    "labels from 1": ([(X, LABELS + 1)], "`eval_images`: label 7, and the model has classes 0 to 6"),
    "another size": ([X[..., :16, :16]], r"`eval_images`: the model cannot run on images of \[3, 16, 16\]"),
    "channels last": ([X.movedim(1, -1)], r"`eval_images`: .*\[32, 32, 3\].*are the channels last"),
    "integers": ([X.byte()], "`eval_images`: images are whole numbers .uint8."),
    "none": ([], "`eval_images`: there are no images"),
}


@pytest.fixture
def no_work(monkeypatch):
    def work(*_, **__):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("normswap.pipeline.steps.make_plan", work)


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("once", [False, True])
def test_evaluation_images_are_looked_at_before_the_work(name, once, no_work):
    given, says = FOUND[name]
    eval_images = (item for item in given) if once else given
    with pytest.raises(normswap.NormswapError, match=says) as caught:
        normswap.convert(family("vit"), [X], eval_images=eval_images)
    assert caught.value.exit_code == (3 if "cannot run" in says or "channels" in says else 2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "says"),
    [
        (FinetuneStage(images=[X[..., :16, :16]]), "`images` of the fine-tuning: the model cannot run"),
        (FinetuneStage(FinetuneOptions(labels=1.0), images=[X]), "`images` of the fine-tuning: .*no labels"),
        (FinetuneStage(FinetuneOptions(labels=1.0)), "`images`: .*no labels"),
        (FinetuneStage(FinetuneOptions(labels=1.0), images=[(X, LABELS + 1)]), "`images` of the fine-tuning: label 7"),
        (FinetuneStage(held_out=[X.byte()]), "`held_out`: images are whole numbers .uint8."),
    ],
)
def test_images_of_the_fine_tuning_are_looked_at_before_the_work(stage, says, no_work):
    with pytest.raises(normswap.NormswapError, match=says):
        normswap.convert(family("vit"), [X], finetune=stage)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda y: {"logits": y, "loss": 0}, r"the model answers with a dict \(logits, loss\), not with one tensor"),
        (lambda y: (y, y), "the model answers with a tuple"),
        (lambda y: y.sum(), r"the model answers 2 images with a tensor \[\]"),
        (lambda y: y[:1], r"the model answers 2 images with a tensor \[1, 7\]"),
    ],
    ids=["dict", "tuple", "number", "one row"],
)
def test_the_models_answer_is_looked_at_before_the_work(change, says, no_work):
    model = _Answers(change)
    with pytest.raises(normswap.ModelRefusedError, match=says) as caught:
        normswap.convert(model, [X])
    assert "\n" not in str(caught.value)
    with pytest.raises(normswap.ModelRefusedError, match="answers"):
        normswap.evaluate_models({"the model": model}, [X[:2]])


def test_a_plan_of_a_model_that_answers_a_dict_is_refused():
    with pytest.raises(normswap.ModelRefusedError, match="answers with a dict"):
        normswap.make_plan(_Answers(lambda y: {"logits": y}), input_size=(3, 32, 32))


def test_iterators_lose_nothing_by_being_looked_at():
    model = family("vit")
    counts = (2, 3, 7)
    stage = FinetuneStage(
        FinetuneOptions(batch_size=4, epochs=1), (x for x in X.split(5)), held_out=iter(X[:6].split(2))
    )
    result = normswap.convert(
        model,
        (x for x in X.split(counts)),
        eval_images=zip(X.split(counts), LABELS.split(counts), strict=True),
        calibration=CHANNEL,
        finetune=stage,
    )
    report = result.report
    assert (report.calib_samples, report.stages[0].n) == (12, 12)
    assert (report.finetuning.images, report.finetuning.held_out) == (12, 6)
    same = normswap.convert(model, [X.clone()], eval_images=[(X, LABELS)], calibration=CHANNEL).report
    assert same.stages[0].top1 == pytest.approx(report.stages[0].top1)


def test_evaluation_images_of_another_size_are_fine_where_the_model_takes_them():
    model = family("dynamic_size")
    report = normswap.convert(model, [images(model, 8)], eval_images=[torch.randn(4, 3, 48, 48)], calibration=CHANNEL)
    assert report.report.stages[-1].n == 4
