"""How a norm is set: the least squares that each method promises, on what the converted model really feeds it."""

import numpy as np
import pytest
import torch
from torch import nn

from normswap import (
    CalibrationOptions,
    calibrate,
    make_plan,
    swap_norms,
)
from normswap.calibration.options import METHODS

from ..models import family, images


def _calibrated(
    model: nn.Module, batches, method: str = "channel", ffn_bn: str = "pre-act", bound: str = "auto"
) -> nn.Module:
    swapped = swap_norms(model, ffn_bn=ffn_bn)  # type: ignore[arg-type]
    calibrate(swapped, batches, original=model, options=CalibrationOptions(method=method, bound=bound))
    return swapped


@torch.no_grad()
def _input_of(model: nn.Module, path: str, x: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model(x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("path", ["blocks.0.norm1", "blocks.1.norm1", "norm"])
def test_channel_is_least_squares_on_the_converted_models_own_input(path):
    """Against numpy's least squares, on what hooks see in the finished models: the sites before it are set."""
    model = family("vit", torch.float64)
    x = images(model, 12)
    swapped = _calibrated(model, [x], bound="tight")
    tokens = _input_of(swapped, path, x).reshape(-1, 48)  # [B, N, C] -> [M, C]
    layer_norm = model.get_submodule(path)
    original = layer_norm(_input_of(model, path, x)).reshape(-1, 48)
    target = ((layer_norm(tokens) + original) / 2).detach().numpy()
    scale, shift = swapped.get_submodule(path).affine64()
    bounded = swapped.get_submodule(path).bounded(tokens).detach()
    assert not torch.equal(bounded, tokens)
    for c in range(0, 48, 7):
        design = np.stack([bounded[:, c].numpy(), np.ones(len(tokens))], 1)
        (slope, intercept), *_ = np.linalg.lstsq(design, target[:, c], rcond=None)
        np.testing.assert_allclose([scale[c], shift[c]], [slope, intercept], rtol=1e-8, atol=1e-8)


def test_moments_is_batch_norm_with_layer_norms_own_affine():
    model = family("vit", torch.float64)
    x = images(model, 12)
    swapped = _calibrated(model, [x], "moments")
    for path in ("blocks.0.norm1", "norm"):
        norm, layer_norm = swapped.get_submodule(path), model.get_submodule(path)
        tokens = _input_of(swapped, path, x).reshape(-1, 48)
        torch.testing.assert_close(norm.running_mean, tokens.mean(0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(norm.running_var, tokens.var(0, correction=0), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(norm.weight, layer_norm.weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(norm.bias, layer_norm.bias, rtol=1e-9, atol=1e-9)


def test_channel_fits_better_than_moments_at_every_first_site():
    model = family("vit", torch.float64)
    fits = {}
    for method in METHODS:
        fits[method] = calibrate(
            swap_norms(model), [images(model, 16)], original=model, options=CalibrationOptions(method=method)
        ).sites
    assert fits["channel"][0].r2 > fits["moments"][0].r2
    assert fits["channel"][0] == fits["reconstruct"][0]  # where nothing has been re-solved yet
    assert fits["channel"][0].r2 == pytest.approx(fits["channel"][0].r2_original)
    assert all(fit.r2 <= 1 and fit.samples == 16 * 5 for fit in fits["channel"])


@pytest.mark.parametrize("position", ["pre-act", "post-act"])
def test_ffn_norms_get_statistics_and_stay_an_identity(position):
    model = family("vit")
    x = images(model, 12)
    without, with_norms = _calibrated(model, [x], ffn_bn="none"), _calibrated(model, [x], ffn_bn=position)
    path = "blocks.0.mlp.fc1.norm" if position == "pre-act" else "blocks.0.mlp.norm"
    norm = with_norms.get_submodule(path)
    tokens = _input_of(with_norms, path, x).reshape(-1, norm.num_features)
    torch.testing.assert_close(norm.running_mean, tokens.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, tokens.var(0, correction=0), rtol=1e-4, atol=1e-5)
    assert norm.running_var.std() > 0
    with torch.no_grad():
        assert torch.equal(with_norms(x), without(x))


def test_a_trained_ffn_norm_keeps_its_map():
    model = family("vit", torch.float64)
    swapped = swap_norms(model)
    norm = swapped.blocks[0].mlp.fc1.norm
    norm.weight.data.uniform_(0.5, 2)
    norm.bias.data.normal_()
    before = norm.affine64()
    calibrate(swapped, [images(model, 8)], original=model)
    torch.testing.assert_close(norm.affine64(), before, rtol=1e-9, atol=1e-9)


def test_a_constant_channel_gets_no_slope():
    model = family("vit")
    model.pos_embed.data[..., 0] = 0
    model.cls_token.data[..., 0] = 5
    model.patch_embed.proj.weight.data[0] = 0
    model.patch_embed.proj.bias.data[0] = 5
    scale, shift = _calibrated(model, [images(model, 8)]).blocks[0].norm1.affine64()
    assert scale[0] == 0
    assert torch.isfinite(scale).all()
    assert torch.isfinite(shift).all()


def test_kept_sites_are_passed_through():
    model = family("vit", torch.float64)
    plan = make_plan(model, keep=["blocks.0.norm2"])
    swapped = swap_norms(model, plan)
    fits = calibrate(swapped, [images(model, 8)], original=model).sites
    assert [fit.site for fit in fits] == ["blocks.0.norm1", "blocks.1.norm1", "blocks.1.norm2", "norm"]


@pytest.mark.parametrize("name", ["vit", "dinov2_registers"])
def test_fit_is_told_for_prefix_and_patch_tokens_apart(name):
    """Against what hooks see; the class token is the same in every image at first, and still has a fit."""
    model = family(name, torch.float64)
    x = images(model, 12)
    swapped = swap_norms(model)
    fits = {
        fit.site: fit
        for fit in calibrate(swapped, [x], original=model, options=CalibrationOptions(method="channel")).sites
    }
    for path, fit in fits.items():
        tokens = _input_of(swapped, path, x)
        wanted, given = model.get_submodule(path)(tokens), swapped.get_submodule(path)(tokens)
        left = (wanted - given).square().detach()
        total = (wanted - wanted.mean((0, 1))).square().detach()
        prefix = model.num_prefix_tokens
        for r2, part in ((fit.r2, slice(None)), (fit.r2_prefix, slice(prefix)), (fit.r2_patch, slice(prefix, None))):
            assert r2 == pytest.approx(float(1 - left[:, part].sum() / total[:, part].sum()), abs=1e-6), path
        assert fit.r2_prefix != fit.r2_patch


def test_without_prefix_tokens_all_are_patches():
    model = family("avg_pool")
    swapped = swap_norms(model)
    fits = calibrate(swapped, [images(model, 12)], original=model, options=CalibrationOptions(method="channel")).sites
    pooled = fits[-1]
    assert pooled.site == "fc_norm"
    assert (pooled.r2_prefix, pooled.r2_patch) == (None, pooled.r2)
    assert fits[0].r2_prefix is not None  # the class token is there, and is left out of the average
