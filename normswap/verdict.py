"""Decide for one norm where its BatchNorm can fold, exactly, and say why not where it cannot.

Forward, into every linear layer that reads it: ``W' = W * s`` (columns), ``b' = b + W @ h``. Backward, into
everything its input is made of: ``W' = s[:, None] * W`` (rows), ``b' = s * b + h``; through an addition the scale
goes to both sides and the shift to one, through a concatenation both go to every part. That covers a patch
embedding plus position embedding plus class token (CLIP's norm_pre), and q or k norms, which sit on some of the
rows of a fused qkv layer.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn

from .graph import Call, ModelGraph, argument, operation, owner, users, weight_and_bias
from .norm import TokenBatchNorm
from .trace import AVERAGING, PADDING, REARRANGING, UNCHANGED, Read, channel_ids, follow

FOLD_FORWARD, FOLD_BACKWARD, AFFINE, KEEP = "fold-forward", "fold-backward", "affine", "keep"
VERDICTS = (FOLD_FORWARD, FOLD_BACKWARD, AFFINE, KEEP)

_BLOCKED_BY = {
    "add": "its output is added to another value (residual stream)",
    "mul": "its output is multiplied by another value",
    "cat": "its output is concatenated with values that are not normalised",
    "amax": "max pooling does not commute with a negative scale",
    "max": "max pooling does not commute with a negative scale",
    "adaptive_max_pool2d": "max pooling does not commute with a negative scale",
    "max_pool2d": "max pooling does not commute with a negative scale",
    "scaled_dot_product_attention": "attention itself reads it",
    "matmul": "a matrix product of two activations reads it",
    "output": "it is the model's output",
}


@dataclass(frozen=True)
class Target:
    """What takes a scale and a shift, and which of the norm's channels each of its features takes.

    Attributes:
        name: path of a linear or convolution layer, or the name of a parameter.
        side: "input" for a layer that reads the norm, "output" for a layer the norm reads, "value" for a parameter.
        channels: one norm channel per feature; -1 for a feature that is left alone.
        shift: whether the shift goes here too (in an addition only one side takes it).
        creates_bias: the layer has no bias and gets one.
    """

    name: str
    side: Literal["input", "output", "value"]
    channels: tuple[int, ...]
    shift: bool = True
    creates_bias: bool = False


@dataclass(frozen=True)
class Verdict:
    """One of `VERDICTS`, the reason in words, and the fold's targets (none for affine and keep)."""

    verdict: str
    reason: str
    targets: tuple[Target, ...] = ()


class _Blocked(Exception):
    """Why one way of folding is closed."""


def judge(graph: ModelGraph, call: Call, channel_dim: int) -> Verdict:
    """Return the verdict for the norm that ran in ``call``, whose channels lie in ``channel_dim``."""
    try:
        targets = _forward(graph, call, channel_dim)
        gains = [t.name for t in targets if t.creates_bias]
        bias = f"; {', '.join(gains)} gets a bias" if gains else ""
        return Verdict(FOLD_FORWARD, f"every reader is linear{bias}", targets)
    except _Blocked as forward:
        try:
            targets = _backward(graph, call, channel_dim)
            return Verdict(FOLD_BACKWARD, f"{forward}; fed only by {_names(targets)}", targets)
        except _Blocked as backward:
            return Verdict(AFFINE, f"{forward}; {backward}")


def _names(targets: tuple[Target, ...]) -> str:
    return ", ".join(f"{t.name} (gets a bias)" if t.creates_bias else t.name for t in targets)


def _forward(graph: ModelGraph, call: Call, channel_dim: int) -> tuple[Target, ...]:
    reads = list(follow(call.output, channel_ids(call.output, channel_dim)))
    if not reads:
        raise _Blocked("nothing reads its output")
    readers = {read.node for read in reads}
    targets: dict[str, Target] = {}
    for read in reads:
        if operation(read.node) not in _LAYERS or argument(read.node, 0) is not read.source:
            raise _Blocked(_why_not(graph, read))
        path, layer = _layer(graph, read.node)
        if any(not users(tensor) <= readers for tensor in weight_and_bias(read.node)):
            raise _Blocked(f"{path} also runs on other values, or its weights are read elsewhere")
        if isinstance(layer, nn.Conv2d) and any(layer.padding if layer.padding != "valid" else ()):
            raise _Blocked(f"{path} pads its input, and a shift does not survive zero padding")
        target = Target(path, "input", _channels_seen(read, layer, path), True, layer.bias is None)
        if targets.setdefault(path, target) != target:
            raise _Blocked(f"{path} reads it twice, with its channels in different places")
    return tuple(targets.values())


def _channels_seen(read: Read, layer: nn.Module, path: str) -> tuple[int, ...]:
    axis = -1 if isinstance(layer, nn.Linear) else 1
    features = read.ids.movedim(axis, -1).reshape(-1, read.ids.shape[axis])  # [..., K] -> [M, K]
    if (features == 0).any():
        raise _Blocked(f"zero padding before {path}, and a shift does not survive it")
    if not (features == features[0]).all():
        raise _Blocked(f"a feature of {path} does not always see the same channel")
    return tuple((features[0] - 1).tolist())


def _why_not(graph: ModelGraph, read: Read) -> str:
    name, where = operation(read.node), owner(read.node)
    if name == "layer_norm" or isinstance(_module(graph, where), nn.LayerNorm | TokenBatchNorm):
        return f"another norm reads it ({where})"
    if name in _LAYERS:
        return f"{where} takes it as a weight"
    return _BLOCKED_BY.get(name, f"{name} reads it") + (f" in {where}" if where and name != "output" else "")


_LAYERS = {"linear": nn.Linear, "conv2d": nn.Conv2d}


def _module(graph: ModelGraph, path: str) -> nn.Module:
    return graph.model.get_submodule(path)


def _layer(graph: ModelGraph, node: fx.Node) -> tuple[str, nn.Linear | nn.Conv2d]:
    """Return the layer that ran in ``node`` if its weight and bias are plain parameters that only it uses."""
    path = owner(node)
    layer = _module(graph, path)
    weight = graph.attribute(argument(node, 1))
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    where = path or type(graph.model).__name__
    if not isinstance(layer, nn.Linear | nn.Conv2d) or not isinstance(layer, _LAYERS[operation(node)]):
        used = f" with the weights of {weight}" if weight else ""
        raise _Blocked(f"{where} calls {operation(node)}{used} by itself, with a bias it makes in forward")
    if weight != f"{path}.weight":
        raise _Blocked(f"{where} computes its weight in forward")
    if bias is not None and graph.attribute(bias) != f"{path}.bias":
        raise _Blocked(f"{where} computes its bias in forward")
    for name in filter(None, (weight, graph.attribute(bias))):
        others = graph.tied.get(name)
        if others:
            raise _Blocked(f"{name} is tied to {', '.join(others)}")
    return path, layer


def _backward(graph: ModelGraph, call: Call, channel_dim: int) -> tuple[Target, ...]:
    search = _Sources(graph)
    search.visit(call.input, shift=True)
    targets = []
    for node, shift in search.leaves.items():
        targets.append(_produced(graph, call, channel_dim, node, shift, frozenset(search.joints)))
    return tuple(targets)


class _Sources:
    """The layers and parameters a value is made of, and the additions and concatenations that join them."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.leaves: dict[fx.Node, bool] = {}
        self.joints: set[fx.Node] = set()

    def visit(self, node: fx.Node, shift: bool) -> None:
        if self.is_leaf(node):
            if node in self.leaves:
                raise _Blocked(f"{node.name} enters its input twice")
            self.leaves[node] = shift
            return
        parts = self.parts(node)
        if len(parts) > 1:
            if len(node.users) > 1:
                raise _Blocked("others read its input too (residual stream)")
            self.joints.add(node)
        taker = min(parts, key=self.price) if operation(node) == "add" else None
        for part in parts:
            self.visit(part, shift and (taker is None or part is taker))

    def is_leaf(self, node: fx.Node) -> bool:
        return node.name in self.graph.parameters or operation(node) in _LAYERS

    def parts(self, node: fx.Node) -> list[fx.Node]:
        name, inputs = operation(node), node.all_input_nodes
        if name == "add" and len(inputs) == 2 and not node.kwargs:
            return inputs
        if name == "cat" and isinstance(node.args[0], list | tuple) and len(node.args[0]) == len(inputs):
            return inputs
        if name in PADDING:
            raise _Blocked("padding comes before it, and nothing can scale or shift that")
        if name in REARRANGING | UNCHANGED | AVERAGING and len(inputs) == 1:
            return inputs
        source = "an input of the model" if node.op == "placeholder" else f"{name} in {owner(node) or 'the model'}"
        raise _Blocked(f"its input comes from {source}")

    def price(self, node: fx.Node) -> int:
        """Return 0 if the value can take a shift as it is, 1 if a bias has to be made for it."""
        if node.name in self.graph.parameters:
            return 0
        if self.is_leaf(node):
            return int(_layer(self.graph, node)[1].bias is None)
        prices = [self.price(part) for part in self.parts(node)]
        return min(prices) if operation(node) == "add" else max(prices)


def _produced(
    graph: ModelGraph, call: Call, channel_dim: int, leaf: fx.Node, shift: bool, joints: frozenset[fx.Node]
) -> Target:
    """Return the target for one leaf of the norm's input, after proving that nobody else sees what would change."""
    creates_bias = False
    if leaf.name in graph.parameters:
        name = graph.attributes[leaf.name]
        if graph.tied.get(name):
            raise _Blocked(f"{name} is tied to {', '.join(graph.tied[name])}")
        axis = -1
    else:
        name, layer = _layer(graph, leaf)
        if any(len(users(tensor)) > 1 for tensor in weight_and_bias(leaf)):
            raise _Blocked(f"{name} runs more than once, or its weights are read elsewhere")
        axis = -1 if isinstance(layer, nn.Linear) else 1
        creates_bias = shift and layer.bias is None

    if leaf.meta["val"].ndim == 0:
        raise _Blocked(f"{name} is a single number for all channels")
    reads = list(follow(leaf, channel_ids(leaf, axis), joints, stop=frozenset(call.nodes)))
    inside = [r for r in reads if r.source is call.input and r.node in call.nodes]
    if not inside:
        raise _Blocked(f"the way from {name} to it cannot be followed")
    seen = inside[0].ids.movedim(channel_dim, -1)
    seen = seen.reshape(-1, seen.shape[-1])  # [..., C] -> [M, C], features of the leaf from 1
    column = torch.arange(seen.shape[1]).expand_as(seen)
    channels = torch.full((leaf.meta["val"].shape[axis] + 1,), -1)
    channels[seen] = column
    channels[0] = -1
    if not ((channels[seen] == column) | (seen == 0)).all():
        raise _Blocked(f"a feature of {name} lands in several of its channels")
    for read in reads:
        if read not in inside and (channels[read.ids.unique()] >= 0).any():
            raise _Blocked(
                f"its input {name} is also read by {operation(read.node)} in {owner(read.node) or 'the model'}"
            )
    side: Literal["value", "output"] = "value" if leaf.name in graph.parameters else "output"
    return Target(name, side, tuple(channels[1:].tolist()), shift, creates_bias)
