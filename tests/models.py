"""Small real timm models, one per trait of the ViT family, with weights that no fold passes by accident."""

import os
from functools import partial

import timm
import torch
from torch import nn

from normswap.layers import TokenBatchNorm, TokenBound
from normswap.outputs.bounds_file import BOUNDS

_TINY = {"img_size": 32, "embed_dim": 48, "num_heads": 3, "depth": 2, "num_classes": 7}

# name -> (timm model, arguments, how many LayerNorms, verdicts in order of count)
FAMILY: dict[str, tuple[str, dict, int, dict[str, int]]] = {
    "vit": ("vit_tiny_patch16_224", _TINY, 5, {"fold-forward": 5}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", _TINY, 5, {"fold-forward": 5}),
    "deit3": ("deit3_small_patch16_224", _TINY, 5, {"fold-forward": 5}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {**_TINY, "img_size": 28}, 5, {"fold-forward": 5}),
    "avg_pool": ("vit_tiny_patch16_224", {**_TINY, "global_pool": "avg"}, 5, {"fold-forward": 5}),
    "avg_pool_final_norm": (
        "vit_tiny_patch16_224",
        {**_TINY, "global_pool": "avg", "fc_norm": False},
        5,
        {"fold-forward": 5},
    ),
    "max_pool_final_norm": (
        "vit_tiny_patch16_224",
        {**_TINY, "global_pool": "max", "fc_norm": False},
        5,
        {"fold-forward": 4, "affine": 1},
    ),
    "clip": ("vit_base_patch16_clip_224", _TINY, 6, {"fold-forward": 5, "fold-backward": 1}),
    "clip_no_embed_class": (
        "vit_base_patch16_clip_224",
        {**_TINY, "no_embed_class": True, "reg_tokens": 2},
        6,
        {"fold-forward": 5, "fold-backward": 1},
    ),
    "siglip": ("vit_base_patch16_siglip_224", _TINY, 6, {"fold-forward": 6}),
    "qk_norm": ("vit_tiny_patch16_224", {**_TINY, "qk_norm": True}, 9, {"fold-forward": 5, "fold-backward": 4}),
    "qk_norm_no_bias": (
        "vit_tiny_patch16_224",
        {**_TINY, "qk_norm": True, "qkv_bias": False},
        9,
        {"fold-forward": 5, "fold-backward": 4},
    ),
    "no_qkv_bias": ("vit_tiny_patch16_224", {**_TINY, "qkv_bias": False}, 5, {"fold-forward": 5}),
    "headless": ("vit_tiny_patch16_224", {**_TINY, "num_classes": 0}, 5, {"fold-forward": 4, "affine": 1}),
    "scale_norms": (
        "vit_tiny_patch16_224",
        {**_TINY, "scale_attn_norm": True, "scale_mlp_norm": True},
        9,
        {"fold-forward": 9},
    ),
    "swiglu": (
        "vit_small_patch14_dinov2",
        {**_TINY, "img_size": 28, "mlp_layer": timm.layers.SwiGLU},
        5,
        {"fold-forward": 5},
    ),
    "glu": ("vit_tiny_patch16_224", {**_TINY, "mlp_layer": timm.layers.GluMlp}, 5, {"fold-forward": 5}),
    "dynamic_size": ("vit_tiny_patch16_224", {**_TINY, "dynamic_img_size": True}, 5, {"fold-forward": 5}),
    "relpos": ("test_vit", {"img_size": 64, "depth": 3}, 7, {"fold-forward": 7}),
}


def family(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return one model of the family in eval mode, every parameter random (LayerNorm's too)."""
    architecture, arguments, *_ = FAMILY[name]
    return randomised(timm.create_model(architecture, **arguments)).to(dtype).eval()


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.endswith(("pos_embed", "cls_token", "reg_token")):
            parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
        else:
            parameter.copy_(torch.randn_like(parameter) * 0.5 + (0.7 if "norm" in name else 0.0))
    return model


@torch.no_grad()
def randomise_statistics(model: nn.Module) -> nn.Module:
    """Give every BatchNorm random statistics (variances over six orders of magnitude), weight and bias."""
    for module in model.modules():
        if isinstance(module, TokenBatchNorm):
            sigma = 10 ** (torch.rand_like(module.running_var) * 3 - 1.5)
            module.running_var.copy_(sigma.square())
            module.running_mean.copy_(torch.randn_like(sigma) * sigma)
            # A scale of order one on average, of both signs, so that the outputs stay comparable.
            module.weight.copy_(torch.randn_like(sigma) * (sigma.square() + module.eps).sqrt())
            module.bias.copy_(torch.randn_like(sigma))
    return model


def images(model: nn.Module, count: int = 2, seed: int = 1) -> torch.Tensor:
    """Return random images `[B, C, H, W]` in the model's size and dtype."""
    size = timm.models.get_model_input_config(model)["input_size"]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *size, generator=generator).to(next(model.parameters()).dtype)


@torch.no_grad()
def bound_norms(model: nn.Module, sites: list[str], x: torch.Tensor) -> nn.Module:
    """Bound what arrives at each norm to the middle half of what arrives there for some images, one after the other."""
    for site in sites:
        norm = model.get_submodule(site)
        seen: list[torch.Tensor] = []
        with norm.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(module.tokens(inputs[0]))):
            model(x)
        ordered = torch.cat(seen).sort(0).values
        norm.set_bound(ordered[len(ordered) // 4], ordered[-1 - len(ordered) // 4])  # type: ignore[operator]
    return model


def with_timm(folder: object) -> nn.Module:
    """Return the model in an output folder as plain timm loads it, in eval mode."""
    file = f"{folder}/{BOUNDS}"
    norm_layer = partial(TokenBound, file=file) if os.path.exists(file) else nn.Identity
    return timm.create_model(f"local-dir:{folder}", pretrained=True, norm_layer=norm_layer).eval()
