"""The FP16 check: it sees an overflow where there is one, says whether it is old or new, and sees none elsewhere."""

import copy

import pytest
import torch
from torch import nn

from normswap import fold_norms, make_plan, swap_norms
from normswap.errors import ArgumentError
from normswap.exporting.fp16 import LIMIT, check_fp16

from ..models import family, images, randomise_statistics


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return family("vit")


@pytest.fixture(scope="module")
def fused(model):
    torch.manual_seed(0)
    swapped = swap_norms(model, make_plan(model))
    return fold_norms(randomise_statistics(swapped))


@pytest.fixture(scope="module")
def batches(model):
    return [images(model, 4), images(model, 2, seed=2)]


def test_every_number_is_that_of_a_hook(model, batches):
    seen = {}

    def note(path):
        def hook(module, arguments, output):
            seen[path] = max(seen.get(path, 0.0), float(output.abs().max()))

        return hook

    hooks = [m.register_forward_hook(note(p)) for p, m in model.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    report = check_fp16(model, batches)
    largest = {tensor.tensor: tensor.largest for tensor in report.tensors}
    assert len(seen) == 9
    for path, value in seen.items():
        assert largest[f"{path} linear"] == pytest.approx(value, rel=1e-5)  # float32, batches of another size
    assert largest["head.weight"] == float(model.head.weight.detach().abs().max())
    assert report.images == 6
    assert [t.largest for t in report.tensors] == sorted((t.largest for t in report.tensors), reverse=True)


def test_attention_scores_are_seen(model, batches):
    scores = {}

    def hook(module, arguments):
        q, k, _ = module.qkv(arguments[0]).reshape(*arguments[0].shape[:2], 3, 3, 16).permute(2, 0, 3, 1, 4)
        scores["largest"] = max(scores.get("largest", 0.0), float((q @ k.transpose(-2, -1)).abs().max()) / 4)

    handle = model.blocks[1].attn.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    tensors = {tensor.tensor: tensor.largest for tensor in check_fp16(model, batches).tensors}
    found = tensors["blocks.1.attn scaled_dot_product_attention scores"]
    assert found == pytest.approx(scores["largest"], rel=1e-5)


def test_an_overflow_inside_layernorm_goes_with_it(model, fused, batches):
    """One channel of the residual stream at 1,000: its square passes 65,504 inside each norm, and nothing else does."""
    large, folded = copy.deepcopy(model), copy.deepcopy(fused)
    with torch.no_grad():
        for changed in (large, folded):
            changed.pos_embed[..., 0] = 1000
        for layer in (folded.blocks[0].attn.qkv, folded.blocks[0].mlp.fc1, folded.blocks[1].attn.qkv):
            layer.weight[:, 0] = 0
        folded.blocks[1].mlp.fc1.weight[:, 0] = 0
        folded.head.weight[:, 0] = 0
    report = check_fp16(folded, batches, large)
    assert report.norms == ()
    assert report.original_norms is not None
    assert len(report.original_norms) == 5
    assert all(norm.overflows and norm.square > LIMIT for norm in report.original_norms)
    assert report.problem is None
    assert "5 of 5 pass 65,504 inside, 5 in a single square" in report.lines()[0]
    assert report.lines()[1] == "no LayerNorm here, so none that overflows"
    harmless = check_fp16(model, batches)
    assert not any(norm.overflows for norm in harmless.norms)
    assert "none of 5 overflows" in harmless.lines()[0]


def test_an_overflow_that_folding_brings_is_new(model, fused, batches):
    broken = copy.deepcopy(fused)
    with torch.no_grad():
        broken.blocks[1].mlp.fc1.bias += 1e5
    report = check_fp16(broken, batches, model)
    assert "blocks.1.mlp.fc1 linear" in {tensor.tensor for tensor in report.overflowing}
    assert report.non_finite == 6
    assert report.first_non_finite == "blocks.1.mlp.fc1.bias"
    assert "not finite in FP16" in (report.problem or "")
    (line,) = (line for line in report.lines() if "tensors pass" in line)
    assert f"{len(report.overflowing)} of them not in the original" in line
    same = check_fp16(broken, batches, broken)
    assert "0 of them not in the original" in " ".join(same.lines())


def test_an_overflow_that_nobody_sees_in_the_output_is_told(fused, batches):
    """GELU makes 0 of minus infinity: the output is finite, the tensor is not."""
    broken = copy.deepcopy(fused)
    with torch.no_grad():
        broken.blocks[1].mlp.fc1.bias[0] = -60000
        broken.blocks[1].mlp.fc1.weight[0] *= 1e5
        broken.blocks[1].mlp.fc2.weight[:, 0] = 0
    report = check_fp16(broken, batches)
    assert report.overflowing
    assert report.problem


def test_no_images(model):
    with pytest.raises(ArgumentError, match="no images"):
        check_fp16(model, [])
