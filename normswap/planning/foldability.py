"""Decide for one norm where its BatchNorm can fold, exactly, and say why not where it cannot.

Forward, into every linear layer that reads it: ``W' = W * s`` (columns), ``b' = b + W @ h``. Backward, into
everything its input is made of: ``W' = s[:, None] * W`` (rows), ``b' = s * b + h``; through an addition the scale
goes to both sides and the shift to one, through a concatenation both go to every part. That covers a patch
embedding plus position embedding plus class token (CLIP's norm_pre), and q or k norms, which sit on some of the
rows of a fused qkv layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn

from ..layers import TokenBatchNorm
from .channels import AVERAGING, PADDING, REARRANGING, UNCHANGED, Read, channel_ids, follow
from .graph import Call, ModelGraph, argument, operation, owner
from .operands import LINEAR, Bias, Blocked, biases_for_shift, biases_of, channel_axis, pads, weights_of

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
        name: path of a layer or of another norm, or the name of a parameter.
        side: "input" for a layer that reads the norm, "output" for a layer the norm reads, "value" for a parameter,
            "norm" for a norm that reads it and goes on to fold with what it took.
        channels: one norm channel per feature; -1 for a feature that is left alone.
        shift: whether the shift goes here too (in an addition only one side takes it).
        creates_bias: the layer has no bias and gets one.
        weight: name of a layer's weight.
        biases: the tensors that make up a layer's bias, or the one that would.
        groups: of a convolution.
    """

    name: str
    side: Literal["input", "output", "value", "norm"]
    channels: tuple[int, ...]
    shift: bool = True
    creates_bias: bool = False
    weight: str = ""
    biases: tuple[Bias, ...] = ()
    groups: int = 1


@dataclass(frozen=True)
class Verdict:
    """One of `VERDICTS`, the reason in words, and the fold's targets (none for affine and keep)."""

    verdict: str
    reason: str
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True)
class NormCall:
    """A norm that is, or will be, an affine map: its one call and the dimension of its channels."""

    call: Call
    channel_dim: int


def judge(graph: ModelGraph, norm: NormCall, others: Mapping[fx.Node, NormCall]) -> Verdict:
    """Return the verdict for one norm.

    Args:
        graph: of the model.
        norm: the norm.
        others: every norm that is an affine map too, by the nodes of its call.
    """
    call, channel_dim = norm.call, norm.channel_dim
    try:
        targets = _forward(graph, norm, others)
        gains = [t.name for t in targets if t.creates_bias]
        chained = [t.name for t in targets if t.side == "norm"]
        bias = f"; {', '.join(gains)} gets a bias" if gains else ""
        through = f", {', '.join(chained)} takes it on" if chained else ""
        return Verdict(FOLD_FORWARD, f"every reader is linear{through}{bias}", targets)
    except Blocked as forward:
        try:
            targets = _backward(graph, call, channel_dim)
            return Verdict(FOLD_BACKWARD, f"{forward}; fed only by {_names(targets)}", targets)
        except Blocked as backward:
            return Verdict(AFFINE, f"{forward}; {backward}")


def _names(targets: tuple[Target, ...]) -> str:
    return ", ".join(f"{t.name} (gets a bias)" if t.creates_bias else t.name for t in targets)


def _forward(graph: ModelGraph, norm: NormCall, others: Mapping[fx.Node, NormCall]) -> tuple[Target, ...]:
    inside = frozenset(others) - frozenset(norm.call.nodes)
    reads = list(follow(norm.call.output, channel_ids(norm.call.output, norm.channel_dim), stop=inside))
    if not reads:
        raise Blocked("nothing reads its output")
    readers = {read.node for read in reads}
    targets: dict[str, Target] = {}
    for read in reads:
        for target in _taken_by(graph, read, readers, others):
            if targets.setdefault(target.name, target) != target:
                raise Blocked(f"{target.name} reads it twice, with its channels in different places")
    return tuple(targets.values())


def _taken_by(graph: ModelGraph, read: Read, readers: set[fx.Node], others: Mapping[fx.Node, NormCall]) -> list[Target]:
    if read.node in others and others[read.node].call.input is read.source:
        path, channel_dim = others[read.node].call.path, others[read.node].channel_dim
        return [Target(path, "norm", _channels_seen(read, channel_dim, path))]
    if operation(read.node) not in LINEAR or argument(read.node, 0) is not read.source:
        raise Blocked(_why_not(graph, read))
    found = []
    for layer in weights_of(graph, read.node):
        if not layer.read_by(readers):
            raise Blocked(f"{layer.path} also runs on other values, or its weights are read elsewhere")
        if pads(read.node):
            raise Blocked(f"{layer.path} pads its input, and a shift does not survive zero padding")
        channels = _channels_seen(read, channel_axis(read.node), layer.path)
        biases = biases_for_shift(graph, read.node, layer)
        creates = layer.creates_bias and all(bias.name for bias in biases)
        found.append(Target(layer.path, "input", channels, True, creates, layer.weight, biases, layer.groups))
    return found


def _channels_seen(read: Read, axis: int, path: str) -> tuple[int, ...]:
    features = read.ids.movedim(axis, -1).reshape(-1, read.ids.shape[axis])  # [..., K] -> [M, K]
    if (features == 0).any():
        raise Blocked(f"zero padding before {path}, and a shift does not survive it")
    if not (features == features[0]).all():
        raise Blocked(f"a feature of {path} does not always see the same channel")
    return tuple((features[0] - 1).tolist())


def _why_not(graph: ModelGraph, read: Read) -> str:
    name, where = operation(read.node), owner(read.node)
    if name == "layer_norm" or isinstance(_module(graph, where), nn.LayerNorm | TokenBatchNorm):
        return f"another norm reads it ({where})"
    if name in LINEAR:
        return f"{where} takes it as a weight"
    return _BLOCKED_BY.get(name, f"{name} reads it") + (f" in {where}" if where and name != "output" else "")


def _module(graph: ModelGraph, path: str) -> nn.Module:
    return graph.model.get_submodule(path)


def _backward(graph: ModelGraph, call: Call, channel_dim: int) -> tuple[Target, ...]:
    search = _Sources(graph)
    search.visit(call.input, shift=True)
    targets = []
    for node, shift in search.leaves.items():
        targets.append(_produced(graph, call, channel_dim, node, shift, frozenset(search.joints)))
    return tuple(targets)


_PRODUCERS = LINEAR - {"lstm"}  # what an LSTM gives has been through its gates


class _Sources:
    """The layers and parameters a value is made of, and the additions and concatenations that join them."""

    def __init__(self, graph: ModelGraph) -> None:
        self.graph = graph
        self.leaves: dict[fx.Node, bool] = {}
        self.joints: set[fx.Node] = set()

    def visit(self, node: fx.Node, shift: bool) -> None:
        if self.is_leaf(node):
            if node in self.leaves:
                raise Blocked(f"{node.name} enters its input twice")
            self.leaves[node] = shift
            return
        parts = self.parts(node)
        if len(parts) > 1:
            self.joints.add(node)
        taker = min(parts, key=self.price) if operation(node) == "add" else None
        for part in parts:
            self.visit(part, shift and (taker is None or part is taker))

    def is_leaf(self, node: fx.Node) -> bool:
        return node.name in self.graph.parameters or operation(node) in _PRODUCERS

    def parts(self, node: fx.Node) -> list[fx.Node]:
        name, inputs = operation(node), node.all_input_nodes
        added = name == "add" and len(inputs) == 2 and not node.kwargs
        joined = name == "cat" and isinstance(node.args[0], list | tuple) and len(node.args[0]) == len(inputs)
        if added or joined:
            if len(node.users) > 1:
                raise Blocked("others read its input too (residual stream)")
            return inputs
        if name in PADDING:
            raise Blocked("padding comes before it, and nothing can scale or shift that")
        if name in REARRANGING | UNCHANGED | AVERAGING and len(inputs) == 1:
            return inputs
        source = "an input of the model" if node.op == "placeholder" else f"{name} in {owner(node) or 'the model'}"
        raise Blocked(f"its input comes from {source}")

    def price(self, node: fx.Node) -> int:
        """Return 0 if the value can take a shift as it is, 1 if a bias has to be made for it."""
        if node.name in self.graph.parameters:
            return 0
        if self.is_leaf(node):
            return int(weights_of(self.graph, node)[0].creates_bias)
        prices = [self.price(part) for part in self.parts(node)]
        return min(prices) if operation(node) == "add" else max(prices)


def _produced(
    graph: ModelGraph, call: Call, channel_dim: int, leaf: fx.Node, shift: bool, joints: frozenset[fx.Node]
) -> Target:
    """Return the target for one leaf of the norm's input, after proving that nobody else sees what would change."""
    axis, layer = -1, None
    if leaf.name in graph.parameters:
        name = graph.attributes[leaf.name]
        if graph.tied.get(name):
            raise Blocked(f"{name} is tied to {', '.join(graph.tied[name])}")
    else:
        (layer,) = weights_of(graph, leaf)
        name, axis = layer.path, channel_axis(leaf)
        if not layer.read_by({leaf}):
            raise Blocked(f"{name} runs more than once, or its weights are read elsewhere")

    if leaf.meta["val"].ndim == 0:
        raise Blocked(f"{name} is a single number for all channels")
    reads = list(follow(leaf, channel_ids(leaf, axis), joints, stop=frozenset(call.nodes)))
    inside = [r for r in reads if r.source is call.input and r.node in call.nodes]
    if not inside:
        raise Blocked(f"the way from {name} to it cannot be followed")
    seen = inside[0].ids.movedim(channel_dim, -1)
    seen = seen.reshape(-1, seen.shape[-1])  # [..., C] -> [M, C], features of the leaf from 1
    column = torch.arange(seen.shape[1]).expand_as(seen)
    channels = torch.full((leaf.meta["val"].shape[axis] + 1,), -1)
    channels[seen] = column
    channels[0] = -1
    if not ((channels[seen] == column) | (seen == 0)).all():
        raise Blocked(f"a feature of {name} lands in several of its channels")
    for read in reads:
        if read not in inside and (channels[read.ids.unique()] >= 0).any():
            raise Blocked(
                f"its input {name} is also read by {operation(read.node)} in {owner(read.node) or 'the model'}"
            )
    taken = tuple(channels[1:].tolist())
    if layer is None:
        return Target(name, "value", taken, shift)
    creates = shift and layer.creates_bias
    return Target(name, "output", taken, shift, creates, layer.weight, biases_of(leaf, layer), layer.groups)
