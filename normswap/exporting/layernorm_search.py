"""What an exported graph is made of: how many nodes of each type, and every LayerNorm left in it, whole or in pieces.

A LayerNorm may be one node, or the chain ReduceMean -> Sub -> Pow (or Mul) -> ReduceMean -> Add -> Sqrt -> Div. The
chain is found by its structure: a Sqrt alone may be the scale of an attention, a ReduceMean a pooling.
"""

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ..planning.graph import operation, owner

_NORM = "norm"
# ONNX and ATen names of one operation; var and var_mean are what ONNX has no single node for.
_KINDS = {
    **dict.fromkeys(("LayerNormalization", "layer_norm", "native_layer_norm"), _NORM),
    **dict.fromkeys(("ReduceMean", "mean"), "mean"),
    **dict.fromkeys(("ReduceSum", "sum"), "sum"),
    **dict.fromkeys(("Sub", "sub"), "sub"),
    **dict.fromkeys(("Mul", "mul"), "mul"),
    **dict.fromkeys(("Div", "div", "Reciprocal", "reciprocal"), "div"),
    **dict.fromkeys(("Pow", "pow"), "pow"),
    **dict.fromkeys(("square",), "square"),
    **dict.fromkeys(("Sqrt", "sqrt", "rsqrt"), "root"),
    **dict.fromkeys(("var", "var_mean"), "variance"),
    # What stands between a variance and its root, and does not change what it is.
    **dict.fromkeys(("Add", "add", "Max", "Clip", "clamp", "clamp_min", "maximum"), "floor"),
    **dict.fromkeys(("Cast", "_to_copy", "to", "Identity", "clone"), "same"),
    **dict.fromkeys("Reshape Expand Squeeze Unsqueeze Transpose".split(), "same"),
    **dict.fromkeys("reshape view expand squeeze unsqueeze transpose permute".split(), "same"),
}


@dataclass(frozen=True)
class Inventory:
    """The count of a graph.

    Attributes:
        nodes: how many of each type, the most frequent first.
        layer_norms: module path of each LayerNorm that is one node.
        chains: module path of each LayerNorm in pieces.
    """

    nodes: Mapping[str, int]
    layer_norms: tuple[str, ...]
    chains: tuple[str, ...]

    @property
    def norms(self) -> tuple[str, ...]:
        """Every LayerNorm in the graph, by module path, each once."""
        return tuple(dict.fromkeys((*self.layer_norms, *self.chains)))

    def line(self) -> str:
        """Return what was found of LayerNorm in one line."""
        found = f"{len(self.layer_norms)} LayerNormalization nodes, {len(self.chains)} ReduceMean/Sqrt chains of one"
        return f"{found} ({', '.join(self.norms)})" if self.norms else found


@dataclass(frozen=True)
class _Step:
    """One node: what it does, the values it reads, the constants among them, and the module it comes from."""

    type: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[float, ...]
    module: str


def count_onnx(model: Any) -> Inventory:
    """Count an ``onnx.ModelProto``; nodes inside If and Loop bodies and local functions included."""
    from onnx import numpy_helper

    # Only single numbers can be exponents; a weight kept in another file is not read.
    scalars = {
        tensor.name: float(numpy_helper.to_array(tensor).reshape(()))  # [] or [1] -> []
        for tensor in model.graph.initializer
        if tensor.data_location != tensor.EXTERNAL and list(tensor.dims) in ([], [1])
    }
    steps: dict[str, _Step] = {}
    types: list[str] = []
    for node in _nodes((model.graph, *model.functions)):
        types.append(node.op_type)
        if node.op_type == "Constant":
            value = node.attribute[0]
            if value.HasField("t") and list(value.t.dims) in ([], [1]):
                scalars[node.output[0]] = float(numpy_helper.to_array(value.t).reshape(()))  # [] or [1] -> []
            elif value.HasField("f"):
                scalars[node.output[0]] = value.f
            continue
        scope = next((p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"), None)
        module = ast.literal_eval(scope)[-2] if scope else node.name
        constants = tuple(scalars[name] for name in node.input if name in scalars)
        inputs = tuple(name for name in node.input if name)  # an optional input left out is ""
        step = _Step(node.op_type, _KINDS.get(node.op_type, ""), inputs, constants, module)
        steps.update((name, step) for name in node.output if name)
    images = {value.name for value in model.graph.input} - {tensor.name for tensor in model.graph.initializer}
    return _inventory(steps, types, images | {name for function in model.functions for name in function.input})


def count_program(program: torch.export.ExportedProgram) -> Inventory:
    """Count the operators of an exported program."""
    steps: dict[str, _Step] = {}
    types: list[str] = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        name = operation(node)
        if name == "getitem":
            source = steps[node.args[0].name]
            # var_mean gives a pair; every other tuple is made of slices of one value.
            kind = ("variance", "mean")[node.args[1]] if source.type == "var_mean" else source.kind
            steps[node.name] = _Step(source.type, kind, source.inputs, source.constants, source.module)
            continue
        types.append(name)
        constants = tuple(float(argument) for argument in node.args if isinstance(argument, int | float))
        steps[node.name] = _Step(name, _KINDS.get(name, ""), _reads(node), constants, owner(node))
    return _inventory(steps, types, set(program.graph_signature.user_inputs))


def _reads(node: fx.Node) -> tuple[str, ...]:
    """Return what a node reads, in order and with repetitions, unlike all_input_nodes: x * x reads x twice."""
    names: list[str] = []
    fx.node.map_arg((node.args, node.kwargs), lambda source: names.append(source.name))
    return tuple(names)


def _nodes(graphs: Iterable[Any]) -> Iterator[Any]:
    for graph in graphs:
        for node in graph.node:
            yield node
            yield from _nodes(a.g for a in node.attribute if a.HasField("g"))


def _inventory(steps: Mapping[str, _Step], types: Iterable[str], inputs: set[str]) -> Inventory:
    live = set(inputs)  # what depends on the images; a norm of a weight is a constant
    for name, step in steps.items():
        # A shape is not an activation, though it comes from one.
        if step.type not in ("Shape", "sym_size") and live.intersection(step.inputs):
            live.add(name)
    chains = _Chains(steps, live)
    unique = {id(step): step for name, step in steps.items() if name in live}
    whole = tuple(step.module for step in unique.values() if step.kind == _NORM)
    pieces = tuple(step.module for step in unique.values() if chains.ends(step))
    return Inventory(dict(Counter(types).most_common()), whole, pieces)


class _Chains:
    """Recognises the root at the end of a variance over centred values, as LayerNorm takes it."""

    def __init__(self, steps: Mapping[str, _Step], live: set[str]) -> None:
        self.steps, self.live = steps, live
        self.readers: dict[str, list[_Step]] = {}
        for step in {id(step): step for step in steps.values()}.values():
            for name in step.inputs:
                self.readers.setdefault(name, []).append(step)
        self.outputs: dict[int, list[str]] = {}
        for name, step in steps.items():
            self.outputs.setdefault(id(step), []).append(name)

    def ends(self, step: _Step) -> bool:
        """Return whether ``step`` is the root (or the power of a half) of a variance and something is divided by it."""
        root = step.kind == "root" or (step.kind == "pow" and any(abs(c) == 0.5 for c in step.constants))
        if not root or not self._is_variance(self._under(step.inputs[0], ("floor", "same"))):
            return False
        readers = [reader for name in self.outputs[id(step)] for reader in self.readers.get(name, [])]
        divides = step.type == "rsqrt" or -0.5 in step.constants  # in itself
        return divides or any(reader.kind in ("div", "same") for reader in readers)

    def _step(self, name: str) -> _Step | None:
        return self.steps.get(name)

    def _under(self, name: str, kinds: tuple[str, ...]) -> str:
        """Go up from a value past steps of these kinds, along the one input that depends on the images."""
        step = self._step(name)
        while step is not None and step.kind in kinds:
            above = [source for source in step.inputs if source in self.live]
            if len(above) != 1:
                break
            name = above[0]
            step = self._step(name)
        return name

    def _is_variance(self, name: str) -> bool:
        step = self._step(name)
        if step is None:
            return False
        if step.kind == "variance":
            return True
        squared = self._averaged(name)
        if squared is not None:  # the mean of (x - mean)^2
            centred = self._squared(squared)
            return centred is not None and self._is_centred(centred)
        if step.kind == "sub" and len(step.inputs) == 2:  # the mean of x^2, minus the mean squared
            first, second = self._averaged(step.inputs[0]), self._squared(step.inputs[1])
            value = None if first is None else self._squared(first)
            return value is not None and second is not None and self._averaged(second) == value
        return False

    def _is_centred(self, name: str) -> bool:
        name = self._under(name, ("same",))
        step = self._step(name)
        if step is None or step.kind != "sub" or len(step.inputs) != 2:
            return False
        mean = self._averaged(step.inputs[1])
        return mean is not None and self._under(mean, ("same",)) == self._under(step.inputs[0], ("same",))

    def _averaged(self, name: str) -> str | None:
        """Return what the value is the mean of, None if it is none; a sum divided by a number is one too."""
        step = self._step(self._under(name, ("same",)))
        if step is None:
            return None
        if step.kind == "mean":
            return step.inputs[0]
        if step.kind in ("div", "mul"):
            sums = [self._step(self._under(source, ("same",))) for source in step.inputs]
            return next((s.inputs[0] for s in sums if s is not None and s.kind == "sum"), None)
        return None

    def _squared(self, name: str) -> str | None:
        """Return what the value is the square of, None if it is none."""
        step = self._step(self._under(name, ("same",)))
        if step is None:
            return None
        square = step.kind == "square" or (step.kind == "pow" and 2.0 in step.constants)
        square = square or (step.kind == "mul" and len(step.inputs) == 2 and step.inputs[0] == step.inputs[1])
        return step.inputs[0] if square else None
