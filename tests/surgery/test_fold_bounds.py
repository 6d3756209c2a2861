"""A bound stays where it is through the fold, in the units of what arrives there, and the fold stays exact."""

import copy

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normswap import fold_norms, make_plan, swap_norms
from normswap.layers import TokenAffine, TokenBatchNorm, TokenBatchNorm2d, TokenBound
from normswap.planning.graph import ModelGraph
from normswap.planning.plan import judge_norms
from normswap.surgery.fold import max_difference
from normswap.surgery.swap import batch_norms

from ..models import FAMILY, bound_norms, family, images, randomise_statistics, randomised
from ..tolerance import FOLD_FLOAT64


def _bounded(model: nn.Module) -> tuple[nn.Module, list[str], torch.Tensor]:
    plan = make_plan(model)
    sites = [site.path for site in plan.swapped_sites]
    swapped = randomise_statistics(swap_norms(model, plan)).eval()
    x = images(model, 3)
    return bound_norms(swapped, sites, x), sites, x


def _unbounded(swapped: nn.Module) -> nn.Module:
    bare = copy.deepcopy(swapped)
    for norm in batch_norms(bare).values():
        norm.lower = norm.upper = None
    return bare


@pytest.mark.parametrize("name", FAMILY)
def test_family_folds_exactly(name):
    swapped, sites, x = _bounded(family(name, torch.float64))
    fused = fold_norms(swapped)
    assert not batch_norms(fused)
    assert all(isinstance(fused.get_submodule(site), TokenBound) for site in sites)
    with torch.no_grad():
        scale = max(1.0, float(swapped(x).abs().max()))
    for images_ in (x, 10 * x):
        assert max_difference(swapped, fused, [images_]) <= FOLD_FLOAT64 * scale
    # They bite: without them the answers are others, before the fold and after.
    assert max_difference(swapped, _unbounded(swapped), [x]) > 1e-3 * scale
    for site in sites:
        module = fused.get_submodule(site)
        module.lower = module.upper = None
    assert max_difference(swapped, fused, [x]) > 1e-3 * scale


def test_maps_fold_exactly():
    swapped, sites, x = _bounded(randomised(timm.create_model("test_convnext")).double().eval())
    fused = fold_norms(swapped)
    with torch.no_grad():
        scale = max(1.0, float(swapped(x).abs().max()))
    assert max_difference(swapped, fused, [x]) <= FOLD_FLOAT64 * scale
    maps = [site for site in sites if isinstance(swapped.get_submodule(site), TokenBatchNorm2d)]
    assert all(fused.get_submodule(site).lower.shape[1:] == (1, 1) for site in maps)
    assert maps


class _Chain(nn.Module):
    """A norm that reads a norm, and goes on to a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = TokenBatchNorm(5), TokenBatchNorm(5), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.second(self.first(x)))


@settings(max_examples=20)  # each traces a model
@given(seed=st.integers(0, 10_000), zero=st.booleans())
def test_a_norm_that_takes_on_another_takes_its_bound_along(seed, zero):
    torch.manual_seed(seed)
    model = randomise_statistics(_Chain()).double().eval()
    for norm in (model.first, model.second):
        ends = torch.randn(2, 5).double().sort(0).values
        norm.set_bound(*ends)
    if zero:  # a channel that is constant behind the first norm
        with torch.no_grad():
            model.first.weight[seed % 5] = 0
    x = 3 * torch.randn(64, 5).double()
    verdicts = judge_norms(ModelGraph(model, x[:2]), list(batch_norms(model)))
    assert verdicts["first"].targets[0].side == "norm"
    fused = fold_norms(model, verdicts=verdicts)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)


def test_dtype_and_training_flag_are_kept():
    swapped, sites, _ = _bounded(family("headless"))
    fused = fold_norms(swapped.bfloat16())
    found = [fused.get_submodule(site) for site in sites]
    assert {module.lower.dtype for module in found} == {torch.bfloat16}
    assert not any(module.training for module in found)
    assert any(isinstance(module, TokenAffine) for module in found)
    assert not set(fused.state_dict()) & {f"{site}.lower" for site in sites}


def test_what_is_not_finite_stays_visible():
    swapped, _, x = _bounded(family("vit"))
    fused = fold_norms(swapped)
    with torch.no_grad():
        assert bool(torch.isnan(fused(torch.full_like(x, torch.nan))).all())
