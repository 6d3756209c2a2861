"""Models built to trap a fold: whatever the verdict, fused and swapped must answer alike, and nothing may be lost."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from normswap import CalibrationOptions, ModelRefusedError, convert, fold_norms, load, make_plan, swap_norms
from normswap.surgery.fold import max_difference

from ..models import images, randomise_statistics
from ..tolerance import FOLD_FLOAT64


class _Trap(nn.Module):
    """A convolution stem, a norm, layers around it; ``read`` is the forward pass on tokens `[B, N, C]`."""

    def __init__(self, read, **layers: nn.Module) -> None:
        super().__init__()
        self.read = read
        self.stem = nn.Conv2d(3, 6, 2, 2)
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.scalar = nn.Parameter(torch.tensor(0.3))
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self, self.stem(x).flatten(2).transpose(1, 2))  # [B, 3, H, W] -> [B, N, C]


def _padded_before(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x = m.norm(F.pad(x, (0, 0, 0, 3)))
    return m.head((x + x.sin()).mean(1))


def _tied_ffn() -> nn.Module:
    trap = _Trap(
        lambda m, x: m.head(m.mlp2(m.mlp(m.norm(x) + x))), mlp=timm.layers.Mlp(6, 12), mlp2=timm.layers.Mlp(6, 12)
    )
    trap.mlp2.fc1.bias = trap.mlp.fc1.bias
    return trap


TRAPS = {
    "padding before the norm": _Trap(_padded_before),
    "bias of the reader read elsewhere": _Trap(lambda m, x: m.fc(m.norm(x * 1)) + m.fc.bias.sin()),
    "bias of the producer read elsewhere": _Trap(lambda m, x: m.norm(m.fc(x)).sin() + m.fc.bias.sin()),
    "FFN with a tied bias": _tied_ffn(),
    "FFN weight read elsewhere": _Trap(
        lambda m, x: m.head(m.mlp(m.norm(x * 1))) + m.mlp.fc1.weight.sum(), mlp=timm.layers.Mlp(6, 12)
    ),
    "a single number is added": _Trap(lambda m, x: m.norm(x + m.scalar).sin()),
    "norm's weight read elsewhere": _Trap(lambda m, x: m.head(m.norm(x * 1) + m.norm.weight)),
    "no affine part": _Trap(lambda m, x: m.head(m.norm(x * 1)), norm=nn.LayerNorm(6, elementwise_affine=False)),
}


@pytest.mark.parametrize("name", TRAPS)
def test_traps(name):
    model = TRAPS[name].double().eval()
    plan = make_plan(model, input_size=(3, 8, 8))
    swapped = randomise_statistics(swap_norms(model, plan)).eval()
    assert {b.dtype for b in swapped.buffers() if b.is_floating_point()} <= {torch.float64}
    fused = fold_norms(swapped, input_size=plan.input_size)
    x = torch.randn(2, 3, 8, 8).double()
    scale = max(1.0, float(swapped(x).detach().abs().max()))
    assert max_difference(swapped, fused, [x]) <= FOLD_FLOAT64 * scale


def test_memory_shared_without_a_tie_is_seen():
    model = _Trap(lambda m, x: m.head(m.norm(x * 1)) + m.other(x), other=nn.Linear(6, 4)).double().eval()
    model.other.weight = nn.Parameter(model.head.weight.data)
    site = make_plan(model, input_size=(3, 8, 8)).sites[0]
    assert (site.verdict, "tied" in site.reason) == ("affine", True)


def test_an_activation_inside_a_norm_is_not_lost():
    model = timm.create_model("vitamin_small_224", img_size=64, num_classes=5)
    kept = {site.path: site.reason for site in make_plan(model).sites if site.verdict == "keep"}
    path = "patch_embed.backbone.stem.norm1"
    assert "more than normalise" in kept[path]
    swapped = swap_norms(model)
    assert type(swapped.get_submodule(path)) is type(model.get_submodule(path))


def test_a_norm_whose_weight_is_applied_twice_is_kept():
    def read(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.head(F.layer_norm(x, (6,), m.norm.weight, m.norm.bias) + m.norm(x))

    site = next(s for s in make_plan(_Trap(read), input_size=(3, 8, 8)).sites if s.path == "norm")
    assert (site.verdict, "outside its own call" in site.reason) == ("keep", True)


def test_an_mlp_that_never_sees_the_image_is_left_alone():
    model = timm.create_model("vit_srelpos_small_patch16_224", img_size=32, embed_dim=48, num_heads=3, depth=1)
    plan = make_plan(model)
    refused = [ffn.path for ffn in plan.ffns if ffn.reason]
    assert any("rel_pos" in path for path in refused)
    assert plan.counts()["ffn_bn"] == 1


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ModelRefusedError, match="2 values"):
        make_plan(_Trap(lambda m, x: (m.head(m.norm(x)), x)), input_size=(3, 8, 8))
    with pytest.raises(ModelRefusedError, match="itself a LayerNorm"):
        make_plan(nn.LayerNorm(8), input_size=(3, 8, 8))


def test_the_plan_is_for_the_size_of_the_images():
    """At 72 pixels this Swin pads after its first norm; at its own 56 it does not."""
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=56,
        embed_dim=24,
        depths=(1, 1),
        num_heads=(2, 2),
        num_classes=5,
        strict_img_size=False,
    ).eval()
    result = convert(model, [torch.randn(4, 3, 72, 72)])
    assert result.plan.input_size == (3, 72, 72)
    site = next(s for s in result.plan.sites if s.path == "layers.0.blocks.0.norm1")
    assert site.verdict == "affine"


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2)}),
        pytest.param("vitamin_small_224", {"img_size": 64}, marks=pytest.mark.slow),
    ],
)
def test_architectures_that_stock_timm_cannot_build_still_save(tmp_path, name, arguments):
    model = timm.create_model(name, num_classes=5, **arguments).eval()
    result = convert(model, [images(model, 4)], calibration=CalibrationOptions(method="moments"))
    result.save(tmp_path / "out")
    assert result.report.stock_timm
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(images(model)), result.model(images(model)))


def test_a_float64_model_is_saved_as_timm_will_load_it(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, num_heads=3, depth=1).double().eval()
    convert(model, [images(model, 4)]).save(tmp_path / "out")
    assert load(tmp_path / "out").head.weight.dtype == torch.float32


def test_a_model_that_writes_into_its_input_is_calibrated_right():
    def writes(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.head(m.norm(x))

    class Writes(_Trap):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.sub_(0.5))

    from normswap import calibrate

    model = Writes(writes).double().eval()
    x = torch.randn(4, 3, 8, 8).double()
    before = x.clone()
    swapped = swap_norms(model, make_plan(model, input_size=(3, 8, 8)))
    fits = calibrate(swapped, [x], original=model).sites
    assert torch.equal(x, before)
    assert fits[0].r2 == pytest.approx(fits[0].r2_original)
