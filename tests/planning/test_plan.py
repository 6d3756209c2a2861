"""The plan: every LayerNorm found, one verdict each, the right one, and the reason in words."""

import subprocess
import sys
import textwrap

import pytest
import timm
import torch
from torch import nn

from normswap import ArgumentError, ModelRefusedError, NoLayerNormError, make_plan

from ..models import FAMILY, family


@pytest.mark.parametrize("name", FAMILY)
def test_family_verdicts(name):
    model = family(name)
    plan = make_plan(model)
    *_, total, verdicts = FAMILY[name]
    counts = plan.counts()
    assert counts["total"] == total == sum(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert {k: v for k, v in counts.items() if v and k.startswith(("fold", "affine", "keep"))} == verdicts
    assert all(site.reason for site in plan.sites)
    assert all(bool(site.targets) == site.verdict.startswith("fold") for site in plan.sites)


def test_rows_and_table_say_the_same():
    plan = make_plan(family("qk_norm_no_bias"))
    text = str(plan)
    for row in plan.to_json()["sites"]:
        assert row["path"] in text
        assert row["verdict"] in text
    q_norm = next(row for row in plan.to_json()["sites"] if row["path"].endswith("q_norm"))
    assert q_norm["producers"] == ["blocks.0.attn.qkv"]
    assert q_norm["creates_bias"] == ["blocks.0.attn.qkv"]


def test_both_heads_of_a_distilled_model_read_the_norm():
    site = make_plan(family("deit_distilled")).sites[-1]
    assert {target.name for target in site.targets} == {"head", "head_dist"}


def test_norm_pre_folds_into_everything_it_is_made_of():
    site = make_plan(family("clip")).sites[0]
    assert site.path == "norm_pre"
    shifts = {target.name: target.shift for target in site.targets}
    # The position embedding has a value for every token, so it alone takes the shift; the convolution has no bias.
    assert shifts == {"pos_embed": True, "cls_token": False, "patch_embed.proj": False}


def test_reasons_of_what_does_not_fold():
    assert "output" in make_plan(family("headless")).sites[-1].reason
    assert "max pooling" in make_plan(family("max_pool_final_norm")).sites[-1].reason


def test_qk_norms_map_head_channels_onto_their_own_rows():
    plan = make_plan(family("qk_norm"))
    q, k = (next(s for s in plan.sites if s.path == f"blocks.0.attn.{n}_norm").targets[0].channels for n in "qk")
    width, head = 48, 16
    assert q == tuple(c % head for c in range(width)) + (-1,) * 2 * width
    assert k == (-1,) * width + tuple(c % head for c in range(width)) + (-1,) * width


def test_keep():
    model = family("vit")
    plan = make_plan(model, keep=["blocks.0.*", "norm"])
    assert [s.path for s in plan.sites if s.verdict == "keep"] == ["blocks.0.norm1", "blocks.0.norm2", "norm"]
    with pytest.raises(ArgumentError, match=r"blocks\.9"):
        make_plan(model, keep=["blocks.9.*"])


def test_the_plan_changes_nothing():
    model = family("vit").train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    make_plan(model)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["test_vit4", "vit_base_patch16_xp_224"])
def test_no_layer_norm_is_refused_by_name(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(NoLayerNormError, match="RmsNorm") as caught:
        make_plan(model)
    assert caught.value.exit_code == 3


class _Toy(nn.Module):
    """A linear layer, a norm and what reads it; ``read`` is the forward pass after the first layer."""

    def __init__(self, read, **layers: nn.Module) -> None:
        super().__init__()
        self.read = read
        self.stem = nn.Conv2d(3, 8, 1)
        self.norm = layers.pop("norm", nn.LayerNorm(8))
        self.head = nn.Linear(8, 8)
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self, self.stem(x).flatten(2).transpose(1, 2))  # [B, 3, H, W] -> [B, N, C]


def _tied() -> nn.Module:
    toy = _Toy(lambda m, x: m.head(m.norm(m.other(x))), other=nn.Linear(8, 8))
    toy.other.weight = toy.head.weight
    return toy


def _as_map(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).unflatten(2, (4, 4))


HARD = {
    "zero padding": (_Toy(lambda m, x: m.head(nn.functional.pad(m.norm(x * 1), (0, 0, 0, 1)))), "affine", "padding"),
    "padded convolution": (
        _Toy(lambda m, x: m.conv(_as_map(m.norm(x * 1))), conv=nn.Conv2d(8, 8, 3, padding=1)),
        "affine",
        "pads",
    ),
    "unpadded convolution": (
        _Toy(lambda m, x: m.conv(_as_map(m.norm(x * 1))), conv=nn.Conv2d(8, 8, 2, stride=2)),
        "fold-forward",
        "conv",
    ),
    "added to": (_Toy(lambda m, x: m.head(m.norm(x * 1) + x)), "affine", "added"),
    "weight used elsewhere": (_Toy(lambda m, x: m.head(m.norm(x * 1)) + m.head(x)), "affine", "also runs"),
    "tied weight": (_tied(), "affine", "tied"),
    "computed bias": (
        _Toy(lambda m, x: nn.functional.linear(m.norm(x * 1), m.head.weight, m.head.bias * 2)),
        "affine",
        "bias in forward",
    ),
    "read by a norm": (
        _Toy(lambda m, x: m.head(m.second(m.norm(x * 1))), second=nn.LayerNorm(8)),
        "fold-forward",
        "second takes it on",
    ),
    "post-norm": (_Toy(lambda m, x: m.norm(x) * 2), "fold-backward", "stem"),
    "post-norm, also read": (_Toy(lambda m, x: m.norm(x) * 2 + x), "affine", "also read"),
    "channels mixed": (
        _Toy(lambda m, x: m.head(m.norm(x * 1).transpose(1, 2).reshape(2, 16, 8))),
        "affine",
        "same channel",
    ),
    "mean over channels": (_Toy(lambda m, x: m.norm(x * 1).mean(-1)), "affine", "mean"),
    "mean over tokens": (_Toy(lambda m, x: m.head(m.norm(x * 1).mean(1))), "fold-forward", "head"),
    "roll and windows": (
        _Toy(lambda m, x: m.head(m.norm(x * 1).roll(3, 1).reshape(2, 4, 4, 8).permute(0, 2, 1, 3))),
        "fold-forward",
        "head",
    ),
    "runs twice": (_Toy(lambda m, x: m.head(m.norm(m.norm(x)))), "keep", "2 times"),
    "two dimensions": (_Toy(lambda m, x: m.head(m.norm(x)), norm=nn.LayerNorm((16, 8))), "keep", "2 dimensions"),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_cases(name):
    model, verdict, word = HARD[name]
    site = make_plan(model, input_size=(3, 4, 4)).sites[0]
    assert (site.path, site.verdict) == ("norm", verdict), site.reason
    assert word in site.reason or any(word in target.name for target in site.targets)


def test_functional_and_idle_layer_norms_are_kept():
    def read(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return m.head(nn.functional.layer_norm(m.norm(x), (8,)))

    functional, used, idle = sorted(
        make_plan(_Toy(read, idle=nn.LayerNorm(4)), input_size=(3, 4, 4)).sites,
        key=lambda s: (s.kind == "LayerNorm", s.path != "norm"),
    )
    assert (functional.verdict, used.path) == ("keep", "norm")
    assert "function" in functional.reason
    assert (idle.path, idle.verdict, idle.reason) == ("idle", "keep", "never runs as a plain call in the forward pass")


def test_swin_pads_only_where_the_window_does_not_divide():
    arguments = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "num_classes": 5}
    fits = make_plan(timm.create_model("swin_tiny_patch4_window7_224", img_size=56, **arguments))
    pads = make_plan(timm.create_model("swin_tiny_patch4_window7_224", img_size=72, **arguments))
    verdict = {plan: next(s for s in plan.sites if s.path == "layers.0.blocks.0.norm1") for plan in (fits, pads)}
    assert verdict[fits].verdict == "fold-forward"
    assert verdict[pads].verdict == "affine"
    assert "padding" in verdict[pads].reason


def test_untraceable_model_is_refused():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) if x.sum() > 0 else x

    with pytest.raises(ModelRefusedError, match="cannot trace"):
        make_plan(Branches(), input_size=(3, 4, 4))


def test_size_is_asked_for_outside_timm():
    with pytest.raises(ArgumentError, match="input_size"):
        make_plan(nn.Sequential(nn.LayerNorm(4)))


@pytest.mark.parametrize(
    ("name", "first", "slot"),
    [("vit", 1, True), ("glu", 1, True), ("swiglu", 2, True), ("scale_norms", 1, False)],
)
def test_ffns(name, first, slot):
    ffns = make_plan(family(name)).ffns
    assert len(ffns) == 2
    assert all(len(f.first) == first and (f.slot is not None) == slot and not f.reason for f in ffns)


def test_fused_ffn_is_refused_by_name():
    block = timm.models.vision_transformer.ParallelScalingBlock
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, block_fn=block)
    (ffn,) = make_plan(model).ffns
    assert (ffn.kind, ffn.positions("pre-act")) == ("ParallelScalingBlock", ())
    assert "fused" in ffn.reason


def test_weights_are_not_allocated_twice():
    """A model with 170 MB of weights is planned in far less than that on top."""
    script = """
        import resource, timm, normswap
        model = timm.create_model("vit_base_patch16_224", depth=6)
        normswap.make_plan(timm.create_model("test_vit", depth=1))  # whatever the first export needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        normswap.make_plan(model)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 100_000, "kilobytes"
