"""Run the original and the converted model side by side, from one norm to the next, all images at each stop.

A site can only be set when everything before it is set, and it needs every calibration image. Running the whole
model once per site would take 25 to 60 passes; here both exported graphs advance stretch by stretch and only the
values that a later stretch still reads are kept, so each image goes through each model once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from .errors import CalibrationError
from .graph import Call, ModelGraph, operation

Values = dict[fx.Node, Any]


@dataclass
class _Step:
    """One node to run, or one whole call of a module that is run as it stands."""

    node: fx.Node
    call: Call | None
    dead_after: list[fx.Node]


class _Lane:
    """One exported model as a list of steps; the modules in ``live`` are called, not replayed from the graph."""

    def __init__(self, model: nn.Module, example: torch.Tensor, live: Iterable[str]) -> None:
        self.model = model
        self.graph = ModelGraph(model, example)
        calls = {node: call for path in live for call in self.graph.calls(path) for node in call.nodes}
        self.steps = self._steps(calls)
        self.inputs = [n for n in self.graph.nodes if n.op == "placeholder" and self.graph.attribute(n) is None]

    def _steps(self, calls: dict[fx.Node, Call]) -> list[_Step]:
        steps = []
        for node in self.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            call = calls.get(node)
            if call is None or node is call.output:
                steps.append(_Step(node, call, []))
        seen: set[fx.Node] = set()
        for step in reversed(steps):
            reads = [step.call.input] if step.call else step.node.all_input_nodes
            for source in [*reads, step.node]:
                if source not in seen:
                    seen.add(source)
                    step.dead_after.append(source)
        return steps

    def stop(self, path: str, after: int = 0) -> int:
        """Return the index of the step that calls the module at ``path``."""
        for i in range(after, len(self.steps)):
            call = self.steps[i].call
            if call is not None and call.path == path:
                return i
        raise CalibrationError(f"{path}: does not come in the same order in the original and the converted model")

    def run(self, values: Values, start: int, stop: int, observers: "dict[str, Observer]") -> None:
        """Run steps ``start`` to ``stop`` (not included) on the values of one chunk, in place."""
        for step in self.steps[start:stop]:
            if step.call is not None:
                x = values[step.call.input]
                if step.call.path in observers:
                    observers[step.call.path](x)
                values[step.node] = self.model.get_submodule(step.call.path)(x)
            else:
                values[step.node] = self._execute(step.node, values)
            for node in step.dead_after:
                values.pop(node, None)

    def _execute(self, node: fx.Node, values: Values) -> Any:
        def value(source: fx.Node) -> Any:
            if source in values:
                return values[source]
            name = self.graph.attributes[source.name]
            return self.graph.program.constants[name] if name in self.graph.program.constants else self._tensor(name)

        if node.op == "get_attr":
            return getattr(self.graph.program.graph_module, str(node.target))
        if node.op != "call_function":
            raise CalibrationError(f"the exported graph has a {node.op} node ({operation(node)})")
        return node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))  # type: ignore[operator]

    def _tensor(self, name: str) -> torch.Tensor:
        path, _, attribute = name.rpartition(".")
        return getattr(self.model.get_submodule(path), attribute)


class Observer:
    """Sees the input of a module that the converted lane passes without stopping."""

    def __call__(self, x: torch.Tensor) -> None:
        raise NotImplementedError


@dataclass
class _Chunk:
    original: _Lane
    converted: _Lane
    batch: torch.Tensor | None
    values: tuple[Values, Values] = field(default_factory=lambda: ({}, {}))
    at: tuple[int, int] = (0, 0)

    def start(self) -> None:
        """Give each lane its own images: a model may write into its input."""
        if self.batch is not None:
            for lane, values in zip((self.original, self.converted), self.values, strict=True):
                values[lane.inputs[0]] = self.batch.clone()
            self.batch = None


class Lockstep:
    """Both models over one set of images, stopping at each site.

    Args:
        original: the model with LayerNorm, in eval mode.
        converted: the swapped model, in eval mode.
        sites: paths of the norms to stop at, in execution order.
        batches: image batches `[B, C, H, W]`; every one is kept until its first stop.
        observers: called with the input of other modules of the converted model, by path.
    """

    def __init__(
        self,
        original: nn.Module,
        converted: nn.Module,
        sites: Sequence[str],
        batches: Iterable[torch.Tensor],
        observers: "dict[str, Observer]",
    ) -> None:
        self.observers = observers
        lanes: dict[torch.Size, tuple[_Lane, _Lane]] = {}
        self.chunks: list[_Chunk] = []
        for batch in batches:
            if batch.shape not in lanes:  # the shape is baked into a graph; a loader gives two at most
                lanes[batch.shape] = (_Lane(original, batch, sites), _Lane(converted, batch, [*sites, *observers]))
            self.chunks.append(_Chunk(*lanes[batch.shape], batch))

    def pairs(self, site: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Advance every chunk to ``site`` and yield the converted model's input and the original's output there.

        The sites must be asked for in order; the converted model's norm at ``site`` runs at the next call, as it
        is then.
        """
        for chunk in self.chunks:
            chunk.start()
            ends = []
            for lane, start in zip((chunk.original, chunk.converted), chunk.at, strict=True):
                ends.append(lane.stop(site, start))
            end, stop = ends[0] + 1, ends[1]
            chunk.original.run(chunk.values[0], chunk.at[0], end, {})
            chunk.converted.run(chunk.values[1], chunk.at[1], stop, self.observers)
            chunk.at = (end, stop)
            source = chunk.converted.steps[stop].call
            assert source is not None
            output = chunk.original.steps[ends[0]].node
            yield chunk.values[1][source.input], chunk.values[0][output]

    def finish(self) -> None:
        """Run the converted model to its end, so that every observer has seen every image."""
        for chunk in self.chunks:
            chunk.start()
            chunk.converted.run(chunk.values[1], chunk.at[1], len(chunk.converted.steps), self.observers)
        self.chunks.clear()
