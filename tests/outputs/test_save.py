"""Output folder and back: every kind of conversion loads again, to the bit, and says who can load it."""

import copy
import json
import os

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import normswap
from normswap import ArgumentError, CheckFailedError, CheckpointError, convert, load
from normswap.outputs.save import stock_arguments, write_weights
from normswap.surgery.fold import Difference

from ..models import FAMILY, family, images, with_timm

# How near the result comes to the original is tested elsewhere.
QUICK = normswap.CalibrationOptions(method="channel", bound="tight")

_ALL = [name for name in FAMILY if FAMILY[name][0] != "test_vit"]
# timm cannot be told of these in JSON, or has nowhere to put what is left.
_NOT_STOCK = {"headless": "scale and shift", "max_pool_final_norm": "scale and shift"}
# Built with a class as an argument, which JSON cannot hold.
_NOT_SAVED = ("swiglu", "glu")


@pytest.mark.parametrize("name", [n for n in _ALL if n not in _NOT_SAVED])
def test_round_trip(tmp_path, name):
    model = family(name)
    result = convert(model, [images(model, 6)], calibration=QUICK)
    result.save(tmp_path / "out")
    x = images(model, 3, seed=9)
    with torch.no_grad():
        expected = result.model(x)
        assert torch.equal(load(tmp_path / "out")(x), expected)
        if name in _NOT_STOCK:
            assert _NOT_STOCK[name] in result.report.stock_timm
            return
        assert result.report.stock_timm is None
        stock = with_timm(tmp_path / "out")
        assert torch.equal(stock(x), expected)
    assert not torch.allclose(expected, model(x))


def test_files(tmp_path):
    model = family("no_qkv_bias")
    result = convert(model, [(images(model, 6), torch.zeros(6, dtype=torch.long))], calibration=QUICK)
    out = tmp_path / "deep" / "out"
    result.save(out, normswap.SaveOptions(command=["normswap", "convert"]))
    files = ["README.md", "bounds.safetensors", "config.json", "model.safetensors", "normswap.json", "report.html"]
    assert sorted(p.name for p in out.iterdir()) == files
    config = json.loads((out / "config.json").read_text())
    assert config["architecture"] == "vit_tiny_patch16_224"
    assert config["model_args"]["qkv_bias"] is True
    assert "norm_layer" not in config["model_args"]
    assert str(tmp_path) not in (out / "config.json").read_text()
    record = json.loads((out / "normswap.json").read_text())
    assert record["command"] == ["normswap", "convert"]
    assert record["report"]["sites"]["total"] == 5
    assert record["report"]["created_biases"] == ["blocks.0.attn.qkv.bias", "blocks.1.attn.qkv.bias"]
    assert record["edits"]["biases"] == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(result.model.state_dict())
    card = (out / "README.md").read_text()
    assert 'norm_layer=partial(TokenBound, file="PATH/bounds.safetensors")' in card
    assert "| fused |" in card
    modes = {oct(os.stat(path).st_mode & 0o777) for path in out.iterdir()}
    assert len(modes) == 1


def test_partial_conversion_loads_with_normswap(tmp_path):
    model = family("vit")
    model.blocks[0].norm1.eps = 0.25
    result = convert(model, [images(model, 6)], plan=normswap.make_plan(model, keep=["blocks.0.*"]), calibration=QUICK)
    result.save(tmp_path / "out")
    assert "still a LayerNorm" in result.report.stock_timm
    assert "normswap.load" in (tmp_path / "out" / "README.md").read_text()
    loaded = load(tmp_path / "out")
    assert loaded.blocks[0].norm1.eps == 0.25
    x = images(model, 3)
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))


def test_other_architectures_round_trip(tmp_path):
    small = {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}
    model = timm.create_model("convnext_atto", num_classes=5, **small).eval()
    result = convert(model, [torch.randn(4, 3, 64, 64)], calibration=QUICK)
    result.save(tmp_path / "out")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(x), result.model(x))


def test_arguments_that_json_cannot_hold_are_named(tmp_path):
    model = family("swiglu")
    result = convert(model, [images(model, 6)], calibration=QUICK)
    assert "config.json cannot hold the model's argument mlp_layer=" in result.report.stock_timm
    result.save(tmp_path / "out")
    x = images(model, 3, seed=9)
    with torch.no_grad():
        assert torch.equal(normswap.load_into(family("swiglu"), tmp_path / "out")(x), result.model(x))


def test_a_norm_layer_class_does_not_hinder(tmp_path):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=48, num_heads=3, depth=1, norm_layer=nn.LayerNorm
    ).eval()
    result = convert(model, [images(model, 4)], calibration=QUICK)
    result.save(tmp_path / "out")
    assert result.report.stock_timm is None


@pytest.fixture(scope="module")
def converted():
    torch.manual_seed(0)
    model = family("vit")
    return convert(model, [images(model, 4)], calibration=QUICK)


@pytest.fixture
def result(converted):
    """A conversion that a test may change."""
    return copy.deepcopy(converted)


def test_what_is_no_output_folder(tmp_path):
    with pytest.raises(ArgumentError, match=r"no normswap\.json"):
        load(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "missing key", "format", "config"])
def test_a_damaged_folder_is_refused(result, tmp_path, damage):
    result.save(tmp_path / "out")
    weights, record, config = (tmp_path / "out" / n for n in ("model.safetensors", "normswap.json", "config.json"))
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "missing key":
        record.write_text(record.read_text().replace('"blocks.0.norm1",', "", 1))
    elif damage == "format":
        record.write_text(record.read_text().replace('"format": 2', '"format": 99'))
    else:
        config.write_text("{")
    with pytest.raises(CheckpointError):
        load(tmp_path / "out")


def test_a_folder_that_answers_differently_never_appears(result, tmp_path):
    result.save(tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    class Restless(type(result.model)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.rand(1)

    result.model.__class__ = Restless
    with pytest.raises(CheckFailedError, match="differ"):
        result.save(tmp_path / "out", normswap.SaveOptions(overwrite=True))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_stock_arguments_say_why_not():
    assert stock_arguments(family("vit"))[1] == "blocks.0.norm1 is still a LayerNorm"


@pytest.mark.parametrize("moved", [1e-6, 1e-2])
def test_reading_back_allows_for_sums_in_another_order(result, tmp_path, monkeypatch, moved):
    """On a GPU, or from tensors that lie otherwise in memory, the same weights round otherwise."""
    monkeypatch.setattr("normswap.outputs.save.difference", lambda *_: Difference(moved, moved, 100.0))
    if moved > 1e-4:
        with pytest.raises(CheckFailedError, match=r"read back, its outputs differ by 0\.01: not saved"):
            result.save(tmp_path / "out")
        return
    result.save(tmp_path / "out")
    assert json.loads((tmp_path / "out/normswap.json").read_text())["report"]["read_back_err"] == moved


def test_parts_of_one_tensor_are_saved(tmp_path):
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.randn(2, 8, 8)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.first.weight, self.second.weight = nn.Parameter(both[0]), nn.Parameter(both[1])

    write_weights(tmp_path / "file", Parts())
    assert set(load_file(tmp_path / "file")) == {"first.weight", "first.bias", "second.weight", "second.bias"}


def test_no_error_names_the_folder_that_is_gone(result, tmp_path, monkeypatch):
    def unreadable(path: object) -> None:
        raise CheckpointError(f"{path}/model.safetensors: cannot be read")

    monkeypatch.setattr("normswap.outputs.save._load_with_timm", unreadable)
    with pytest.raises(CheckpointError) as caught:
        result.save(tmp_path / "out")
    assert str(caught.value) == f"{tmp_path / 'out'}/model.safetensors: cannot be read"
