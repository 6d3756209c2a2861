"""Find each feed-forward network and where a BatchNorm can go in it."""

from dataclasses import dataclass

from timm.layers import GatedMlp, GluMlp, Mlp, SwiGLU
from torch import nn

from ..errors import ModelRefusedError
from ..layers import NormedConv2d, NormedLinear
from .graph import ModelGraph, users, weight_and_bias


@dataclass(frozen=True)
class Ffn:
    """One feed-forward network and where a BatchNorm can go between its linear layers.

    Attributes:
        path: module path.
        kind: class name.
        first: paths of its first linear layers (two for a SwiGLU with separate gate).
        slot: path of the place between activation and last linear layer, None if it has none.
        reason: why no BatchNorm can go in at all; empty otherwise.
    """

    path: str
    kind: str
    first: tuple[str, ...]
    slot: str | None
    reason: str = ""

    def positions(self, ffn_bn: str) -> tuple[str, ...]:
        """Return the module paths that get a BatchNorm for the position ``ffn_bn``."""
        if ffn_bn == "pre-act":
            return self.first
        return (self.slot,) if ffn_bn == "post-act" and self.slot else ()


def find_ffns(graph: ModelGraph) -> tuple[Ffn, ...]:
    found: list[Ffn] = []
    for path, module in graph.model.named_modules():
        first = [name for name in ("fc1", "fc1_g", "fc1_x") if isinstance(getattr(module, name, None), nn.Module)]
        if first and isinstance(getattr(module, "fc2", None), nn.Module):
            found.append(_ffn(graph, path, module, first))
        elif isinstance(getattr(module, "mlp_act", None), nn.Module):
            reason = "its first linear layer is fused with the attention's input projection"
            found.append(Ffn(path, type(module).__name__, (), None, reason))
    return tuple(found)


def _ffn(graph: ModelGraph, path: str, module: nn.Module, first: list[str]) -> Ffn:
    kind = type(module).__name__
    prefix = f"{path}." if path else ""
    layers = tuple(prefix + name for name in first)
    for name, layer in zip(layers, (getattr(module, n) for n in first), strict=True):
        if type(layer) not in (nn.Linear, nn.Conv2d, NormedLinear, NormedConv2d):
            return Ffn(path, kind, (), None, f"{name} is a {type(layer).__name__}, not a plain linear layer")
        try:
            calls = graph.calls(name)
        except ModelRefusedError:  # it runs on constants, as in a table of relative positions
            calls = []
        if len(calls) != 1:
            return Ffn(path, kind, (), None, f"{name} does not run exactly once on the image")
        shared = [t for n in calls[0].nodes for t in weight_and_bias(n) if len(users(t)) > 1]
        if shared or any(graph.tied.get(f"{name}.{n}") for n in ("weight", "bias")):
            return Ffn(path, kind, (), None, f"{name} shares its weight or bias")
    # Only in these classes is the norm slot known to sit right before the last linear layer.
    has_slot = type(module) in (Mlp, GluMlp, SwiGLU, GatedMlp) and type(module.norm) is nn.Identity
    return Ffn(path, kind, layers, f"{prefix}norm" if has_slot else None)
