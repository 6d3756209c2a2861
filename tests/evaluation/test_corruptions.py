"""Corruptions: pixels stay pixels, chance is a matter of seed and place alone, more strength is more distance."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normswap.evaluation.corruptions import CORRUPTIONS, FAMILIES, View, random_views, without
from normswap.evaluation.stress import BRIEF, STRESS

CASES = pytest.mark.parametrize("case", STRESS, ids=lambda case: case.label)
KINDS = pytest.mark.parametrize("corruption", CORRUPTIONS.values(), ids=lambda corruption: corruption.name)
DRAWN = ("Gaussian noise", "shot noise", "impulse noise", "motion blur", "occlusion", "one colour", "uniform noise")


def pictures(count: int = 4, channels: int = 3, height: int = 24, width: int = 20) -> torch.Tensor:
    """Return smooth pixels with an edge `[B, C, H, W]`: noise has nothing that blur could take."""
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(count, channels, 5, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    smooth[:, :, : height // 3] = 1 - smooth[:, :, : height // 3]
    return smooth.clamp(0, 1)


@CASES
@settings(deadline=None, max_examples=6)
@given(channels=st.integers(1, 5), height=st.integers(1, 17), width=st.integers(1, 17), double=st.booleans())
def test_any_image_stays_one(case, channels, height, width, double):
    x = torch.rand(2, channels, height, width, dtype=torch.float64 if double else torch.float32)
    kept = x.clone()
    y = case.corruption(x, case.strength)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert torch.isfinite(y).all()
    assert (y >= 0).all()
    assert (y <= 1).all()
    assert torch.equal(x, kept)


@CASES
def test_a_seed_and_a_place_say_what_is_drawn_whatever_the_batches(case):
    x = pictures(5)
    whole = case.corruption(x, case.strength, seed=3)
    parts = [case.corruption(x[i : i + 2], case.strength, seed=3, start=i) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)
    assert torch.equal(whole, case.corruption(x, case.strength, seed=3))
    same = x[:1].expand(2, -1, -1, -1)
    first, second = case.corruption(same, case.strength, seed=3)
    other = case.corruption(same, case.strength, seed=4)[0]
    drawn = case.corruption.name in DRAWN
    assert torch.equal(first, second) is not drawn
    assert torch.equal(first, other) is not drawn


def test_the_state_of_the_process_is_left_alone():
    before = torch.get_rng_state()
    for case in STRESS:
        case.corruption(pictures(1), case.strength)
    random_views(pictures(4), seed=0)
    assert torch.equal(before, torch.get_rng_state())


@KINDS
def test_more_strength_is_more_distance(corruption):
    x = pictures(8)
    far = [float((corruption(x, s) - x).square().mean()) for s in corruption.strengths]
    assert far[0] > 0
    assert all(b > a for a, b in pairwise(far))


@pytest.mark.parametrize(
    ("name", "nothing"),
    [
        ("Gaussian noise", 0),
        ("impulse noise", 0),
        ("defocus blur", 1),
        ("contrast", 1),
        ("brighter", 0),
        ("pixelate", 1),
    ],
)
def test_no_strength_is_no_change(name, nothing):
    x = pictures()
    torch.testing.assert_close(CORRUPTIONS[name](x, nothing), x)


def test_the_strengths_are_what_their_names_say():
    grey = torch.full((4, 3, 64, 64), 0.5)
    assert (CORRUPTIONS["Gaussian noise"](grey, 0.08) - 0.5).std() == pytest.approx(0.08, rel=0.02)
    shot = CORRUPTIONS["shot noise"](grey, 60)
    assert shot.var() == pytest.approx(0.5 / 60, rel=0.05)
    hit = CORRUPTIONS["impulse noise"](grey, 5) != 0.5
    assert hit.float().mean() == pytest.approx(0.05, abs=0.005)
    assert torch.equal(hit[:, :1].expand_as(hit), hit)  # whole pixels
    hidden = CORRUPTIONS["occlusion"](grey, 25) == 0
    assert hidden.float().mean() == pytest.approx(0.25, abs=0.02)
    ramp = torch.linspace(0, 1, 64).expand(1, 1, 64, 64)
    low = CORRUPTIONS["contrast"](ramp, 0.25)
    assert (low.max() - low.min()) == pytest.approx(0.25)
    assert low.mean() == pytest.approx(0.5, abs=1e-4)
    assert torch.allclose(CORRUPTIONS["brighter"](grey, 0.4), torch.tensor(0.9))
    blocks = CORRUPTIONS["pixelate"](torch.rand(1, 1, 8, 8), 4)
    assert len(blocks.unique()) == 4
    assert float(CORRUPTIONS["black"](grey, 1).max()) == 0
    assert float(CORRUPTIONS["white"](grey, 1).min()) == 1
    colours = CORRUPTIONS["one colour"](grey, 1)
    assert torch.equal(colours, colours[:, :, :1, :1].expand_as(colours))


@pytest.mark.parametrize(("name", "width"), [("defocus blur", 9), ("motion blur", 9)])
def test_a_blurred_point_is_as_wide_as_the_name_says_and_loses_no_light(name, width):
    point = torch.zeros(8, 1, 33, 33)
    point[:, :, 16, 16] = 1
    blurred = CORRUPTIONS[name](point, width)
    torch.testing.assert_close(blurred.sum((1, 2, 3)), torch.ones(8))
    y, z = torch.nonzero(blurred.sum((0, 1)) > 1e-6).sub(16).unbind(1)
    assert float(torch.hypot(y.float(), z.float()).max()) == pytest.approx(width / 2, abs=0.8)


def test_the_brief_rows_are_among_all_and_have_every_family():
    assert set(BRIEF) < set(STRESS)
    assert {case.corruption.family for case in BRIEF} == set(FAMILIES) == {c.family for c in CORRUPTIONS.values()}
    labels = [case.label for case in STRESS]
    assert len(set(labels)) == len(labels)
    asked = {"Gaussian noise 0.04", "Gaussian noise 0.08", "Gaussian noise 0.16", "Gaussian noise 0.30"}
    asked |= {"contrast x 0.25", "brightness +0.4", "defocus blur 9 px", "impulse noise 5 %"}
    assert asked <= set(labels)


def test_views_are_drawn_by_seed_and_place_and_share():
    x = pictures(60)
    views = random_views(x, seed=1, share=0.5)
    assert torch.equal(views, torch.cat([random_views(part, 1, at, 0.5) for at, part in ((0, x[:7]), (7, x[7:]))]))
    changed = (views != x).flatten(1).any(1)
    assert 20 <= int(changed.sum()) <= 40
    assert not torch.equal(views, random_views(x, seed=2, share=0.5))
    assert torch.equal(random_views(x, seed=1, share=0), x)
    assert torch.equal(random_views(x, seed=1, views=()), x)
    assert ((views >= 0) & (views <= 1)).all()


def test_a_view_is_one_of_the_corruptions_between_its_bounds():
    x = pictures(40)
    views = random_views(x, seed=9, views=[View("contrast", 0.1, 1.3)])
    spread = (views.std((2, 3)) / x.std((2, 3))).mean(1)
    assert float(spread.min()) > 0.09
    assert float(spread.max()) < 1.31
    assert float(spread.max() - spread.min()) > 0.6


@pytest.mark.parametrize("family", FAMILIES[:-1])
def test_a_family_can_be_left_out(family):
    left = {CORRUPTIONS[view.corruption].family for view in without(family)}
    assert left == set(FAMILIES[:-1]) - {family}  # frames are no views: there is nothing in them to fit to
