"""Fold: exact for random statistics of every size, on every member of the family, and all or nothing."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normswap import ArgumentError, FoldError, calibrate, fold_norms, make_plan, swap_norms
from normswap.layers import NormedLinear, TokenAffine, TokenBatchNorm, TokenBatchNorm2d
from normswap.surgery.fold import created_biases, fold_input, fold_output, max_difference
from normswap.surgery.swap import batch_norms

from ..models import FAMILY, family, images, randomise_statistics
from ..tolerance import FOLD_FLOAT32, FOLD_FLOAT64, LINEAR_FLOAT64


def _swapped(name: str, position: str = "pre-act", dtype: torch.dtype = torch.float64) -> nn.Module:
    model = family(name, dtype)
    return randomise_statistics(swap_norms(model, ffn_bn=position)).eval()  # type: ignore[arg-type]


def _norm(kind: type[TokenBatchNorm], channels: int, seed: int) -> TokenBatchNorm:
    torch.manual_seed(seed)
    return randomise_statistics(nn.Sequential(kind(channels)))[0].double().eval()  # type: ignore[index]


@settings(max_examples=60, deadline=None)
@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    bias=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_linear_forward_and_backward(inputs, outputs, bias, seed):
    before, after = _norm(TokenBatchNorm, inputs, seed), _norm(TokenBatchNorm, outputs, seed + 1)
    linear = nn.Linear(inputs, outputs, bias=bias).double()
    b = linear.bias if bias else torch.zeros(outputs).double()
    x = torch.randn(2, 3, inputs).double()
    expected = after(linear(before(x)))
    weight, b = fold_input(linear.weight, b, *before.affine64())
    weight, b = fold_output(weight, b, *after.affine64())
    torch.testing.assert_close(nn.functional.linear(x, weight, b), expected, rtol=LINEAR_FLOAT64, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]), kernel=st.integers(1, 3), stride=st.integers(1, 2), seed=st.integers(0, 10_000)
)
def test_unpadded_convolution(groups, kernel, stride, seed):
    before, after = _norm(TokenBatchNorm2d, 4, seed), _norm(TokenBatchNorm2d, 8, seed + 1)
    conv = nn.Conv2d(4, 8, kernel, stride, groups=groups).double()
    x = torch.randn(2, 4, 5, 5).double()
    expected = after(conv(before(x)))
    weight, bias = fold_input(conv.weight, conv.bias, *before.affine64(), groups=groups)
    weight, bias = fold_output(weight, bias, *after.affine64())
    folded = nn.functional.conv2d(x, weight, bias, stride, groups=groups)
    torch.testing.assert_close(folded, expected, rtol=LINEAR_FLOAT64, atol=1e-9)


# The FFNs are of few kinds, so in the other place one of each will do.
@pytest.mark.parametrize(
    ("name", "position"),
    [*((n, "pre-act") for n in FAMILY), *((n, "post-act") for n in ("vit", "deit3", "swiglu", "glu", "scale_norms"))],
)
def test_family_folds_exactly(name, position):
    swapped = _swapped(name, position)
    fused = fold_norms(swapped)
    x = images(swapped)
    with torch.no_grad():
        scale = float(swapped(x).abs().max())
    assert max_difference(swapped, fused, [x]) <= FOLD_FLOAT64 * max(1.0, scale)
    assert not batch_norms(fused)
    assert not any(isinstance(m, nn.LayerNorm | NormedLinear) for m in fused.modules())
    affine = [path for path, m in fused.named_modules() if isinstance(m, TokenAffine)]
    assert len(affine) == FAMILY[name][3].get("affine", 0)
    # The step did something: the same weights without the norms answer differently.
    bare = copy.deepcopy(swapped)
    for path in batch_norms(bare):
        bare.set_submodule(path, nn.Identity())
    assert max_difference(swapped, bare, [x]) > 1e-3 * scale


@pytest.mark.parametrize("name", ["vit", "clip", "qk_norm_no_bias", "headless"])
def test_calibrated_model_folds_in_float32(name):
    model = family(name)
    swapped = swap_norms(model)
    calibrate(swapped, [images(model, 16)], original=model)
    fused = fold_norms(swapped)
    assert 0 < max_difference(swapped, fused, [images(model, 16)]) < FOLD_FLOAT32


@pytest.mark.parametrize("name", ["vit", "headless", "qk_norm_no_bias", "clip"])
def test_folding_twice_changes_nothing(name):
    once = fold_norms(_swapped(name))
    twice = fold_norms(once)
    assert twice is not once
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))


def test_biases_are_made_where_none_was():
    model = family("qk_norm_no_bias", torch.float64)
    fused = fold_norms(randomise_statistics(swap_norms(model)))
    assert created_biases(model, fused) == ["blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"]
    bias = fused.blocks[0].attn.qkv.bias
    assert bias.dtype == torch.float64
    assert bias.requires_grad
    assert bias.abs().min() > 0


def test_what_is_carried_over():
    swapped = _swapped("vit", dtype=torch.bfloat16)
    swapped.head.weight.requires_grad_(False)
    swapped.drop_flag = swapped.pos_drop.train()
    fused = fold_norms(swapped)
    assert {p.dtype for p in fused.parameters()} == {torch.bfloat16}
    assert (fused.head.weight.requires_grad, fused.head.bias.requires_grad) == (False, True)
    assert fused.pos_drop.training
    assert not fused.norm.training


def test_inplace_keeps_the_parameters():
    swapped = _swapped("vit")
    weight = swapped.head.weight
    before = weight.clone()
    fused = fold_norms(swapped, inplace=True)
    assert fused is swapped
    assert fused.head.weight is weight
    assert not torch.equal(weight, before)


def test_training_mode_is_refused():
    with pytest.raises(ArgumentError, match="eval"):
        fold_norms(_swapped("vit").train())


@pytest.mark.parametrize("inplace", [True, False])
def test_overflow_is_refused_and_nothing_is_assigned(inplace):
    swapped = _swapped("vit", dtype=torch.float32)
    swapped.norm.running_var.fill_(0)
    swapped.norm.eps = 0.0
    swapped.norm.weight.data.fill_(1.0)
    before = copy.deepcopy(swapped.state_dict())
    with pytest.raises(FoldError, match="norm: its scale or shift is not finite"):
        fold_norms(swapped, inplace=inplace)
    swapped.norm.eps = 1e-38
    swapped.head.weight.data.fill_(1e30)
    before = copy.deepcopy(swapped.state_dict())
    with pytest.raises(FoldError, match=r"head\.weight: not finite"):
        fold_norms(swapped, inplace=inplace)
    assert all(torch.equal(before[k], v) for k, v in swapped.state_dict().items())


def test_a_weight_tied_after_the_swap_is_not_folded_into():
    """Two heads on one weight: whatever is folded, the other reader must not change."""
    swapped = _swapped("deit_distilled")
    swapped.head_dist.weight = swapped.head.weight
    fused = fold_norms(swapped)
    assert max_difference(swapped, fused, [images(swapped)]) <= FOLD_FLOAT64
    assert isinstance(fused.norm, TokenAffine)


def test_kept_layer_norms_stay_and_the_rest_folds():
    model = family("vit", torch.float64)
    plan = make_plan(model, keep=["blocks.0.norm1"])
    swapped = randomise_statistics(swap_norms(model, plan)).eval()
    fused = fold_norms(swapped)
    assert [p for p, m in fused.named_modules() if isinstance(m, nn.LayerNorm)] == ["blocks.0.norm1"]
    assert max_difference(swapped, fused, [images(model)]) <= FOLD_FLOAT64


@pytest.mark.parametrize("architecture", ["swin_tiny_patch4_window7_224", "convnext_atto", "beit_base_patch16_224"])
def test_other_families_fold_exactly_or_stay_affine(architecture):
    import timm

    small = {
        "swin_tiny_patch4_window7_224": {"img_size": 72, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)},
        "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
        "beit_base_patch16_224": {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 2},
    }
    model = timm.create_model(architecture, num_classes=5, **small[architecture]).double().eval()
    swapped = randomise_statistics(swap_norms(model)).eval()
    fused = fold_norms(swapped)
    x = images(model)
    with torch.no_grad():
        scale = float(swapped(x).abs().max())
    assert max_difference(swapped, fused, [x]) <= FOLD_FLOAT64 * max(1.0, scale)


def test_nan_counts_as_infinite_difference():
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float("nan")

    assert max_difference(nn.Identity(), Broken(), [torch.ones(1, 2)]) == float("inf")
