"""The real thing: a pretrained ViT-S/14 with LayerScale and 25,000 photos, where they are. Run by hand: -m slow."""

import copy

import pytest
import torch
from torch import nn

import normswap
from normswap.inputs.dataset import load_splits
from normswap.surgery.fold import max_difference

from .models import with_timm
from .tolerance import FOLD_FLOAT32, FOLD_FLOAT64

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(shared_model, shared_images):
    model = normswap.load_model(shared_model)
    images, evaluation = load_splits(model, shared_images, "train", "validation")
    batches = [batch for batch, _ in images.draw(1024, seed=42)]
    plan = normswap.make_plan(model)
    found = {}
    for method in ("reconstruct", "channel", "moments"):
        swapped = normswap.swap_norms(model, plan)
        normswap.calibrate(swapped, batches, original=model, options=normswap.CalibrationOptions(method=method))
        found[method] = swapped, normswap.fold_norms(swapped)
    models = {"original": model} | {method: fused for method, (_, fused) in found.items()}
    stages = {stage.name: stage for stage in normswap.evaluate_models(models, evaluation.draw(1000, seed=0))}
    return plan, batches, found, stages


def test_plan(results):
    plan, *_ = results
    counts = plan.counts()
    assert (counts["total"], counts["fold-forward"], counts["ffn_bn"]) == (25, 25, 12)


def test_channel_clearly_beats_moments(results):
    *_, stages = results
    assert stages["channel"].top1 > stages["moments"].top1 + 15
    assert stages["channel"].agreement > stages["moments"].agreement + 15
    assert stages["channel"].non_finite == 0


def test_reconstruct_clearly_beats_channel(results):
    *_, stages = results
    assert stages["reconstruct"].agreement > stages["channel"].agreement + 30
    assert stages["original"].top1 - stages["reconstruct"].top1 < 4
    assert stages["reconstruct"].non_finite == 0


def test_no_layer_norm_is_left(results):
    _, _, found, _ = results
    fused = found["channel"][1]
    assert not any(isinstance(m, nn.LayerNorm | nn.BatchNorm1d) for m in fused.modules())


def test_fold_in_float32(results):
    _, batches, found, _ = results
    assert 0 < max_difference(*found["channel"], batches) < FOLD_FLOAT32


def test_fold_in_float64(results):
    _, batches, found, _ = results
    swapped = copy.deepcopy(found["channel"][0]).double()
    assert max_difference(swapped, normswap.fold_norms(swapped), [b.double() for b in batches]) < FOLD_FLOAT64


def test_the_saved_folder_is_stock(results, shared_model, tmp_path):
    _, batches, _, _ = results
    model = normswap.load_model(shared_model)
    result = normswap.convert(model, batches[:2])
    result.save(tmp_path / "out")
    assert result.report.stock_timm is None
    stock = with_timm(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(stock(batches[2]), result.model(batches[2]))
