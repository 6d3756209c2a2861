"""The exported graph of a model: which nodes belong to which call of which module, and where they get weights.

`torch.export` (not ``fx.symbolic_trace``, which descends into timm's LayerNorm and breaks on control flow)
keeps the module path of every node and the shape of every value, and calls every tensor by its state-dict name.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..errors import ModelRefusedError, first_line
from ..model_utils import eval_mode, tied_names


@dataclass(frozen=True)
class Call:
    """One call of a module inside a forward pass: the nodes that ran in it, what it read and what it gave."""

    path: str
    nodes: tuple[fx.Node, ...]
    input: fx.Node
    output: fx.Node


class ModelGraph:
    """One exported forward pass of a model in eval mode.

    Args:
        model: any module whose forward takes one image batch `[B, C, H, W]`.
        example: the batch to export with; its shape is baked into the graph.
        ties: from `tied_names` of the model with its weights, where ``model`` is a `meta_copy` of it.

    Raises:
        ModelRefusedError: the model cannot be exported.
    """

    def __init__(self, model: nn.Module, example: torch.Tensor, ties: dict[str, list[str]] | None = None) -> None:
        self.model = model
        with _without_stack_traces():
            self.program = export_program(model, example)
        signature = self.program.graph_signature
        self.attributes: dict[str, str] = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self.parameters = set(signature.inputs_to_parameters)
        self.tied = tied_names(model) if ties is None else ties
        self.nodes: list[fx.Node] = list(self.program.graph.nodes)

    def attribute(self, node: object) -> str | None:
        """Return the state-dict name behind a placeholder, None if the node is no parameter or buffer."""
        if isinstance(node, fx.Node) and node.op == "placeholder":
            return self.attributes.get(node.name)
        return None

    def outputs(self) -> list[Any]:
        """Return what the forward pass gives, flattened."""
        (output,) = (node for node in self.nodes if node.op == "output")
        return list(output.args[0]) if isinstance(output.args[0], list | tuple) else [output.args[0]]

    @property
    def container(self) -> str | None:
        """The type of what the forward pass puts its values into, None where it gives a bare tensor."""
        spec = self.program.call_spec.out_spec
        return None if spec is None or spec.is_leaf() else spec.type.__name__

    def calls(self, path: str) -> list[Call]:
        """Return each call of the module at ``path``, in execution order.

        Raises:
            ModelRefusedError: a call reads or gives more than one value, so it is no norm as we know them.
        """
        groups: dict[str, list[fx.Node]] = {}
        for node in self.nodes:
            for key, (name, _) in node.meta.get("nn_module_stack", {}).items():
                if name == path:  # the key tells calls apart: the second one ends in @1
                    groups.setdefault(key, []).append(node)
        return [self._call(path, nodes) for nodes in groups.values()]

    def _call(self, path: str, nodes: list[fx.Node]) -> Call:
        inside = set(nodes)
        inputs = {
            source: None
            for node in nodes
            for source in node.all_input_nodes
            if source not in inside and self.attribute(source) is None
        }
        outputs = [node for node in nodes if not set(node.users) <= inside or (not node.users and is_tensor(node))]
        if len(inputs) != 1 or len(outputs) != 1:
            raise ModelRefusedError(f"{path}: reads {len(inputs)} values and gives {len(outputs)}, not one of each")
        return Call(path, tuple(nodes), next(iter(inputs)), outputs[0])


def export_program(model: nn.Module, example: torch.Tensor, dynamic: bool = False) -> torch.export.ExportedProgram:
    """Return the exported forward pass of a model in eval mode.

    Args:
        model: any module whose forward takes one image batch `[B, C, H, W]`.
        example: the batch to export with; its shape is baked into the graph.
        dynamic: leave B open; the example then has at least two images, since export takes a 1 for a constant.

    Raises:
        ModelRefusedError: the model cannot be exported, or not with B open.
    """
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    with eval_mode(model), torch.no_grad(), quiet():
        try:
            return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # export raises whatever the model's own code runs into
            if not dynamic:
                raise ModelRefusedError(
                    f"{type(model).__name__}: torch.export cannot trace the forward pass on images of "
                    f"{list(example.shape[1:])} ({first_line(error)})"
                ) from error
            refused, why = first_line(error), error
    export_program(model, example)  # if this fails too, the batch size is not the reason
    raise ModelRefusedError(
        f"{type(model).__name__}: torch.export cannot leave the batch size open ({refused}); fix it with `static`"
    ) from why


def module_stack(node: fx.Node) -> list[str]:
    """Return the paths of the modules whose forward was running when the node ran, outermost first."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def owner(node: fx.Node) -> str:
    """Return the path of the innermost module whose forward made the node; the model itself is ""."""
    stack = module_stack(node)
    return stack[-1] if stack else ""


def operation(node: fx.Node) -> str:
    """Return the operator's plain name, as ``linear`` for ``aten.linear.default``."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", str(target))


def argument(node: fx.Node, index: int) -> fx.Node | None:
    """Return the positional argument at ``index`` if it is there and a value of the graph, else None."""
    found = node.args[index] if len(node.args) > index else None
    return found if isinstance(found, fx.Node) else None


def weight_and_bias(node: fx.Node) -> list[fx.Node]:
    """Return the values that a linear or convolution node takes as weight and bias."""
    named = node.kwargs.get("bias")
    found = (argument(node, 1), argument(node, 2), named if isinstance(named, fx.Node) else None)
    return [value for value in found if value is not None]


def users(node: fx.Node | None) -> set[fx.Node]:
    """Return the nodes that read ``node``."""
    return set() if node is None else set(node.users)


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


@contextmanager
def _without_stack_traces() -> Iterator[None]:
    """Let the tracer not note where in the Python code each node was made: nobody reads it, and it takes a quarter."""
    config: Any = fx.config
    before = getattr(config, _STACK_TRACES, None)  # torch before 2.9 has no such switch
    if before is not None:
        setattr(config, _STACK_TRACES, True)
    try:
        yield
    finally:
        if before is not None:
            setattr(config, _STACK_TRACES, before)


_STACK_TRACES = "do_not_emit_stack_traces"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters from talking about their own internals; what concerns the user becomes an error of ours."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.ERROR))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
