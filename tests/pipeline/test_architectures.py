"""Tiny members of timm's other families: the verdicts are the expected ones, and every fold is exact."""

import copy
import functools

import pytest
import timm
import torch
from timm.models.mlp_mixer import GatedMlp, MlpMixer, SpatialGatingBlock
from torch import nn

from benchmarks.coverage import convert_one, randomise, randomise_statistics
from normswap import (
    CalibrationOptions,
    EvaluationOptions,
    convert,
    fold_norms,
    load,
    make_plan,
    swap_norms,
)
from normswap.surgery.fold import created_biases, max_difference
from normswap.surgery.swap import batch_norms

from ..models import with_timm
from ..tolerance import FOLD_FLOAT64

_TINY = {"embed_dim": 48, "num_heads": 3, "depth": 2}
_SWIN = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}

# name -> (timm model, arguments, pixels, verdicts, what the reasons say)
ARCHITECTURES: dict[str, tuple[str, dict, int, dict[str, int], list[str]]] = {
    "BEiT": ("beit_base_patch16_224", {**_TINY, "img_size": 32}, 32, {"fold-forward": 5}, []),
    "EVA, rotary": ("vit_tiny_patch16_dinov3_qkvb", {**_TINY, "img_size": 32}, 32, {"fold-forward": 5}, []),
    "EVA-02": ("eva02_tiny_patch14_224", {**_TINY, "img_size": 28}, 28, {"fold-forward": 5}, []),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {**_SWIN, "img_size": 56},
        56,
        {"fold-forward": 6, "fold-backward": 1},
        ["downsample.reduction gets a bias"],
    ),
    "Swin, padded": (
        "swin_tiny_patch4_window7_224",
        {**_SWIN, "img_size": 72},
        72,
        {"fold-forward": 4, "fold-backward": 1, "affine": 2},
        ["zero padding before layers.0.blocks.0.attn.qkv"],
    ),
    "Swin-v2": (
        "swinv2_tiny_window8_256",
        {**_SWIN, "img_size": 64},
        64,
        {"fold-forward": 1, "fold-backward": 6},
        ["fed only by layers.0.blocks.0.attn.proj", "fed only by layers.0.blocks.0.mlp.fc2"],
    ),
    "Swin-v2-CR": (
        "swinv2_cr_tiny_224",
        {**_SWIN, "img_size": 56, "window_size": 7},
        56,
        {"fold-forward": 2, "fold-backward": 5},
        ["fed only by stages.0.blocks.0.attn.proj"],
    ),
    "ConvNeXt": (
        "convnext_atto",
        {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
        64,
        {"fold-forward": 8, "fold-backward": 1},
        [],
    ),
    "XCiT": (
        "xcit_nano_12_p16_224",
        {"embed_dim": 48, "num_heads": 4, "depth": 2, "cls_attn_layers": 1, "img_size": 32},
        32,
        {"fold-forward": 5, "affine": 4},
        ["local_mp.conv1 pads its input", "concatenated with values that are not normalised"],
    ),
    "CaiT": (
        "cait_xxs24_224",
        {"embed_dim": 48, "num_heads": 4, "depth": 2, "img_size": 32},
        32,
        {"fold-forward": 9},
        [],
    ),
    "CoAtNet, average pool after a norm": ("test_coatnet", {}, 160, {"fold-forward": 7}, []),
    "MobileViT": ("mobilevit_xxs", {}, 64, {"fold-forward": 21}, []),
    "BatchNorm of its own": ("gcresnext26ts", {}, 64, {"fold-backward": 8}, []),
    "LSTMs": (
        "sequencer2d_s",
        {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 16, 16), "hidden_sizes": (8, 8, 8, 8)},
        64,
        {"fold-forward": 9},
        [],
    ),
    "activation inside the norm": (
        "test_efficientnet_ln",
        {},
        64,
        {"fold-forward": 3, "fold-backward": 1, "keep": 9},
        ["does more than normalise"],
    ),
    "a map's norm before a padded convolution": (
        "pvt_v2_b0",
        {"depths": (1, 1, 1, 1)},
        64,
        {"fold-forward": 12, "fold-backward": 4, "affine": 3},
        ["stages.1.downsample.proj pads its input"],
    ),
    "TNT": (
        "tnt_s_legacy_patch16_224",
        {"img_size": 32, "embed_dim": 48, "inner_dim": 12, "num_heads_inner": 2, "num_heads_outer": 3, "depth": 2},
        32,
        {"fold-forward": 12, "fold-backward": 1},
        [],
    ),
}


def _model(name: str) -> nn.Module:
    architecture, arguments, *_ = ARCHITECTURES[name]
    torch.manual_seed(0)
    return randomise(timm.create_model(architecture, num_classes=5, **arguments)).eval()


def _check_fold(model: nn.Module, size: int, verdicts: dict[str, int], reasons: list[str]) -> tuple:
    """Swap, randomise and fold in float64; return the swapped and the fused model."""
    plan = make_plan(model, input_size=(3, size, size))
    counts = plan.counts()
    assert {v: counts[v] for v in ("fold-forward", "fold-backward", "affine", "keep") if counts[v]} == verdicts
    for reason in reasons:
        assert any(reason in site.reason for site in plan.sites), reason
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    swapped = swap_norms(model.double(), plan).eval()
    randomise_statistics(swapped, images)
    fused = fold_norms(swapped, input_size=plan.input_size)
    with torch.no_grad():
        scale = float(swapped(images).abs().max())
    assert max_difference(swapped, fused, [images]) <= FOLD_FLOAT64 * scale
    bare = copy.deepcopy(swapped)
    for path in batch_norms(bare):
        bare.set_submodule(path, nn.Identity())
    assert max_difference(swapped, bare, [images]) > 1e-4 * scale
    return swapped, fused


@functools.cache
def _folded(name: str) -> tuple[nn.Module, nn.Module]:
    """Return the model in float64 and what the fold that is checked makes of it."""
    _, _, size, verdicts, reasons = ARCHITECTURES[name]
    model = _model(name).double()
    return model, _check_fold(copy.deepcopy(model), size, verdicts, reasons)[1]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_verdicts_and_exact_folds(name):
    _folded(name)


def test_patch_merging_gets_the_bias_it_never_had():
    assert created_biases(*_folded("Swin")) == ["layers.1.downsample.reduction.bias"]


def test_batch_norms_of_the_model_itself_are_untouched():
    model, fused = _folded("BatchNorm of its own")
    theirs = {path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert len(theirs) > 20
    for path in theirs:
        before, after = model.get_submodule(path).state_dict(), fused.get_submodule(path).state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)


def _mixer(**arguments) -> nn.Module:
    torch.manual_seed(0)
    return randomise(MlpMixer(num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=24, **arguments)).eval()


def test_a_mixer_mixes_tokens_behind_a_norm():
    """Token mixing puts channels where tokens were: W @ (s x + h) = s (W x) + h (W 1), which is no change of W."""
    model = _mixer()
    _check_fold(model, 32, {"fold-forward": 3, "affine": 2}, ["does not always see the same channel"])


def test_gmlp_gates_over_tokens():
    model = _mixer(block_layer=SpatialGatingBlock, mlp_layer=GatedMlp, mlp_ratio=4)
    _check_fold(model, 32, {"fold-forward": 3, "affine": 2}, ["gate.proj does not always see the same channel"])


@pytest.mark.parametrize(
    ("name", "stock"), [("BEiT", True), ("EVA, rotary", False), ("EVA-02", False), ("LSTMs", False)]
)
def test_what_was_folded_into_odd_places_is_saved(tmp_path, name, stock):
    model = _model(name)
    size = ARCHITECTURES[name][2]
    images = torch.randn(8, 3, size, size)
    result = convert(
        model,
        [images],
        calibration=CalibrationOptions(method="channel"),
        evaluation=EvaluationOptions(atol=float("inf")),
    )
    result.save(tmp_path / "out")
    assert (result.report.stock_timm is None) == stock
    with torch.no_grad():
        expected = result.model(images)
        assert torch.equal(load(tmp_path / "out")(images), expected)
        if stock:
            plain = with_timm(tmp_path / "out")
            assert torch.equal(plain(images), expected)
    if name == "EVA, rotary":
        _check_keys(load(tmp_path / "out"))


def _check_keys(loaded: nn.Module) -> None:
    """Keys that are turned by a rotary embedding keep their shift in the folder."""
    assert loaded.blocks[0].attn.k_bias.abs().max() > 0
    assert "blocks.0.attn.k_bias" in loaded.state_dict()


# The five smallest that benchmarks/coverage.py converts; the folds of three of them are tested above too.
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("mambaout", "test_mambaout"),
        ("efficientnet", "test_efficientnet_ln"),
        pytest.param("convnext", "test_convnext", marks=pytest.mark.slow),
        pytest.param("vision_transformer", "test_vit", marks=pytest.mark.slow),
        pytest.param("maxxvit", "test_coatnet", marks=pytest.mark.slow),
    ],
)
def test_the_whole_road(file, name):
    result = convert_one(file, name, 0)
    assert not result.error
    assert result.folded > 0
