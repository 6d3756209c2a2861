"""The fade from LayerNorm to BatchNorm, and the control."""

import copy

import pytest
import torch
from torch import nn

import normswap
from normswap import ArgumentError, FinetuneOptions
from normswap.finetuning.norm_blending import Fade

from ..cli.test_cli import DEMO, one_object, run
from ..models import family, images
from .test_finetune import LEARN, started


def _models():
    model = family("vit", torch.float64)
    swapped = normswap.swap_norms(model)
    x = images(model, 16)
    normswap.calibrate(swapped, [x], original=model, options=normswap.CalibrationOptions(method="channel"))
    sites = [path for path, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    return model.eval(), swapped.eval(), x, sites


@pytest.mark.parametrize("order", ["all", "blockwise", "mlp-first"])
def test_it_goes_from_the_original_to_the_converted_model(order):
    model, swapped, x, sites = _models()
    fade = Fade(swapped, model, sites, 0.5, order)
    with torch.no_grad():
        wanted, found = model(x), swapped(x)
        outputs = []
        for progress in (0.0, 0.2, 0.35, 0.5, 0.9):
            fade.at(progress)
            with fade.blended():
                outputs.append(swapped(x))
        assert torch.equal(swapped(x), found)  # the hooks are gone
    torch.testing.assert_close(outputs[0], wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(outputs[3], found)
    assert torch.equal(outputs[4], found)
    assert not torch.allclose(wanted, found)
    far = [float((output - found).norm()) for output in outputs]
    assert far[1] > 0
    assert far[2] > 0


def test_orders():
    model, swapped, _, sites = _models()

    def amounts(order: str, progress: float) -> dict[str, float]:
        fade = Fade(swapped, model, sites, 1.0, order)
        fade.at(progress)
        return fade.amount

    assert set(amounts("all", 0.25).values()) == {0.25}
    one_by_one = list(amounts("blockwise", 0.5).values())
    assert one_by_one == sorted(one_by_one, reverse=True)
    assert {one_by_one[0], one_by_one[-1]} == {0.0, 1.0}
    halfway = amounts("mlp-first", 0.5)
    assert {amount for site, amount in halfway.items() if site.endswith("norm2")} == {1.0}
    assert {amount for site, amount in halfway.items() if not site.endswith("norm2")} == {0.0}


def test_mlp_first_needs_to_know_the_ffns():
    model = family("vit")
    swapped = normswap.swap_norms(model, ffn_bn="none")
    with pytest.raises(ArgumentError, match="mlp-first needs a BatchNorm inside the FFNs"):
        Fade(swapped, model, ["norm"], 0.5, "mlp-first")


@pytest.mark.parametrize("options", [{"fade": 1.0}, {"fade": -0.1}, {"fade_order": "random"}])
def test_bad_fades(options):
    with pytest.raises(ArgumentError, match="fade"):
        FinetuneOptions(**options).check()


def test_a_control_moves_with_labels_only():
    original, _, batches = started()
    moved = copy.deepcopy(original)
    found = normswap.finetune(moved, batches, original, FinetuneOptions(**{**vars(LEARN), "labels": 1.0}))
    assert found.taken
    assert found.kl_before == 0
    assert found.kl_after > 0
    with pytest.raises(ArgumentError, match="without them the original would be its own teacher"):
        normswap.convert(original, batches, finetune=normswap.FinetuneStage(control=True, options=LEARN))


def test_the_table_shows_the_control(tmp_path):
    result = run(
        "convert", *DEMO, "-o", tmp_path / "out", "--method", "channel", "--calib-samples", 64, "--json", "--control",
        "--finetune-epochs", 1, "--label-weight", 1, "--lr", "1e-3", "--train-batch-size", 24, "--fade", 0.5,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    record = one_object(result)
    names = [stage["name"] for stage in record["stages"]]
    assert names == ["original", "control", "swapped", "calibrated", "finetuned", "fused"]
    assert record["stages"][1]["kl"] > 0
    assert record["seconds"]["control"] > 0
