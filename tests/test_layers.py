"""TokenBatchNorm: the affine map of eval mode, the statistics of training mode, both layouts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normswap.layers import (
    NormedConv2d,
    NormedLinear,
    TokenAffine,
    TokenBatchNorm,
    TokenBatchNorm2d,
    attach_norm,
    detach_norm,
)

from .models import randomise_statistics


def _tokens(layout: type[TokenBatchNorm], channels: int) -> torch.Tensor:
    return torch.randn(3, 5, channels) if layout is TokenBatchNorm else torch.randn(3, channels, 4, 5)


@pytest.mark.parametrize("layout", [TokenBatchNorm, TokenBatchNorm2d])
def test_training_agrees_with_torch(layout):
    ours, torchs = layout(6), nn.BatchNorm1d(6)
    x = _tokens(layout, 6) * 3 + 1
    flat = x.movedim(ours.channel_dim, -1).reshape(-1, 6)
    y = ours.train()(x)
    expected = torchs(flat)
    torch.testing.assert_close(y.movedim(ours.channel_dim, -1).reshape(-1, 6), expected)
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    torch.testing.assert_close(ours.running_var, torchs.running_var)
    assert not torch.equal(ours.running_mean, torch.zeros(6))
    assert ours.num_batches_tracked == 1


@pytest.mark.parametrize("layout", [TokenBatchNorm, TokenBatchNorm2d])
def test_eval_is_the_affine_map_it_reports(layout):
    norm = randomise_statistics(layout(6)).double().eval()
    x = _tokens(layout, 6).double()
    scale, shift = norm.affine64()
    expected = (x.movedim(norm.channel_dim, -1) * scale + shift).movedim(-1, norm.channel_dim)
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(norm(x), x)


@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6), (2, 3, 4, 6)])
def test_any_leading_dimensions(shape):
    norm = randomise_statistics(TokenBatchNorm(6)).eval()
    x = torch.randn(shape)
    assert norm(x).shape == x.shape
    torch.testing.assert_close(norm(x).reshape(-1, 6), norm(x.reshape(-1, 6)))
    assert norm.train()(x).shape == x.shape


@settings(max_examples=30, deadline=None)
@given(
    mean=st.floats(-1e4, 1e4),
    log_var=st.floats(-12, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    eps=st.sampled_from([1e-6, 1e-5]),
)
def test_identity_is_exact_for_any_statistics(mean, log_var, dtype, eps):
    norm = TokenBatchNorm(4, eps=eps).to(dtype).eval()
    norm.set_statistics(torch.full((4,), mean), torch.full((4,), 10**log_var))
    norm.set_identity()
    x = (torch.randn(50, 4) * 10).to(dtype)
    assert torch.equal(norm(x), x)


def test_set_affine_gives_the_asked_map():
    norm = TokenBatchNorm(5).double().eval()
    norm.set_statistics(torch.randn(5).double(), torch.rand(5).double() + 0.1)
    scale, shift = torch.randn(5).double(), torch.randn(5).double()
    norm.set_affine(scale, shift)
    torch.testing.assert_close(norm.affine64(), (scale, shift), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [TokenBatchNorm, TokenBatchNorm2d])
def test_wrong_channels_are_named(layout):
    with pytest.raises(ValueError, match="expected 6 channels"):
        layout(6)(torch.zeros(2, 5, 7, 7))


def test_affine_layouts_agree():
    tokens, maps = TokenAffine(5), TokenAffine(5, channel_dim=1)
    for module in (tokens, maps):
        with torch.no_grad():
            module.weight.copy_(torch.arange(5.0))
            module.bias.copy_(-torch.arange(5.0))
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(maps(x), tokens(x.movedim(1, -1)).movedim(-1, 1))
    assert not torch.allclose(maps(x), x)


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv2d(4, 6, 1)], ids=["linear", "conv"])
def test_attach_and_detach_keep_the_layer(layer):
    linear = isinstance(layer, nn.Linear)
    norm = randomise_statistics((TokenBatchNorm if linear else TokenBatchNorm2d)(6)).eval()
    normed = attach_norm(layer, norm)
    x = torch.randn(2, 4) if linear else torch.randn(2, 4, 3, 3)
    assert isinstance(normed, NormedLinear if linear else NormedConv2d)
    assert normed.weight is layer.weight
    assert "norm" not in layer._modules
    torch.testing.assert_close(normed(x), norm(layer(x)))
    assert {"weight", "bias", "norm.weight"} <= set(normed.state_dict())
    plain = detach_norm(normed)
    assert type(plain) is type(layer)
    assert plain.weight is layer.weight
    assert "norm" in normed._modules
    assert torch.equal(plain(x), layer(x))
