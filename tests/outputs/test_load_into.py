"""Models that were changed after timm built them: what timm can rebuild is found out first, and all can be saved."""

import copy
import shutil

import pytest
import timm
import torch
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

import normswap
from normswap import ArgumentError, CheckpointError, load, load_into, load_swapped
from normswap.outputs.rebuild import unwrapped
from normswap.pipeline import steps

from ..cli.test_cli import IMAGES, run
from ..models import family, images, randomised, with_timm

CHANNEL = normswap.CalibrationOptions(method="channel")


class LowRank(nn.Module):
    """A layer wrapped for low-rank adaptation."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


class Normalised(nn.Module):
    """A backbone that takes pixels as they are."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.2))
        self.register_buffer("std", torch.full((1, 3, 1, 1), 0.5), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.backbone((x - self.mean) / self.std)


def _head(model: nn.Module) -> nn.Module:
    model.head = nn.Linear(48, 5)
    return model


def _sequential_head(model: nn.Module) -> nn.Module:
    model.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(48, 5))
    return model


def _adapted(model: nn.Module) -> nn.Module:
    model.blocks[1].attn.qkv = LowRank(model.blocks[1].attn.qkv)
    return model


def _activation(model: nn.Module) -> nn.Module:
    model.blocks[0].mlp.act = nn.ReLU()
    return model


def _compiled_blocks(model: nn.Module) -> nn.Module:
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    model.blocks[1].mlp = torch.compile(model.blocks[1].mlp, backend="eager")
    return model


# What was done to timm's model -> what loads the result, and why plain timm does not.
CHANGES = {
    "head": (_head, None),
    "compiled blocks": (_compiled_blocks, None),
    "compiled": (lambda model: torch.compile(model, backend="eager"), None),
    "data parallel": (nn.DataParallel, None),
    "moving average, first": (ModelEma, None),
    "moving average, second": (ModelEmaV2, None),
    "moving average, third": (ModelEmaV3, None),
    "averaged": (AveragedModel, None),
    "all at once": (lambda model: nn.DataParallel(torch.compile(_compiled_blocks(model), backend="eager")), None),
    "sequential head": (_sequential_head, "head.1.weight is not in it"),
    "low rank": (_adapted, "blocks.1.attn.qkv.base.weight is not in it"),
    "wrapper": (Normalised, "Normalised does not come from timm"),
    "activation": (_activation, "with the same weights it answers otherwise"),
}


def changed(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = CHANGES[name][0](family("vit"))
    return model.eval() if isinstance(model, nn.Module) else model


def data(count: int = 6, seed: int = 1) -> torch.Tensor:
    return images(family("vit"), count, seed)


@pytest.mark.parametrize("name", CHANGES)
def test_every_model_can_be_saved_and_loaded(tmp_path, name):
    model, reason = changed(name), CHANGES[name][1]
    plain = unwrapped(model)
    before = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    result = normswap.convert(model, [data()], calibration=CHANNEL)
    assert not any("_orig_mod" in key or key.startswith("module.") for key in result.model.state_dict())
    result.save(tmp_path / "out")
    report, x = result.report, data(3, seed=9)
    text = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    with torch.no_grad():
        expected = result.model(x)
        if reason is None:
            assert report.load_with == "timm.create_model"
            stock = with_timm(tmp_path / "out")
            assert torch.equal(stock(x), expected)
            assert torch.equal(load(tmp_path / "out")(x), expected)
        else:
            assert report.load_with == "normswap.load_into"
            assert reason in report.stock_timm
            assert 'model = normswap.load_into(model, "PATH")\n```\n' in text
            with pytest.raises(ArgumentError, match=r"timm cannot rebuild: pass your own to normswap\.load_into"):
                load(tmp_path / "out")
        fresh = copy.deepcopy(plain)
        for parameter in fresh.parameters():
            parameter.fill_(0.5)
        loaded = load_into(fresh, tmp_path / "out")
        assert loaded is fresh
        assert torch.equal(loaded(x), expected)
    assert all(torch.equal(before[key], tensor) for key, tensor in plain.state_dict().items())


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    """The conversion of a model that timm cannot rebuild, and its folder, for tests that only read them."""
    result = normswap.convert(changed("wrapper"), [data()], calibration=CHANNEL)
    result.save(folder := tmp_path_factory.mktemp("wrapped") / "mine")
    return result, folder


@pytest.mark.parametrize("name", ["head", "low rank", "wrapper"])
def test_before_the_fold_too(tmp_path, name):
    model = changed(name)
    result = normswap.convert(model, [data()], calibration=CHANNEL)
    result.save_swapped(tmp_path / "swapped")
    if CHANGES[name][1] is None:
        swapped = load_swapped(tmp_path / "swapped")
    else:
        with pytest.raises(ArgumentError, match="pass your own as `model`"):
            load_swapped(tmp_path / "swapped")
        swapped = load_swapped(tmp_path / "swapped", changed(name))
    x = data(3, seed=9)
    again = normswap.fuse(swapped)
    with torch.no_grad():
        assert torch.equal(swapped.model(x), result.swapped(x))
        assert torch.equal(again.model(x), result.model(x))
    again.save(tmp_path / "out")
    assert again.report.load_with == result_of(tmp_path, result)


def result_of(tmp_path, result: normswap.Conversion) -> str | None:
    result.save(tmp_path / "other")
    return result.report.load_with


def test_it_is_known_before_calibration(monkeypatch):
    """`prepared` is what runs before any calibration."""
    known = []
    monkeypatch.setattr(steps, "_calibrate", lambda work: known.append(work.rebuilt.problem) or 1 / 0)
    for name in ("low rank", "wrapper", "head"):
        with pytest.raises(ZeroDivisionError):
            normswap.convert(changed(name), [data()])
    assert known[0].endswith("blocks.1.attn.qkv.base.weight is not in it")
    assert known[1:] == ["Normalised does not come from timm", None]


def test_a_compiled_block_stays_compiled_in_the_callers_model():
    model = changed("compiled blocks")
    plain = unwrapped(model)
    assert type(plain.blocks[0]).__name__ == "Block"
    assert "_orig_mod" in model.blocks[0]._modules
    assert plain.blocks[0].attn.qkv.weight is model.blocks[0]._orig_mod.attn.qkv.weight
    assert unwrapped(plain) is plain


def test_what_is_converted_in_part_can_be_converted_further(tmp_path):
    model = family("vit")
    plan = normswap.make_plan(model, keep=["blocks.0.*"])
    normswap.convert(model, [data()], plan=plan, calibration=CHANNEL).save(tmp_path / "part")
    part = load(tmp_path / "part")
    result = normswap.convert(part, [data()], calibration=CHANNEL)
    result.save(tmp_path / "out")
    x = data(3, seed=9)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(x), result.model(x))
    assert not any(isinstance(module, nn.LayerNorm) for module in load(tmp_path / "out").modules())


@pytest.mark.parametrize("damage", ["no norms", "another width", "another layer", "weights"])
def test_what_does_not_fit_changes_nothing(wrapped, tmp_path, damage):
    result, folder = wrapped
    shutil.copytree(folder, tmp_path / "out")
    model, text = changed("wrapper"), "does not fit the model"
    if damage == "no norms":
        model, text = result.model, r"Normalised has no LayerNorm at backbone\.\S+: pass the model as it was"
    elif damage == "another width":
        arguments = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 7}
        model = Normalised(randomised(timm.create_model("vit_tiny_patch16_224", **arguments)))
    elif damage == "another layer":
        model.more = nn.Linear(2, 2)
    else:
        file = tmp_path / "out/model.safetensors"
        file.write_bytes(file.read_bytes()[:-50])
        text = "truncated"
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=text):
        load_into(model, tmp_path / "out")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_dtype_stays_and_what_is_around_the_model_too(tmp_path):
    result = normswap.convert(family("headless"), [data()], calibration=CHANNEL)  # its last norm becomes an affine
    result.save(tmp_path / "out")
    around = nn.DataParallel(family("headless").double())
    loaded = load_into(around, tmp_path / "out")
    assert loaded is around
    assert {tensor.dtype for tensor in loaded.module.state_dict().values()} == {torch.float64}
    x = data(3, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(x.double()).float(), result.model(x), rtol=1e-4, atol=1e-4)


def test_the_command_line_says_it_at_once(wrapped, tmp_path):
    mine = wrapped[1]
    for command in ("convert", "evaluate"):
        out = ("-o", tmp_path / "out") if command == "convert" else ()
        result = run(command, "-m", f"local-dir:{mine}", *IMAGES, *out)
        assert result.exit_code == 2
        last = result.stderr.splitlines()[-1]
        assert last.startswith(f"Error: {mine}: made from Normalised that timm cannot rebuild: ")
    pushed = run("push", mine, "user/mine", "--dry-run")
    assert pushed.exit_code == 0, pushed.stderr
    assert "config.json" not in pushed.stdout
