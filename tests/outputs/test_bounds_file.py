"""Bounds in the output folder: a file of their own, loaded by normswap and by stock timm, left out only knowingly."""

import re
import subprocess
import sys
from functools import partial

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import normswap
from normswap.errors import CheckpointError
from normswap.layers import TokenAffine, TokenBound
from normswap.outputs.bounds_file import BOUNDS, bounds_of

from ..models import family, images

TIGHT = normswap.CalibrationOptions(method="channel", bound="tight")
UNLIKE = 5.0  # times as large as what was calibrated on: without bounds the outputs are others


def _converted(model: nn.Module, bound: str = "tight") -> normswap.Conversion:
    return normswap.convert(
        model, [images(model, 20)], calibration=normswap.CalibrationOptions(method="channel", bound=bound)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    model = family("clip")
    result = _converted(model)
    out = tmp_path_factory.mktemp("bounds") / "out"
    result.save(out)
    return result, out, UNLIKE * images(model, 4, seed=3)


def _answers(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(x)


def test_the_folder_gives_the_bounded_model(made):
    result, out, x = made
    loaded = normswap.load(out)
    assert torch.equal(_answers(loaded, x), _answers(result.model, x))
    assert {type(m).__name__ for m in loaded.modules()} >= {"TokenBound"}
    # The bounds are in their own file, one pair for each LayerNorm, and the weights' file has none.
    names = [name for name, module in family("clip").named_modules() if isinstance(module, nn.LayerNorm)]
    assert set(load_file(out / BOUNDS)) == {f"{name}.{end}" for name in names for end in ("lower", "upper")}
    assert not any(name.endswith("lower") for name in load_file(out / "model.safetensors"))
    assert (out / BOUNDS).stat().st_mode == (out / "normswap.json").stat().st_mode


def test_stock_timm_with_and_without_the_bounds(made):
    result, out, x = made
    norm_layer = partial(TokenBound, file=str(out / BOUNDS))
    bounded = timm.create_model(f"local-dir:{out}", pretrained=True, norm_layer=norm_layer)
    assert torch.equal(_answers(bounded, x), _answers(result.model, x))
    plain = timm.create_model(f"local-dir:{out}", pretrained=True, norm_layer=nn.Identity)
    assert not any(isinstance(module, TokenBound) for module in plain.modules())
    assert (_answers(plain, x) - _answers(result.model, x)).abs().max() > 0.1


@pytest.mark.slow  # tests/outputs/test_stock_timm.py runs a card too
def test_the_card_has_all_that_is_needed(made, tmp_path):
    """Its Python runs as it stands, where normswap cannot be imported."""
    result, out, x = made
    (block,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    torch.save(x, tmp_path / "x.pt")
    lines = [
        "import sys; sys.modules['normswap'] = None",
        "import torch; torch.set_num_threads(1)",
        block.replace("PATH", str(out)),
        f"torch.save(model.eval()(torch.load({str(tmp_path / 'x.pt')!r})).detach(), {str(tmp_path / 'y.pt')!r})",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), _answers(result.model, x), rtol=1e-5, atol=1e-5)


def test_inside_another_model_they_are_found_too(made):
    _, out, _ = made
    norm = TokenBound(file=str(out / BOUNDS))
    wrapper = nn.ModuleDict({"backbone": nn.ModuleDict({"norm_pre": norm})})
    wrapper.load_state_dict({})
    assert torch.equal(norm.lower, load_file(out / BOUNDS)["norm_pre.lower"])


def test_a_file_of_another_model_is_a_missing_key(made, tmp_path):
    _, out, _ = made
    save_file({"zzz.lower": torch.zeros(3), "zzz.upper": torch.zeros(3)}, tmp_path / BOUNDS)
    with pytest.raises(RuntimeError, match=r"Missing key.*norm_pre\.lower, which .*bounds\.safetensors has not"):
        timm.create_model(
            f"local-dir:{out}", pretrained=True, norm_layer=partial(TokenBound, file=str(tmp_path / BOUNDS))
        )


def test_without_bounds_the_folder_is_as_it_always_was(tmp_path):
    result = _converted(family("vit"), "none")
    result.save(tmp_path / "out")
    assert not (tmp_path / "out" / BOUNDS).exists()
    assert bounds_of(result.model) == {}
    text = (tmp_path / "out" / "normswap.json").read_text()
    assert '"format": 1,' in text
    assert "TokenBound" not in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_with_bounds_is_of_a_format_that_older_versions_refuse(made):
    assert '"format": 2,' in (made[1] / "normswap.json").read_text()


def test_an_affine_map_is_bounded_too(tmp_path):
    model = family("headless")
    result = _converted(model)
    result.save(tmp_path / "out")
    x = UNLIKE * images(model, 4, seed=3)
    loaded = normswap.load(tmp_path / "out")
    assert torch.equal(_answers(loaded, x), _answers(result.model, x))
    affine = loaded.get_submodule("norm")
    assert isinstance(affine, TokenAffine)
    assert affine.lower is not None


class _Mine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.flatten, self.fc, self.norm, self.head = nn.Flatten(), nn.Linear(48, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.fc(self.flatten(x))))


def test_a_model_of_ones_own(tmp_path):
    result = normswap.convert(_Mine().eval(), [torch.randn(40, 3, 4, 4)], calibration=TIGHT)
    result.save(tmp_path / "out")
    x = UNLIKE * torch.randn(8, 3, 4, 4)
    loaded = normswap.load_into(_Mine().double(), tmp_path / "out")
    assert loaded.get_submodule("norm").lower.dtype == torch.float64
    torch.testing.assert_close(_answers(loaded, x.double()).float(), _answers(result.model, x))


def test_a_file_that_does_not_fit_is_refused(made, tmp_path):
    result, out, _ = made
    result.save(tmp_path / "out")
    file = tmp_path / "out" / BOUNDS
    bounds = load_file(file)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"bounds\.safetensors: cannot be read"):
        normswap.load(tmp_path / "out")
    file.write_bytes((out / BOUNDS).read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"bounds\.safetensors: cannot be read"):
        normswap.load(tmp_path / "out")
    narrow = {name: tensor[:7] if name == "norm_pre.lower" else tensor for name, tensor in bounds.items()}
    save_file(narrow, file)
    with pytest.raises(CheckpointError, match=r"norm_pre\.lower"):
        normswap.load(tmp_path / "out")
    gone = next(iter(bounds))
    save_file({name: tensor for name, tensor in bounds.items() if name != gone}, file)
    with pytest.raises(CheckpointError, match=re.escape(gone)):
        normswap.load(tmp_path / "out")
    model = family("clip")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=re.escape(gone)):
        normswap.load_into(model, tmp_path / "out")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_swapped_checkpoint_keeps_them(tmp_path):
    model = family("clip")
    result = _converted(model)
    result.save_swapped(tmp_path / "swapped")
    swapped = normswap.load_swapped(tmp_path / "swapped")
    x = UNLIKE * images(model, 4, seed=3)
    assert torch.equal(_answers(swapped.model, x), _answers(result.swapped, x))
    fused = normswap.fuse(swapped, [images(model, 20)])
    torch.testing.assert_close(_answers(fused.model, x), _answers(result.model, x), rtol=1e-4, atol=1e-4)
