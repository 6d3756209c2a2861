"""Bounds on what arrives at a norm: between quantiles, as tight as images held out allow, whatever comes later."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import normswap
from normswap.calibration.bounds import NONE, SHARES, _Rows, channel_ranges, chosen
from normswap.demo import FOLDER, MODEL
from normswap.evaluation.corruptions import CORRUPTIONS
from normswap.inputs.normalisation import Normalisation
from normswap.layers import TokenBatchNorm
from normswap.surgery.fold import max_difference
from normswap.surgery.swap import batch_norms

from ..models import family, images


def _ranges(tokens: torch.Tensor, places: torch.Tensor | None = None) -> dict:
    return channel_ranges(tokens, torch.zeros(len(tokens), dtype=torch.long) if places is None else places)


def _options(bound: str, **more) -> normswap.CalibrationOptions:
    return normswap.CalibrationOptions(method="channel", bound=bound, **more)


def _calibrated(model: nn.Module, x: torch.Tensor, bound: str) -> tuple[nn.Module, dict[str, str]]:
    swapped = normswap.swap_norms(model)
    found = normswap.calibrate(swapped, [x], model, _options(bound))
    return swapped.eval(), {fit.site: fit.bound for fit in found.sites}


@given(rows=st.integers(1, 300), seed=st.integers(0, 1000))
def test_ranges_are_torchs_quantiles(rows, seed):
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed)).double()
    for name, (lower, upper) in _ranges(x).items():
        tail = (1 - SHARES[name]) / 2
        torch.testing.assert_close(lower, x.quantile(tail, 0))
        torch.testing.assert_close(upper, x.quantile(1 - tail, 0))


def test_a_place_unlike_the_others_has_quantiles_of_its_own():
    patches, prefix = torch.randn(20_000, 3), 20 + torch.randn(50, 3)
    tokens, places = torch.cat([patches, prefix]), torch.cat([1 + torch.arange(20_000) % 400, torch.zeros(50).long()])
    for name, (lower, upper) in _ranges(tokens, places).items():
        assert torch.equal(lower, _ranges(tokens)[name][0])
        assert torch.equal(upper, _ranges(prefix)[name][1])
    # Together the few prefix tokens would be cut off.
    assert (_ranges(tokens)["tight"][1] < 5).all()
    assert _ranges(patches, places[:-50])["tight"][1].equal(_ranges(patches)["tight"][1])


class _Around(nn.Module):
    """A model of one's own around timm's, which does not say how many prefix tokens there are."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_the_class_token_is_found_where_nobody_tells_of_it():
    model = family("vit")
    with torch.no_grad():
        model.cls_token.mul_(6)
        model.pos_embed[:, 0].mul_(6)
    x = images(model, 200)
    bare, _ = _calibrated(model, x, "tight")
    swapped = normswap.swap_norms(_Around(model), normswap.make_plan(_Around(model), input_size=(3, 32, 32)))
    normswap.calibrate(swapped, [x], _Around(model), _options("tight"))
    for norm in (bare.get_submodule("blocks.0.norm1"), swapped.get_submodule("inner.blocks.0.norm1")):
        seen: list[torch.Tensor] = []
        norm.register_forward_pre_hook(lambda m, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            (bare if norm is bare.get_submodule("blocks.0.norm1") else swapped).eval()(x)
        class_token = seen[0][:, 0]
        assert ((class_token < norm.lower) | (class_token > norm.upper)).double().mean() < 0.05


def test_the_choice_is_made_on_images_held_out():
    """Few tokens, many channels: a range of those fitted to cuts off what the others have."""
    norm, layer_norm = TokenBatchNorm(384), nn.LayerNorm(384)
    rows, torch_rows = _Rows(norm), torch.randn(40, 384)
    for number, part in enumerate(torch_rows.split(8)):
        rows.add(number, part, torch.zeros(8, dtype=torch.bool), 5)
    assert rows.choice(layer_norm) == NONE
    plenty = _Rows(norm)
    for number, part in enumerate((torch.randn(20_000, 384) * (0.5 + torch.rand(20_000, 1))).split(4000)):
        plenty.add(number, part, torch.zeros(4000, dtype=torch.bool), 5)
    assert plenty.choice(layer_norm) == "tight"


def test_without_images_held_out_nothing_is_bounded():
    model = family("vit")
    _, found = _calibrated(model, images(model, 4), "auto")
    assert set(found.values()) == {NONE}


def test_names_go_from_tight_to_wide():
    (tight, wide) = _ranges(torch.randn(5000, 3)).values()
    assert (wide[0] < tight[0]).all()
    assert (tight[1] < wide[1]).all()


@pytest.mark.parametrize(
    ("errors", "name"),
    [((1.0, 1.0, 1.0), "tight"), ((1.2, 1.01, 1.0), "wide"), ((9.0, 1.2, 1.0), "none"), ((0.5, 2.0, 1.0), "tight")],
)
def test_the_tightest_that_hardly_costs_is_chosen(errors, name):
    assert chosen(dict(zip(("tight", "wide", NONE), errors, strict=True))) == name


def test_an_error_that_is_no_number_bounds_nothing():
    assert chosen({"tight": float("nan"), "wide": float("nan"), NONE: float("nan")}) == NONE


@pytest.mark.parametrize("name", ["vit", "clip", "qk_norm"])
def test_no_channel_leaves_its_range(name):
    model = family(name)
    x = images(model, 40)
    swapped, found = _calibrated(model, x, "tight")
    assert set(found.values()) == {"tight"}
    seen = {}
    for site in found:
        norm = swapped.get_submodule(site)
        norm.register_forward_hook(lambda m, inputs, y, site=site: seen.update({site: (m.bounded(inputs[0]), y)}))
    with torch.no_grad():
        swapped(100 * x)
    for site in found:
        norm = swapped.get_submodule(site)
        within, y = seen[site]
        assert (norm.tokens(within) >= norm.lower).all()
        assert (norm.tokens(within) <= norm.upper).all()
        scale, shift = (v.float() for v in norm.affine64())
        torch.testing.assert_close(norm.tokens(y), norm.tokens(within) * scale + shift, rtol=1e-4, atol=1e-4)


def test_none_leaves_everything_as_it_was_and_clears_what_was_there():
    model = family("vit")
    x = images(model, 40)
    swapped, found = _calibrated(model, x, "tight")
    assert any(name.endswith(".lower") for name in swapped.state_dict())
    normswap.calibrate(swapped, [x], model, _options("none"))
    fresh, found = _calibrated(model, x, "none")
    assert set(found.values()) == {"none"}
    assert swapped.state_dict().keys() == fresh.state_dict().keys()
    assert max_difference(swapped.eval(), fresh, [x]) < 1e-4  # the statistics between the FFN layers are set anew
    assert not any("lower" in name for name in fresh.state_dict())


def test_state_dicts_load_into_a_fresh_swap():
    model = family("clip")
    x = images(model, 40)
    swapped, _ = _calibrated(model, x, "tight")
    fresh = normswap.swap_norms(model).eval()
    fresh.load_state_dict(swapped.state_dict())
    assert max_difference(swapped, fresh, [10 * x]) == 0


def test_a_bound_behind_a_writer_is_set_once_the_writer_is_solved():
    """In a stem the norm's output is the stream; its bound must be of what the solved layer gives."""
    model = family("clip")
    x = images(model, 192)
    swapped = normswap.swap_norms(model)
    options = normswap.CalibrationOptions(bound="tight", refine_steps=1)
    found = normswap.calibrate(swapped, [x], model, options)
    assert next(fit.bound for fit in found.sites if fit.site == "norm_pre") == "tight"
    norm, seen = swapped.get_submodule("norm_pre"), []
    norm.register_forward_pre_hook(lambda m, inputs: seen.append(m.tokens(inputs[0])))
    with torch.no_grad():
        swapped.eval()(x)
    outside = ((seen[0] < norm.lower) | (seen[0] > norm.upper)).double().mean(0)
    assert outside.max() < 0.03  # of 1 %, and the quantiles are of a part of the rows


def test_fitting_is_done_within_the_bounds():
    """Channels that are cut off far from their mean still meet the LayerNorm's mean."""
    model = family("vit")
    x = images(model, 40)
    tight, _ = _calibrated(model, x, "tight")
    free, _ = _calibrated(model, x, "none")
    first = "blocks.0.norm1"
    assert not torch.equal(tight.get_submodule(first).weight, free.get_submodule(first).weight)
    variances = [m.get_submodule(first).running_var for m in (tight, free)]
    assert (variances[0] < variances[1]).all()


def test_outputs_keep_their_size_on_images_unlike_those_of_the_calibration():
    """On the demo, uniform noise and frames of one colour; without bounds the logits are many times the original's."""
    model = normswap.load_model(MODEL)
    train = normswap.load_images(model, FOLDER, "train").draw(160, seed=0)
    normalisation = Normalisation.of(train, model)
    pixels = torch.rand(32, *model.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0))
    frames = [CORRUPTIONS[name](pixels, 1) for name in ("uniform noise", "one colour", "white")]
    x = torch.cat([normalisation.images(frame) for frame in frames])
    largest = {}
    with torch.no_grad():
        for bound in ("none", "auto"):
            options = normswap.CalibrationOptions(bound=bound, views=0, refine_steps=2)
            largest[bound] = float(normswap.convert(model, train, calibration=options).model(x).abs().max())
        original = float(model.eval()(x).abs().max())
    assert largest["auto"] < 2.5 * original
    assert largest["none"] > 5 * largest["auto"]


def test_unknown_bounds_are_refused():
    with pytest.raises(normswap.ArgumentError, match="`bound` must be one of auto, none, wide, tight, not 'loose'"):
        _options("loose").check()


def test_training_sees_bounded_inputs():
    model = family("vit")
    x = images(model, 40)
    swapped, _ = _calibrated(model, x, "tight")
    norm = next(iter(batch_norms(swapped).values()))
    tokens = norm.tokens(100 * torch.randn(4, 5, norm.num_features))
    with torch.no_grad():
        norm.train()
        y = norm(tokens)
        norm.lower = norm.upper = None
        assert not torch.allclose(y, norm(tokens))
