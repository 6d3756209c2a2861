"""Swap: everything the LayerNorm had is carried over, and the FFN BatchNorms are an exact identity."""

import copy

import pytest
import torch
from torch import nn

from normswap import ArgumentError, make_plan, swap_norms
from normswap.layers import NormedLinear, TokenBatchNorm, TokenBatchNorm2d
from normswap.surgery.swap import batch_norms

from ..models import FAMILY, family, images

FFN_POSITIONS = {
    "vit": {"pre-act": ["blocks.0.mlp.fc1.norm"], "post-act": ["blocks.0.mlp.norm"], "none": []},
    "glu": {"pre-act": ["blocks.0.mlp.fc1.norm"], "post-act": ["blocks.0.mlp.norm"], "none": []},
    "swiglu": {
        "pre-act": ["blocks.0.mlp.fc1_g.norm", "blocks.0.mlp.fc1_x.norm"],
        "post-act": ["blocks.0.mlp.norm"],
        "none": [],
    },
    "scale_norms": {"pre-act": ["blocks.0.mlp.fc1.norm"], "post-act": [], "none": []},
}


@pytest.mark.parametrize("name", FAMILY)
def test_every_layer_norm_goes_and_names_stay(name):
    model = family(name)
    swapped = swap_norms(model, ffn_bn="none")
    assert not any(isinstance(m, nn.LayerNorm) for m in swapped.modules())
    assert type(swapped) is type(model)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    names = [n for n in swapped.state_dict() if not n.endswith(buffers)]
    assert names == list(model.state_dict())
    assert not torch.allclose(swapped(images(model)), model(images(model)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_carried_over(dtype):
    model = family("vit", dtype)
    model.blocks[0].norm1.weight.requires_grad_(False)
    model.blocks[0].norm1.eps = 1e-3
    model.blocks[1].norm2.train()
    swapped = swap_norms(model)
    old, new = model.blocks[0].norm1, swapped.blocks[0].norm1
    assert type(new) is TokenBatchNorm
    assert torch.equal(new.weight, old.weight)
    assert torch.equal(new.bias, old.bias)
    assert (new.weight.requires_grad, new.bias.requires_grad, new.eps) == (False, True, 1e-3)
    assert new.running_mean.dtype == new.weight.dtype == dtype
    assert swapped.blocks[1].norm2.training
    assert not swapped.blocks[1].norm1.training
    assert swapped.blocks[0].mlp.fc1.norm.weight.dtype == dtype
    assert new.weight is not old.weight


def test_meta_device_is_carried_over():
    with torch.device("meta"):
        model = family("vit")
    assert {p.device.type for p in swap_norms(model).parameters()} == {"meta"}


def test_maps_get_the_twin():
    import timm

    model = timm.create_model("convnext_atto", num_classes=5).eval()
    swapped = swap_norms(model)
    assert type(swapped.stages[1].downsample[0]) is TokenBatchNorm2d
    assert swapped(torch.randn(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize("position", ["pre-act", "post-act", "none"])
@pytest.mark.parametrize("name", FFN_POSITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ffn_norms_are_an_exact_identity_at_insertion(name, position, dtype):
    model = family(name, dtype)
    plan = make_plan(model)
    without, with_norms = swap_norms(model, plan, "none"), swap_norms(model, plan, position)
    added = sorted(set(batch_norms(with_norms)) - set(batch_norms(without)))
    assert [path for path in added if path.startswith("blocks.0.")] == FFN_POSITIONS[name][position]
    assert len(added) == plan.counts(position)["ffn_bn"]
    x = images(model)
    with torch.no_grad():
        assert torch.equal(with_norms(x), without(x))


def test_ffn_norm_really_acts_between_the_linear_layers():
    swapped = swap_norms(family("vit"))
    fc1 = swapped.blocks[0].mlp.fc1
    assert isinstance(fc1, NormedLinear)
    before = swapped(images(swapped))
    fc1.norm.bias.data.add_(1.0)
    assert not torch.allclose(swapped(images(swapped)), before)


def test_copy_by_default_and_inplace_on_request():
    model = family("vit")
    before = copy.deepcopy(model.state_dict())
    swapped = swap_norms(model)
    assert swapped is not model
    assert isinstance(model.norm, nn.LayerNorm)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert swap_norms(model, inplace=True) is model
    assert isinstance(model.norm, TokenBatchNorm)


def test_layer_norm_without_affine_part():
    model = family("vit")
    model.norm = nn.LayerNorm(48, elementwise_affine=False)
    norm = swap_norms(model).norm
    assert torch.equal(norm.weight, torch.ones(48))
    assert torch.equal(norm.bias, torch.zeros(48))


def test_kept_sites_stay():
    model = family("vit")
    swapped = swap_norms(model, make_plan(model, keep=["blocks.1.*"]))
    kept = [path for path, m in swapped.named_modules() if isinstance(m, nn.LayerNorm)]
    assert kept == ["blocks.1.norm1", "blocks.1.norm2"]


def test_wrong_arguments():
    model = family("vit")
    with pytest.raises(ArgumentError, match="pre-act, post-act, none"):
        swap_norms(model, ffn_bn="before")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="another model"):
        swap_norms(family("deit_distilled"), make_plan(family("qk_norm")))
