"""State of modules: what cannot be converted is refused by name before any work, what can be is given back."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import normswap
from normswap.module_state import as_given, check_state, in_float32

from .models import family, images


def _masked(model):
    prune.l1_unstructured(model.blocks[0].mlp.fc1, "weight", 0.5)


def _masked_twice(model):
    prune.random_unstructured(model.blocks[0].mlp.fc1, "weight", 0.1)
    prune.ln_structured(model.blocks[0].mlp.fc1, "weight", 0.5, n=2, dim=0)


def _weight_norm(model):
    parametrizations.weight_norm(model.blocks[1].attn.proj)


def _spectral_norm(model):
    parametrizations.spectral_norm(model.blocks[1].attn.proj)


def _old_spectral_norm(model):
    nn.utils.spectral_norm(model.blocks[1].attn.proj)


def _old_weight_norm(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model.blocks[1].attn.proj)


def _cache(model):
    model.blocks[0].attn.cache = model.blocks[0].attn.qkv.weight * 2


def _nested_cache(model):
    model.blocks[0].attn.cache = {"cpu": [model.blocks[0].attn.qkv.weight * 2]}


def _lock(model):
    model.blocks[0].lock = threading.Lock()


def _hook(model):
    lock = threading.Lock()

    class Hook:
        def __init__(self):
            self.lock = lock

        def __call__(self, *_):
            return None

    model.norm.register_forward_hook(Hook())


def _meta(model):
    model.blocks[0].attn.qkv.to("meta")


def _lazy(model):
    model.head = nn.LazyLinear(7)


def _plain_tensor(model):
    weight = model.head.weight.detach()
    model.head.register_parameter("weight", None)
    model.head.__dict__["weight"] = weight


REFUSED = {
    _masked: r"blocks.0.mlp.fc1.weight is pruned .*prune.remove\(module, 'weight'\)",
    _masked_twice: r"blocks.0.mlp.fc1.weight is pruned .*prune.remove\(module, 'weight'\)",
    _weight_norm: r"blocks.1.attn.proj.weight is parametrized \(_WeightNorm\).*remove_parametrizations\(module, 'w",
    _spectral_norm: r"blocks.1.attn.proj.weight is parametrized \(_SpectralNorm\)",
    _old_spectral_norm: r"blocks.1.attn.proj.weight is computed by spectral_norm .*remove_spectral_norm",
    _old_weight_norm: r"blocks.1.attn.proj.weight is computed by weight_norm .*remove_weight_norm",
    _cache: r"blocks.0.attn.cache holds a tensor with its gradient history",
    _nested_cache: r"blocks.0.attn.cache holds a tensor with its gradient history",
    _lock: r"blocks.0.lock cannot be copied \(lock: ",
    _hook: r"norm._forward_hooks cannot be copied",
    _meta: r"blocks.0.attn.qkv.weight is on the meta device",
    _lazy: r"head.weight has no shape yet",
    _plain_tensor: r"head.weight is a plain tensor where a parameter should be",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_what_cannot_be_converted_is_named_before_any_image_is_read(spoil):
    model = family("vit")
    spoil(model)

    def unread():
        raise AssertionError("an image was read")
        yield

    with pytest.raises(normswap.ModelRefusedError, match=REFUSED[spoil]) as caught:
        normswap.convert(model, unread())
    assert "\n" not in str(caught.value)
    for function in (normswap.make_plan, normswap.swap_norms):
        if spoil is not _meta:  # a plan needs no weights
            with pytest.raises(normswap.ModelRefusedError, match=REFUSED[spoil]):
                function(model)


@pytest.mark.parametrize(
    ("spoil", "mend"),
    [
        (_masked, lambda m: prune.remove(m.blocks[0].mlp.fc1, "weight")),
        (_weight_norm, lambda m: nn.utils.parametrize.remove_parametrizations(m.blocks[1].attn.proj, "weight")),
        (_spectral_norm, lambda m: nn.utils.parametrize.remove_parametrizations(m.blocks[1].attn.proj, "weight")),
        (_old_spectral_norm, lambda m: nn.utils.remove_spectral_norm(m.blocks[1].attn.proj)),
        (_cache, lambda m: delattr(m.blocks[0].attn, "cache")),
    ],
    ids=["mask", "weight_norm", "spectral_norm", "old_spectral_norm", "cache"],
)
def test_what_the_line_says_to_do_helps(spoil, mend):
    model = family("vit")
    spoil(model)
    mend(model)
    check_state(model)
    assert normswap.make_plan(model).swapped_sites


@pytest.mark.parametrize("path", ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.attn.qkv"])
def test_pruned_zeros_stay_and_the_report_says_so(path):
    model = family("vit")
    layer = model.get_submodule(path)
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.remove(layer, "weight")
    zeros = layer.weight == 0
    options = normswap.CalibrationOptions(refine_steps=2)
    result = normswap.convert(model, [images(model, 20)], calibration=options)
    assert torch.equal(result.model.get_submodule(path).weight == 0, zeros)
    fits = {fit.layer: fit for fit in result.report.layers}
    assert fits[path].reason == "50 % of its weights are zero, as after pruning, and would not be any more"
    assert [fit.layer for fit in fits.values() if fit.reason == fits[path].reason] == [path]


CHANNEL = normswap.CalibrationOptions(method="channel")


def test_flags_set_per_module_come_back():
    model = family("vit").train()
    model.blocks[0].eval()
    model.blocks[1].mlp.train()
    model.norm.eval()
    before = {path: module.training for path, module in model.named_modules()}
    assert len(set(before.values())) == 2
    result = normswap.convert(model, [images(model, 10)], calibration=CHANNEL)
    assert {path: module.training for path, module in result.model.named_modules()} == before
    assert {path: module.training for path, module in model.named_modules()} == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_in_float32_and_cast_back(dtype, tmp_path):
    model = family("vit", dtype)
    x = images(model, 10)
    wide = normswap.convert(in_float32(model), [x.float()], calibration=CHANNEL).model.state_dict()
    result = normswap.convert(model, [x], calibration=CHANNEL)
    found = result.model.state_dict()
    assert all(torch.equal(found[name], wide[name].to(dtype)) for name in wide)
    assert {p.dtype for p in found.values()} == {p.dtype for p in model.parameters()} == {dtype}
    assert {p.dtype for p in result.swapped.parameters()} == {torch.float32}
    assert result.report.stages[-1].agreement >= 90
    result.save(tmp_path / "out")
    assert normswap.load(tmp_path / "out")(x.float()).shape == (10, 7)


def test_each_tensor_gets_its_own_precision_back():
    model = family("max_pool_final_norm", torch.bfloat16)
    model.norm.float()  # becomes a scale and shift
    model.blocks[1].mlp.fc2.float()
    result = normswap.convert(model, [images(model, 10)], calibration=CHANNEL)
    wide = {name for name, tensor in result.model.state_dict().items() if tensor.dtype == torch.float32}
    assert wide == {"norm.weight", "norm.bias", "blocks.1.mlp.fc2.weight", "blocks.1.mlp.fc2.bias"}


def test_numbers_too_large_for_float16_stay_in_float32_with_a_warning():
    given = family("vit", torch.float16)
    converted = copy.deepcopy(given).float()
    with torch.no_grad():
        converted.head.bias[0] = 1e6
    with pytest.warns(UserWarning, match="head.bias has numbers too large for float16: the result stays in float32"):
        found = as_given(converted, given)
    assert {p.dtype for p in found.parameters()} == {torch.float32}
