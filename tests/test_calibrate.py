"""Calibration: the least squares it promises, site after site, whatever the batches, in about one pass."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from normswap import ArgumentError, CalibrationError, calibrate, make_plan, swap_norms
from normswap.calibrate import METHODS, rebatched
from normswap.norm import TokenBatchNorm
from normswap.swap import batch_norms

from .models import FAMILY, family, images
from .tolerance import SPLIT


def _calibrated(model: nn.Module, batches, method: str = "channel", ffn_bn: str = "pre-act") -> nn.Module:
    swapped = swap_norms(model, ffn_bn=ffn_bn)  # type: ignore[arg-type]
    calibrate(swapped, batches, original=model, method=method)
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
    swapped = _calibrated(model, [x])
    tokens = _input_of(swapped, path, x).reshape(-1, 48)  # [B, N, C] -> [M, C]
    layer_norm = model.get_submodule(path)
    original = layer_norm(_input_of(model, path, x)).reshape(-1, 48)
    target = ((layer_norm(tokens) + original) / 2).detach().numpy()
    scale, shift = swapped.get_submodule(path).affine64()
    for c in range(0, 48, 7):
        design = np.stack([tokens[:, c].numpy(), np.ones(len(tokens))], 1)
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
        fits[method] = calibrate(swap_norms(model), [images(model, 16)], original=model, method=method)
    assert fits["channel"][0].r2 > fits["moments"][0].r2
    assert fits["channel"][0].r2 == pytest.approx(fits["channel"][0].r2_original)
    assert all(fit.r2 <= 1 and fit.samples == 16 * 5 for fit in fits["channel"])


@pytest.mark.parametrize("sizes", [[24], [8, 8, 8], [5, 7, 12], [1] * 24], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_batching_does_not_matter(sizes, method):
    model = family("vit", torch.float64)
    x = images(model, 24)
    reference = _calibrated(model, [x], method).state_dict()
    state = _calibrated(model, x.split(sizes), method).state_dict()
    for name, tensor in reference.items():
        torch.testing.assert_close(state[name], tensor, rtol=SPLIT, atol=SPLIT, msg=name)


@pytest.mark.parametrize("name", FAMILY)
def test_every_site_is_set(name):
    model = family(name)
    swapped = swap_norms(model)
    fresh = copy.deepcopy(swapped)
    fits = calibrate(swapped, [images(model, 8)], original=model)
    sites = [path for path in batch_norms(swapped) if isinstance(_get(model, path), nn.LayerNorm)]
    assert sorted(fit.site for fit in fits) == sorted(sites)
    for path, norm in batch_norms(swapped).items():
        assert not torch.equal(norm.running_var, fresh.get_submodule(path).running_var), path
        assert torch.isfinite(norm.running_var).all()


def _get(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


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


def test_dropout_and_drop_path_are_off_and_flags_come_back():
    import timm

    torch.manual_seed(3)
    arguments = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 7}
    model = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.5, proj_drop_rate=0.5, **arguments)
    x = images(model, 8)
    reference = _calibrated(copy.deepcopy(model).eval(), [x]).state_dict()
    model.train()
    swapped = swap_norms(model)
    calibrate(swapped, [x], original=model)
    assert all(module.training for module in [*model.modules(), *swapped.modules()])
    assert all(torch.equal(reference[k], v) for k, v in swapped.state_dict().items())


def test_the_original_stays_and_labels_are_not_needed():
    model = family("vit")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = images(model, 8)
    a = _calibrated(model, [x]).state_dict()
    b = _calibrated(model, [(x, torch.arange(8))]).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_each_image_goes_through_each_model_once():
    """Counted on the live norms: every one runs once per chunk, not once per site and chunk."""
    model = family("vit")
    swapped = swap_norms(model)
    calls: Counter[str] = Counter()
    for prefix, which in (("original", model), ("converted", swapped)):
        for path, module in which.named_modules():
            if isinstance(module, nn.LayerNorm | TokenBatchNorm):
                module.register_forward_hook(lambda *_, key=f"{prefix} {path}": calls.update([key]))
    calibrate(swapped, images(model, 12).split(4), original=model)
    exports = 2  # one to find the order, one to run
    for key, count in calls.items():
        assert count <= 3 + exports, key


@pytest.mark.parametrize("where", ["image", "weight"])
def test_non_finite_statistics_name_the_site(where):
    model = family("vit")
    x = images(model, 4)
    if where == "image":
        x[2, 0, 0, 0] = float("nan")
    else:
        model.blocks[0].mlp.fc2.weight.data[0, 0] = float("inf")
    site = "blocks.0.norm1" if where == "image" else "blocks.1.norm1"
    with pytest.raises(CalibrationError, match=site):
        _calibrated(model, [x])


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


def test_wrong_arguments():
    model = family("vit")
    swapped = swap_norms(model)
    with pytest.raises(ArgumentError, match="channel, moments"):
        calibrate(swapped, [images(model)], original=model, method="magic")
    with pytest.raises(ArgumentError, match="no images"):
        calibrate(swapped, [], original=model)
    with pytest.raises(ArgumentError, match=r"\[B, C, H, W\]"):
        calibrate(swapped, [torch.zeros(3)], original=model)
    with pytest.raises(ArgumentError, match="swap first"):
        calibrate(model, [images(model)], original=model)


def test_kept_sites_are_passed_through():
    model = family("vit", torch.float64)
    plan = make_plan(model, keep=["blocks.0.norm2"])
    swapped = swap_norms(model, plan)
    fits = calibrate(swapped, [images(model, 8)], original=model)
    assert [fit.site for fit in fits] == ["blocks.0.norm1", "blocks.1.norm1", "blocks.1.norm2", "norm"]


@pytest.mark.parametrize("sizes", [[4, 4, 4], [3, 5, 4], [12], [4, 8], [5, 5, 2]], ids=str)
def test_rebatching_keeps_every_image_in_order(sizes):
    x = torch.arange(12.0).reshape(12, 1, 1, 1)
    batches = list(rebatched(x.split(sizes)))
    assert torch.equal(torch.cat(batches), x)
    assert {len(b) for b in batches[:-1]} <= {sizes[0]}
    assert 0 < len(batches[-1]) <= sizes[0]
