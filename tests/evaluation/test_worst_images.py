"""The images that changed most: the right ones, in order, never more than asked for, as pictures that are theirs."""

import base64
import io
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from normswap import (
    CalibrationOptions,
    EvaluationOptions,
    evaluate_models,
    load_images,
)
from normswap.demo import FOLDER, MODEL
from normswap.evaluation.worst_images import WorstImages, thumbnail
from normswap.pipeline.open_model import open_model
from normswap.records.report import SiteFit
from normswap.reporting.conversion_tables import fit_line, printable, worst_rows
from normswap.reporting.model_card import model_card

from ..models import family, images
from ..reporting.page import HOSTILE, convert

KL = st.one_of(st.floats(0, 10), st.just(math.inf), st.just(0.0))


@settings(deadline=None, max_examples=60)
@given(st.lists(KL, max_size=30), st.integers(0, 6), st.integers(1, 7))
def test_the_largest_are_kept_whatever_the_batches(values, count, size):
    worst = WorstImages(count)
    logits = torch.zeros(len(values), 3)
    for start in range(0, len(values), size):
        rows = slice(start, start + size)
        kl = torch.tensor(values, dtype=torch.float64)[rows]
        worst.update(torch.zeros(len(kl), 3, 4, 4), kl, logits[rows], logits[rows])
        assert len(worst) <= count
    expected = sorted((i for i, value in enumerate(values) if value > 0), key=lambda i: (-values[i], i))[:count]
    found = worst.found()
    assert [image.position for image in found] == expected
    assert [image.kl for image in found] == [values[i] for i in expected]
    assert [image.name for image in found] == [f"image {i}" for i in expected]


def test_no_more_images_are_held_than_asked_for():
    worst = WorstImages(2)
    batch = torch.randn(16, 3, 8, 8)
    worst.update(batch, torch.arange(16.0), torch.zeros(16, 3), torch.zeros(16, 3))
    held = [entry[2][0] for entry in worst._heap]
    assert len(held) == 2
    assert all(image.untyped_storage().nbytes() == image.nbytes for image in held)  # no view of the whole batch


def test_evaluation_shows_first_and_last_model():
    torch.manual_seed(1)
    first = family("vit")
    torch.manual_seed(2)
    last = family("vit")
    x, labels = images(first, 12), torch.arange(12) % 7
    worst = WorstImages(3)
    plain = evaluate_models({"a": first, "b": last}, [(x, labels)])
    stages = evaluate_models({"a": first, "b": last}, [(x[:5], labels[:5]), (x[5:], labels[5:])], worst=worst)
    assert stages[1].worst_kl == pytest.approx(plain[1].worst_kl)
    with torch.no_grad():
        p, q = first(x).double(), last(x).double()
    kl = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1)
    found = worst.found(["zero", "one"])
    assert [image.position for image in found] == kl.topk(3).indices.tolist()
    for image in found:
        at = image.position
        assert image.kl == pytest.approx(float(kl[at]), rel=1e-5)
        assert image.label == {0: "zero", 1: "one"}.get(at % 7, str(at % 7))
        for answers, logits in ((image.original, p[at]), (image.converted, q[at])):
            best = logits.softmax(0).topk(3)
            assert [a.index for a in answers] == best.indices.tolist()
            assert [a.percent for a in answers] == pytest.approx((100 * best.values).tolist(), rel=1e-4)


def test_a_model_that_gives_nan_is_infinitely_far_and_has_no_answer():
    worst = WorstImages(1)
    logits = torch.tensor([[0.0, float("nan")]])
    worst.update(torch.zeros(1, 3, 2, 2), torch.tensor([math.inf]), torch.zeros(1, 2), logits)
    (image,) = worst.found()
    assert (image.kl, image.converted, image.label) == (math.inf, [], None)
    assert worst_rows([image]) == [["image 0", "-", "0 50.0 %", "not finite", "inf"]]


@pytest.mark.parametrize(
    ("channels", "size", "kind"), [(3, 20, "png"), (1, 20, "png"), (3, 300, "jpeg"), (4, 20, "png")]
)
def test_a_thumbnail_is_the_image_before_normalisation(channels, size, kind):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    original = torch.linspace(0, 1, size).expand(channels, size, size) * torch.linspace(0.2, 1, channels)[:, None, None]
    many = torch.tensor([*mean, 0.5])[:channels, None, None], torch.tensor([*std, 0.5])[:channels, None, None]
    uri = thumbnail((original - many[0]) / many[1], mean, std)
    head, _, data = uri.partition(",")
    assert head == f"data:image/{kind};base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert max(picture.size) == min(size, 160)
    expected = original[:3] if channels == 3 else original[:1]
    pixels = torch.from_numpy(np.asarray(picture).copy()).float() / 255
    pixels = pixels.movedim(-1, 0) if pixels.ndim == 3 else pixels[None]  # [H, W, C] -> [C, H, W]
    expected = torch.nn.functional.interpolate(expected[None], pixels.shape[1:], mode="area")[0]
    assert (pixels - expected).abs().mean() < 0.01  # rounding to 1/255, and JPEG


def test_a_thumbnail_of_nothing_finite_is_black():
    uri = thumbnail(torch.full((3, 4, 4), float("nan")), (0.5,), (0.2,))
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert picture.getextrema() == ((0, 0),) * 3


def test_names_are_those_of_the_files_that_were_read():
    images_of = load_images(open_model(MODEL), FOLDER, "validation")
    assert images_of.classes == [str(i) for i in range(10)]
    names = [images_of.filename(i) for i in range(len(images_of))]
    assert len(set(names)) == 360
    images_of.skipped = {names[0]: "broken", names[2]: "broken"}
    assert [images_of.filename(i) for i in range(3)] == [names[1], names[3], names[4]]
    part = load_images(open_model(MODEL), FOLDER, "validation").draw(5, 1)
    assert [part.filename(i) for i in range(5)] == [names[i] for i in part.dataset.indices]


@pytest.fixture(scope="module")
def result():
    return convert(calibration=CalibrationOptions(method="channel"), evaluation=EvaluationOptions(worst_images=2))


def test_a_conversion_reports_them(result):
    assert len(result.report.worst) == len(result._thumbnails) == 2
    assert result.report.worst[0].kl == pytest.approx(result.report.stages[-1].worst_kl)
    card = model_card(result.report, {})
    assert f"| {result.report.worst[0].name} |" in card
    assert fit_line(result.report.fits) in card
    assert "changed most" not in model_card(replace(result.report, worst=[]), {})


def test_others_text_cannot_break_the_card_or_the_terminal(result):
    hostile = replace(result.report.worst[0], name=HOSTILE, label="a|b\n[c](d)")
    card = model_card(replace(result.report, worst=[hostile]), {})
    card.encode()
    (row,) = [line for line in card.splitlines() if "hacked" in line]
    assert row.count("|") == 6
    assert "<script" not in row
    assert "[c]" not in row
    assert printable("a\x1b[31m\u202eb\udcff\n") == "a\ufffd[31m\ufffdb\ufffd\ufffd"
    assert printable({"k": ["\x00", 1, None]}) == {"k": ["\ufffd", 1, None]}


def test_the_fit_in_one_line():
    assert fit_line([]) is None
    fits = [SiteFit("a", 9, 0.9, 0.8, 0.95, 0.3), SiteFit("b", 9, 0.7, 0.6, 0.65, 0.5), SiteFit("c", 9, 0.8, 0.6)]
    assert fit_line(fits) == (
        "R2 of the norms: median 0.800, lowest 0.700 (b); on prefix tokens median 0.400, lowest 0.300 (a)"
    )
    assert fit_line(fits[2:]) == "R2 of the norms: median 0.800, lowest 0.800 (c)"
