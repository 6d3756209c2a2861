"""Re-solving the layers around the norms: nearer to the original for every family, and never where it must not."""

import copy
import functools

import pytest
import torch
from torch import nn

from normswap import (
    ArgumentError,
    CalibrationOptions,
    EvaluationOptions,
    calibrate,
    convert,
    make_plan,
    swap_norms,
)
from normswap.calibration.attention_refinement import STEPS, Problem
from normswap.calibration.ridge import Gram
from normswap.inputs.batches import BATCH_SIZE, HELD_OUT, ImageBatches
from normswap.records.report import Calibration

from ..models import FAMILY, family, images
from ..tolerance import SPLIT

COUNT = 6 * BATCH_SIZE  # one batch of six is held out, and no layer of the family has too few rows


def _calibrated(model: nn.Module, x: torch.Tensor, **options) -> tuple[nn.Module, Calibration]:
    swapped = swap_norms(model, ffn_bn=options.pop("ffn_bn", "pre-act"))
    return swapped, calibrate(swapped, [x], model, CalibrationOptions(**options))


@functools.cache
def _family(name: str, method: str = "reconstruct", reconstruct: str = "all") -> tuple[nn.Module, Calibration]:
    torch.manual_seed(0)
    model = family(name)
    return _calibrated(model, images(model, COUNT), method=method, reconstruct=reconstruct)


def _original(name: str) -> nn.Module:
    torch.manual_seed(0)
    return family(name)


@torch.no_grad()
def _error(converted: nn.Module, original: nn.Module, x: torch.Tensor) -> float:
    """Return the relative error of the outputs, about their mean over images."""
    y = original(x)
    return float((converted.eval()(x) - y).norm() / (y - y.mean(0)).norm())


@pytest.mark.parametrize("name", FAMILY)
def test_nearer_to_the_original_on_other_images(name):
    original = _original(name)
    x = images(original, 32, seed=5)
    assert _error(_family(name)[0], original, x) < 0.95 * _error(_family(name, "channel")[0], original, x)


@pytest.mark.parametrize("name", FAMILY)
def test_no_layer_fits_worse_than_it_did(name):
    """A penalty that draws towards the weights before cannot lose on the rows it is solved from."""
    layers = _family(name)[1].layers
    solved = [fit for fit in layers if not fit.reason]
    assert {fit.role for fit in solved} == {"reader", "writer"}
    assert all(fit.r2_before - 1e-6 <= fit.r2 <= 1 for fit in solved)
    assert all(fit.r2 > fit.r2_before + 1e-3 for fit in solved if fit.role == "reader" and "norm" not in fit.layer)
    assert all(0 < fit.refined <= 1 for fit in solved)
    assert all(fit.samples % COUNT == 0 for fit in solved)
    assert len({fit.layer for fit in layers}) == len(layers)


def test_gradient_steps_are_taken_where_they_help():
    """Held-out images decide, so some families take them and some do not."""
    refined = {name: min(f.refined for f in _family(name)[1].layers) for name in ("vit", "dinov2_registers")}
    assert refined["vit"] == 1
    assert refined["dinov2_registers"] < 0.9


def test_more_gradient_steps_leave_less_and_none_are_none():
    model = _original("dinov2_registers")
    x = images(model, COUNT)
    some, none = (_calibrated(model, x, refine_steps=steps)[1] for steps in (5, 0))
    left = [min(fit.refined for fit in found.layers) for found in (_family("dinov2_registers")[1], some, none)]
    assert left[0] < left[1] < left[2] == 1
    with pytest.raises(ArgumentError, match="`refine_steps` must be 0 or more, not -1"):
        calibrate(swap_norms(model), [x], model, options=CalibrationOptions(refine_steps=-1))


def test_every_batch_is_stepped_on_once_but_few_of_them_more_often(monkeypatch):
    model = _original("dinov2_registers")
    x = images(model, COUNT)
    assert _family("dinov2_registers")[1].refine_steps == STEPS
    batches = ImageBatches([x], next(model.parameters()))
    monkeypatch.setattr("normswap.calibration.reconstruction.STEPS", 1)
    assert _calibrated(model, x)[1].refine_steps == len(batches) - len(batches) // HELD_OUT > 1
    assert _calibrated(model, x, refine_steps=3)[1].refine_steps == 3
    assert _family("vit", reconstruct="readers")[1].refine_steps == 0
    assert _family("vit", "channel")[1].refine_steps is None


@pytest.mark.parametrize("name", ["vit", "deit3", "siglip", "relpos"])
def test_the_residual_stream_is_nearer_behind_every_writer(name):
    _, found = _family(name)
    writers = [fit.layer for fit in found.layers if fit.role == "writer" and not fit.reason]
    assert [error.after for error in found.stream] == writers
    assert all(error.patch <= error.patch_before * 1.05 for error in found.stream)
    assert sum(e.patch for e in found.stream) < sum(e.patch_before for e in found.stream)
    prefix = _original(name).num_prefix_tokens > 0
    assert all((error.prefix is not None) == prefix for error in found.stream)


@pytest.mark.parametrize("name", ["vit", "clip", "swiglu"])
def test_readers_leaves_what_writes_alone(name):
    """Up to their dtype: a fold into the layer is not done yet."""
    before = swap_norms(_original(name)).state_dict()
    writers = {f"{fit.layer}.weight" for fit in _family(name)[1].layers if fit.role == "writer"}
    readers = {f"{fit.layer}.weight" for fit in _family(name)[1].layers if fit.role == "reader"}
    assert writers
    both, found = _family(name)[0].state_dict(), _family(name, reconstruct="readers")
    only = found[0].state_dict()
    assert {fit.role for fit in found[1].layers} == {"reader"}
    assert not found[1].stream
    assert all(torch.equal(only[key], before[key]) for key in writers)
    assert not any(torch.equal(both[key], before[key]) for key in writers)
    assert not any(torch.equal(state[key], before[key]) for state in (both, only) for key in readers)


@pytest.mark.parametrize("name", FAMILY)
def test_only_the_layers_it_names_and_batch_norms_change(name):
    swapped, found = _family(name)
    before, after = swap_norms(_original(name)).state_dict(), swapped.state_dict()
    named = {fit.layer for fit in found.layers if not fit.reason}
    norms = {path for path, m in swapped.named_modules() if hasattr(m, "running_var")}
    changed = {key.rpartition(".")[0] for key in after if key not in before or not torch.equal(before[key], after[key])}
    assert changed == named | norms
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


@pytest.mark.parametrize("method", ["channel", "moments"])
def test_other_methods_re_solve_nothing(method):
    _, found = _family("vit", method)
    assert found.sites
    assert not found.layers
    assert not found.stream


def test_batch_norm_in_the_ffn_makes_no_difference():
    """It is put in as an identity and stays one."""
    model = family("vit", torch.float64)
    x, other = images(model, COUNT), images(model, 8, seed=5)
    without, *with_norms = (_calibrated(model, x, ffn_bn=where)[0].eval() for where in ("none", "pre-act", "post-act"))
    with torch.no_grad():
        for swapped in with_norms:
            torch.testing.assert_close(swapped(other), without(other), rtol=SPLIT, atol=SPLIT)


def test_tied_layers_are_left_alone():
    model = family("vit")
    model.blocks[1].attn.proj.weight = model.blocks[0].attn.proj.weight
    swapped, found = _calibrated(model, images(model, COUNT))
    layers = {fit.layer for fit in found.layers}
    assert "blocks.0.mlp.fc2" in layers
    assert not layers & {"blocks.0.attn.proj", "blocks.1.attn.proj"}
    assert torch.equal(swapped.blocks[0].attn.proj.weight, model.blocks[0].attn.proj.weight)
    assert swapped.blocks[0].attn.proj.weight is swapped.blocks[1].attn.proj.weight


class _Net(nn.Module):
    """A stem, a norm, and what reads it: ``read`` is the forward pass from the norm's output `[B, N, C]` on."""

    def __init__(self, read, **layers: nn.Module) -> None:
        super().__init__()
        self.read = read
        self.stem = nn.Conv2d(3, 8, 2, 2)
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self, self.norm(self.stem(x).flatten(2).transpose(1, 2) * 1))  # [B, 3, H, W] -> [B, N, C]


def _image(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).unflatten(2, (4, 4))  # [B, N, C] -> [B, C, H, W]


@pytest.mark.parametrize(
    ("read", "layer"),
    [
        (lambda m, y: m.fc(y) + m.fc(y.sin()), None),
        (lambda m, y: m.conv(_image(y)), nn.Conv2d(8, 8, 1, groups=2)),
        (lambda m, y: m.conv(_image(y)), nn.Conv2d(8, 8, 3, groups=8)),
        (lambda m, y: m.conv(_image(y)), nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")),
        (lambda m, y: m.fc(y) * m.fc.weight.mean(), None),
    ],
    ids=["called twice", "grouped", "depthwise", "circular", "weight read elsewhere"],
)
def test_what_no_single_solve_can_set_is_left_alone(read, layer):
    model = _Net(read, **({} if layer is None else {"conv": layer})).eval()
    swapped = swap_norms(model, make_plan(model, input_size=(3, 8, 8)))
    before = copy.deepcopy(swapped.state_dict())
    found = calibrate(swapped, [torch.randn(COUNT, 3, 8, 8)], original=model)
    assert [fit.site for fit in found.sites] == ["norm"]
    assert all(fit.reason and fit.layer == "stem" for fit in found.layers)
    after = swapped.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in after if not key.startswith("norm."))


@pytest.mark.parametrize(
    "arguments", [{}, {"kernel_size": 2, "stride": 2}, {"kernel_size": 2, "dilation": 2}, {"bias": False}]
)
def test_convolutions_are_solved_as_lstsq_solves_them(arguments):
    """On noise there is nothing to regularise, the penalty is small, the solution close to plain least squares."""
    conv = nn.Conv2d(8, 5, **{"kernel_size": 1, **arguments})  # made here, after the seed
    model = _Net(lambda m, y: m.conv(_image(y)), conv=conv).double().eval()
    x = torch.randn(COUNT, 3, 8, 8).double()
    swapped = swap_norms(model, make_plan(model, input_size=(3, 8, 8)))
    found = calibrate(swapped, [x], original=model)
    (fit,) = found.layers
    assert (fit.layer, fit.role) == ("conv", "reader")
    with torch.no_grad():
        wanted = model(x)
        inputs = _image(swapped.eval().norm(swapped.stem(x).flatten(2).transpose(1, 2)))
        rows = nn.functional.unfold(inputs, conv.kernel_size, conv.dilation, 0, conv.stride).mT.flatten(0, 1)
        rows = rows if conv.bias is None else torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        target = wanted.movedim(1, -1).flatten(0, 2)
        best = (rows @ torch.linalg.lstsq(rows, target).solution - target).square().mean()
        kept = (swapped.conv(inputs) - wanted).square().mean()
        channel = (conv(inputs) - wanted).square().mean()
    assert best <= kept <= best + 0.01 * (channel - best)


@pytest.mark.parametrize("training", [False, True])
def test_a_model_with_batch_norm_of_its_own(training):
    """Its BatchNorm is its own affair: neither set nor folded, not even where its module was left in training mode."""
    model = family("vit")
    model.blocks[1].ls1 = nn.Sequential(_Transposed(48))
    with torch.no_grad():
        model.blocks[1].ls1[0].bn.running_mean.normal_()
        model.blocks[1].ls1[0].bn.running_var.uniform_(0.5, 2)
    model.blocks[1].ls1.train(training)
    own = copy.deepcopy(model.blocks[1].ls1.state_dict())
    result = convert(model, [images(model, COUNT)], evaluation=EvaluationOptions(atol=1e-2))
    kept = result.model.blocks[1].ls1
    assert isinstance(kept[0].bn, nn.BatchNorm1d)
    assert all(torch.equal(own[key], value) for key, value in kept.state_dict().items())
    assert result.report.sites["total"] == 5
    assert result.report.stages[-1].kl < 1


class _Transposed(nn.Module):
    """BatchNorm over the channels of `[B, N, C]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(x.transpose(1, 2)).transpose(1, 2)


def test_gradient_steps_leave_a_layer_alone_whose_output_goes_elsewhere():
    """As in Hiera, where a norm is read by qkv and by a projection of the residual stream."""
    torch.manual_seed(0)
    x = [torch.randn(4, 5, 6, dtype=torch.float64) for _ in range(6)]
    used, elsewhere, wanted = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))
    before = copy.deepcopy((used.state_dict(), elsewhere.state_dict()))
    gram = Gram(torch.zeros(6, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    for batch in x:
        gram.update(batch.flatten(0, 1), torch.zeros(20, 1, dtype=torch.float64))

    def load(index: int):
        return x[index], lambda outputs: outputs[0].tanh(), wanted(x[index]).tanh()

    with torch.no_grad():
        left = Problem([used, elsewhere], gram.reduce(), load, len(x), lambda number: number == 5).refine(28)
    assert left < 0.9
    assert not torch.equal(used.weight, before[0]["weight"])
    torch.testing.assert_close(elsewhere.weight.detach(), before[1]["weight"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(elsewhere.bias.detach(), before[1]["bias"], rtol=1e-10, atol=1e-12)
