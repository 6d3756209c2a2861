"""The tensors that a linear operator multiplies and adds, wherever the model keeps them.

Mostly that is a module's own weight and bias. BEiT, EVA and Swin-v2 make the bias of q, k and v in forward from three
tensors, one of them a buffer that is not in the state dict; an LSTM has one weight and bias per direction.

To make a new operator foldable: add its ATen name to `LINEAR`, say in `weights_of` where its weight and bias are, in
`channel_axis` which dimension holds its features, and in `pads` whether it pads with zeros, where a shift does not
survive. Planning and folding need no more; a test in tests/surgery randomises every statistic and compares outputs.
For calibration to re-solve it, `normswap.calibration.solvable_layers` says how its input becomes rows.
"""

from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import fx, nn

from ..layers import NormedConv2d, NormedLinear
from ..model_utils import find_module
from .channels import SHAPE_ONLY, UNCHANGED, channel_ids, follow
from .graph import ModelGraph, argument, operation, owner, users

_CONVOLUTIONS = frozenset(["conv1d", "conv2d"])
LINEAR = frozenset(["linear", "lstm", *_CONVOLUTIONS])
_ATTENTION = "scaled_dot_product_attention"


class Blocked(Exception):
    """Why one way of folding is closed."""


@dataclass(frozen=True)
class Bias:
    """One of the tensors that make up a bias, and which of the operator's output features it is added to.

    ``name`` is empty for features where a shift changes nothing that the model gives.
    """

    name: str
    features: int


@dataclass(frozen=True)
class Weights:
    """What one linear operator works with.

    Attributes:
        path: of the module, or the weight's name where it is no module's ``weight``.
        weight: name of the weight, `[O, K / groups, ...]`.
        biases: what makes up the bias, in the order of its features; empty if there is none.
        tensors: nodes of all of them, with what joins them.
        groups: of a convolution.
        creates_bias: there is no bias, and the module would use one.
    """

    path: str
    weight: str
    biases: tuple[Bias, ...]
    tensors: tuple[fx.Node, ...]
    groups: int = 1
    creates_bias: bool = False

    def read_by(self, nodes: set[fx.Node]) -> bool:
        """Return whether nothing but ``nodes`` sees what would change."""
        return all(users(tensor) <= nodes | set(self.tensors) for tensor in self.tensors)


def channel_axis(node: fx.Node) -> int:
    """Return which dimension of a linear operator's input and output holds its features."""
    return 1 if operation(node) in _CONVOLUTIONS else -1


def weights_of(graph: ModelGraph, node: fx.Node) -> list[Weights]:
    """Return the tensors of a linear operator's first argument, one `Weights` per direction of an LSTM.

    Raises:
        Blocked: they are computed in forward, shared with another layer, or not known.
    """
    if operation(node) == "lstm":
        return _lstm(graph, node)
    bias = _option(node, 2, "bias", None)
    found = _weights(graph, node, argument(node, 1), bias if isinstance(bias, fx.Node) else None)
    if bias is None:
        layer = find_module(graph.model, found.path)
        plain = isinstance(layer, _WITH_BIAS) and type(layer).forward in _FORWARDS
        if not plain or owner(node) != found.path or getattr(layer, "bias", None) is not None:
            raise Blocked(f"{found.path} has no bias, and its own code would not use one")
    return [found]


_WITH_BIAS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_FORWARDS = {kind.forward for kind in (*_WITH_BIAS, NormedLinear, NormedConv2d, timm.layers.Linear)}


def _weights(graph: ModelGraph, node: fx.Node, weight: fx.Node | None, bias: fx.Node | None) -> Weights:
    where = owner(node) or type(graph.model).__name__
    name = _tensor(graph, weight)
    if weight is None or name is None:
        raise Blocked(f"{where} computes its weight in forward")
    path = name.removesuffix(".weight")
    parts = [bias] if bias is not None else []
    joint = bias is not None and operation(bias) == "cat" and bias.args[1:] in ((), (0,)) and not bias.kwargs
    if bias is not None and joint:
        parts = list(bias.args[0])  # type: ignore[arg-type]
    names = [_tensor(graph, part) for part in parts]
    if None in names or len(set(names)) < len(names):
        raise Blocked(f"{where} computes its bias in forward")
    for tensor in filter(None, (name, *names)):
        if graph.tied.get(tensor):
            raise Blocked(f"{tensor} is tied to {', '.join(graph.tied[tensor])}")
    biases = tuple(Bias(str(n), part.meta["val"].numel()) for n, part in zip(names, parts, strict=True))
    shape = weight.meta["val"].shape
    if len(shape) < 2 or (biases and sum(b.features for b in biases) != shape[0]):
        raise Blocked(f"{where} has no weight and bias per output feature")
    tensors = (weight, *parts, *([bias] if bias is not None and joint else []))
    groups = _option(node, 6, "groups", 1) if operation(node) in _CONVOLUTIONS else 1
    return Weights(path, name, biases, tensors, groups, bias is None)


def _lstm(graph: ModelGraph, node: fx.Node) -> list[Weights]:
    """Return the input weights of the first layer: gates are made of ``W x + b``, which takes a scale and a shift."""
    path = owner(node)
    layer = find_module(graph.model, path)
    parameters = node.args[2] if len(node.args) > 3 else None
    if node.target is not torch.ops.aten.lstm.input or not isinstance(layer, nn.LSTM) or not layer.bias:
        raise Blocked(f"{path} is an LSTM without bias, or on packed sequences")
    by_name: dict[Any, fx.Node] = {_tensor(graph, p): p for p in parameters if isinstance(p, fx.Node)}  # type: ignore
    found = []
    for end in ("", "_reverse") if layer.bidirectional else ("",):
        weight, bias = by_name.get(f"{path}.weight_ih_l0{end}"), by_name.get(f"{path}.bias_ih_l0{end}")
        if bias is None:
            raise Blocked(f"{path} computes its bias in forward")
        found.append(_weights(graph, node, weight, bias))
    return found


def pads(node: fx.Node) -> bool:
    """Return whether a linear operator is a convolution that pads its input with zeros."""
    if operation(node) not in _CONVOLUTIONS:
        return False
    padding = _option(node, 4, "padding", 0)
    if isinstance(padding, str):
        kernel = argument(node, 1).meta["val"].shape[2:]  # type: ignore[union-attr]
        return padding == "same" and any(size > 1 for size in kernel)
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)


def _option(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def _tensor(graph: ModelGraph, node: object) -> str | None:
    """Return the name of a parameter or buffer of the model; None for anything else, constants included."""
    name = graph.attribute(node)
    if name is None or (name in graph.program.constants and find_buffer(graph.model, name) is None):
        return None
    return name


def find_buffer(model: nn.Module, name: str) -> torch.Tensor | None:
    """Return the buffer of that name, None if there is none."""
    path, _, attribute = name.rpartition(".")
    module = find_module(model, path)
    return None if module is None else module._buffers.get(attribute)


def biases_for_shift(graph: ModelGraph, node: fx.Node, weights: Weights) -> tuple[Bias, ...]:
    """Return the biases that take what a shift of a linear operator's input adds to its output.

    Where no output of the model depends on it and plain timm could not load it, it is left out: a buffer outside the
    state dict, which plain timm takes for 0, and a bias that would have to be made.
    """
    start, kept = 0, []
    for bias in biases_of(node, weights):
        rows = slice(start, start + bias.features)
        start += bias.features
        odd = weights.creates_bias or bias.name in graph.program.graph_signature.non_persistent_buffers
        kept.append(Bias("", bias.features) if odd and _cancels(node, rows) else bias)
    return tuple(kept)


def biases_of(node: fx.Node, weights: Weights) -> tuple[Bias, ...]:
    """Return what makes up the bias of a linear operator; where there is none, the one that can be made."""
    if not weights.creates_bias:
        return weights.biases
    return (Bias(f"{weights.path}.bias", node.meta["val"].shape[channel_axis(node)]),)


def _cancels(node: fx.Node, rows: slice) -> bool:
    """Return whether a constant added to some output features of ``node`` drops out of attention's softmax.

    A constant c on every key adds q.c to all logits of the query q, and a softmax does not see that. It takes a key
    that is the same feature at every position: a rotary embedding turns c differently at each.
    """
    ids = channel_ids(node, channel_axis(node))
    ids = torch.where((ids > rows.start) & (ids <= rows.stop), ids, 0)
    reads = [read for read in follow(node, ids) if (read.ids > 0).any()]
    return bool(reads) and all(_as_keys(read.node, read.source, read.ids) for read in reads)


def _as_keys(node: fx.Node, source: fx.Node, ids: torch.Tensor) -> bool:
    if argument(node, 1) is not source or argument(node, 0) is source or argument(node, 2) is source:
        return False
    if not (ids > 0).all():
        return False
    if operation(node) == _ATTENTION:
        return bool((ids == ids[..., :1, :]).all())  # [..., N, d]: the same at every key
    return operation(node) == "matmul" and bool((ids == ids[..., :1]).all()) and _softmax_only(node)  # [..., d, N]


def _softmax_only(node: fx.Node) -> bool:
    """Return whether what is the same along the last dimension of ``node`` is gone behind a softmax over it."""
    while True:
        readers = [user for user in node.users if operation(user) not in SHAPE_ONLY]
        if len(readers) != 1:
            return False
        (user,) = readers
        name, shape = operation(user), user.meta["val"].shape
        if name in ("softmax", "_softmax"):
            return user.args[1] in (-1, len(shape) - 1)
        if shape != node.meta["val"].shape or argument(user, 0) is not node:
            return False
        if not (name in UNCHANGED or (name == "add" and argument(user, 1) is not node)):
            return False
        node = user
