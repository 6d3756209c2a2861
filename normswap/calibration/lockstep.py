"""Run the original and the converted model side by side, one stretch at a time, all images at each stop.

A site or a layer can only be set when everything before it is set, and it needs every calibration image. Running
the whole model once per stop would take 25 to 100 passes; here both exported graphs advance stretch by stretch and
only the values that a later stretch still reads are kept, so each image goes through each model once.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..distributed import world
from ..errors import ArgumentError, CalibrationError
from ..model_utils import find_tensor
from ..planning.graph import Call, ModelGraph, operation, owner
from .activation_store import Store

Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class Stop:
    """A place in the forward pass that both models have.

    >>> lane = Lane(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), torch.zeros(1, 2), [])
    >>> list(lane.places)
    [Stop(path='0', operation='linear', ordinal=0), Stop(path='1', operation='relu', ordinal=0)]

    Attributes:
        path: the module whose forward runs there.
        operation: the operator's plain name; "call" for the whole call of a module.
        ordinal: which of them, where the module runs several.
    """

    path: str
    operation: str = "call"
    ordinal: int = 0


@dataclass
class Step:
    """One node to run, or one whole call of a module that is run as it stands."""

    node: fx.Node
    call: Call | None
    dead_after: list[fx.Node] = field(default_factory=list)

    @property
    def reads(self) -> list[fx.Node]:
        return [self.call.input] if self.call else self.node.all_input_nodes


class Lane:
    """One exported model as a list of steps; the modules in ``live`` are called, not replayed from the graph.

    Runs from step to step, and keeps only the values that a later step still reads:

    >>> lane = Lane(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval(), torch.zeros(1, 2), ["0"])
    >>> values = {lane.inputs[0]: torch.ones(1, 2)}
    >>> first = lane.run(values, 0, 1, collect=[lane.node(Stop("0"))])
    >>> [node.name for node in values], [tuple(x.shape) for x in first.values()]
    (['linear'], [(1, 2)])
    """

    def __init__(self, model: nn.Module, example: torch.Tensor, live: Iterable[str]) -> None:
        self.model = model
        self.graph = ModelGraph(model, example)
        self.steps: list[Step] = []
        self.index: dict[fx.Node, int] = {}
        self.places: dict[Stop, fx.Node] = {}
        calls = {node: call for path in live for call in self.graph.calls(path) for node in call.nodes}
        for node in self.graph.nodes:
            call = calls.get(node)
            if node.op in ("placeholder", "output") or (call is not None and node is not call.output):
                continue
            self.index[node] = len(self.steps)
            self.steps.append(Step(node, call))
            self._name(node, call)
        seen: set[fx.Node] = set()
        for step in reversed(self.steps):
            for source in [*step.reads, step.node]:
                if source not in seen:
                    seen.add(source)
                    step.dead_after.append(source)
        self.inputs = [n for n in self.graph.nodes if n.op == "placeholder" and self.graph.attribute(n) is None]
        self.by_name = {node.name: node for node in self.graph.nodes}

    def _name(self, node: fx.Node, call: Call | None) -> None:
        stop = Stop(call.path) if call else Stop(owner(node), operation(node))
        while stop in self.places:
            stop = Stop(stop.path, stop.operation, stop.ordinal + 1)
        self.places[stop] = node

    def node(self, stop: Stop) -> fx.Node:
        if stop not in self.places:
            raise CalibrationError(f"{stop.path}: {stop.operation} does not run in both models alike")
        return self.places[stop]

    def at(self, stop: Stop) -> int:
        """Return the index of the step."""
        return self.index[self.node(stop)]

    def place(self, node: fx.Node) -> Stop:
        """Return the stop of a node."""
        return next(stop for stop, found in self.places.items() if found is node)

    def run(
        self,
        values: Values,
        start: int,
        end: int,
        observers: "dict[str, Observer] | None" = None,
        collect: Iterable[fx.Node] = (),
        number: int = 0,
    ) -> Values:
        """Run steps ``start`` to ``end`` (not included) on the values of one batch, in place.

        ``number`` is the batch's over all processes, for the observers.

        Returns the values of the nodes in ``collect``, which may die on the way.
        """
        wanted = set(collect)
        collected = {node: values[node] for node in wanted if node in values}
        for step in self.steps[start:end]:
            if step.call is not None:
                x = values[step.call.input]
                if observers and step.call.path in observers:
                    observers[step.call.path](x, number)
                values[step.node] = self.model.get_submodule(step.call.path)(x)
            else:
                values[step.node] = self.execute(step.node, values)
            if step.node in wanted:
                collected[step.node] = values[step.node]
            for node in step.dead_after:
                values.pop(node, None)
        return collected

    def execute(self, node: fx.Node, values: Values) -> Any:
        """Return what one node gives, with the tensors that the model has now."""

        def value(source: fx.Node) -> Any:
            if source in values:
                return values[source]
            name = self.graph.attributes[source.name]
            return self.graph.program.constants[name] if name in self.graph.program.constants else self.tensor(name)

        if node.op == "get_attr":
            return getattr(self.graph.program.graph_module, str(node.target))
        if node.op != "call_function":
            raise CalibrationError(f"the exported graph has a {node.op} node ({operation(node)})")
        return node.target(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))  # type: ignore[operator]

    def execute_constant(self, node: fx.Node) -> torch.Tensor:
        """Return the value of a node that does not depend on the images."""
        values: Values = {}
        pending = [node]
        while pending:
            source = pending[-1]
            missing = [n for n in source.all_input_nodes if n not in values and n.op != "placeholder"]
            if source.op == "placeholder" or not missing:
                pending.pop()
                if source.op != "placeholder":
                    values[source] = self.execute(source, values)
            pending.extend(missing if source.op != "placeholder" else ())
        return values[node] if node in values else self.tensor(self.graph.attributes[node.name])

    def tensor(self, name: str) -> torch.Tensor:
        """Return the parameter or buffer of that name, as it is now."""
        tensor = find_tensor(self.model, name)
        if tensor is None:
            raise CalibrationError(f"{name}: the graph reads it, and the model has no such tensor")
        return tensor


class Observer:
    """Sees the input of a module that the converted lane passes without stopping."""

    def __call__(self, x: torch.Tensor, number: int) -> None:
        """Take the input of the batch with that number over all processes."""
        raise NotImplementedError


@dataclass
class Batch:
    """What one visit sees of one batch of images.

    Attributes:
        index: number of the batch on this process.
        number: the same over all processes.
        original, converted: the lanes of its shape.
        values: live values of the converted model.
        at: the step that the converted model runs next.
        collected: values of the original model, asked for in the visit.
        pinned: values that a visit leaves here for later ones.
    """

    index: int
    number: int
    original: Lane
    converted: Lane
    values: Values
    at: int
    collected: dict[Stop, Any]
    pinned: dict[str, Any]

    def peek(self, until: Stop, override: torch.Tensor | None = None) -> Any:
        """Run the converted model on to ``until``, that included, leave it where it is and return the value there.

        Args:
            override: what the next step gives, instead of running it.
        """
        values = dict(self.values)
        start, end = self.at, self.converted.at(until)
        if override is not None:
            values[self.converted.steps[start].node] = override
            start += 1
        node = self.converted.node(until)
        return self.converted.run(values, start, end + 1, collect=[node])[node]


@dataclass
class _Progress:
    images: torch.Tensor | None
    lanes: tuple[Lane, Lane]
    at: list[int] = field(default_factory=lambda: [0, 0])


class Lockstep:
    """Both models over one set of images.

    Args:
        original: the model with LayerNorm, in eval mode.
        converted: the swapped model, in eval mode.
        sites: paths of the norms.
        batches: image batches `[B, C, H, W]`, all of them and at least one; under torch.distributed each process
            takes its share.
        observers: called with the input of other modules of the converted model, by path.
        budget: bytes that the values at rest may take in memory; what is beyond goes to disk (see `Store`).

    Use as a context manager, which deletes what went to disk.
    """

    def __init__(
        self,
        original: nn.Module,
        converted: nn.Module,
        sites: Sequence[str],
        batches: Iterable[torch.Tensor],
        observers: "dict[str, Observer]",
        budget: int,
    ) -> None:
        self.observers = observers
        self.lanes: dict[torch.Size, tuple[Lane, Lane]] = {}
        self.store = Store(budget)
        self.batches: list[_Progress] = []
        rank, size = world()
        self.count = 0  # of batches over all processes
        for i, batch in enumerate(batches):
            if batch.shape not in self.lanes:  # the shape is baked into a graph; a loader gives two at most
                live = [*sites, *observers]
                self.lanes[batch.shape] = (Lane(original, batch, sites), Lane(converted, batch, live))
            self.count = i + 1
            if i % size == rank:
                self.batches.append(_Progress(batch, self.lanes[batch.shape]))
        if self.count < size:
            raise ArgumentError(f"{size} processes need at least {size} batches of images, these make {self.count}")

    @property
    def original(self) -> Lane:
        """The original model's lane for the first batch's shape."""
        return next(iter(self.lanes.values()))[0]

    @property
    def converted(self) -> Lane:
        """The converted model's lane for the first batch's shape."""
        return next(iter(self.lanes.values()))[1]

    def __enter__(self) -> "Lockstep":
        return self

    def __exit__(self, *_: object) -> None:
        self.store.close()

    def visit(
        self, original: Stop | None = None, converted: Stop | None = None, collect: Sequence[Stop] = ()
    ) -> Iterator[Batch]:
        """Advance every batch and yield it.

        Args:
            original: the original model runs up to here, this step included.
            converted: the converted model runs up to here, this step left for the next visit.
            collect: steps of the original model whose values the visitor wants.
        """
        for i, progress in enumerate(self.batches):
            batch, values = self._open(i)
            lane = batch.original
            end = max(lane.at(original) + 1, progress.at[0]) if original else progress.at[0]
            wanted = {lane.node(stop): stop for stop in collect}
            found = lane.run(values, progress.at[0], end, collect=wanted)
            batch.collected.update((wanted[node], value) for node, value in found.items())
            if len(found) < len(wanted):
                raise CalibrationError(f"{collect[0].path}: its value in the original model is gone before it is read")
            stop = batch.converted.at(converted) if converted else progress.at[1]
            batch.converted.run(batch.values, progress.at[1], stop, self.observers, number=batch.number)
            progress.at = [end, max(stop, progress.at[1])]
            batch.at = progress.at[1]
            yield batch
            self._close(batch, values)

    def look(self, index: int) -> Batch:
        """Return one batch where it stands; what is changed in it is lost."""
        batch, values = self._open(index)
        self._close(batch, values)
        return batch

    def _number(self, index: int) -> int:
        rank, size = world()
        return index * size + rank

    def _open(self, index: int) -> tuple[Batch, Values]:
        """Return a batch and the live values of the original model."""
        progress = self.batches[index]
        kept = self.store.take(index)
        values: list[Values] = []
        for side, lane in zip("01", progress.lanes, strict=True):
            values.append({lane.by_name[name]: value for name, value in kept.get(side, {}).items()})
            if progress.images is not None:  # each lane gets its own: a model may write into its input
                values[-1][lane.inputs[0]] = progress.images.clone()
        progress.images = None
        number, pinned = self._number(index), kept.get("pinned", {})
        return Batch(index, number, *progress.lanes, values[1], progress.at[1], {}, pinned), values[0]

    def _close(self, batch: Batch, values: Values) -> None:
        sides = {"0": values, "1": batch.values}
        kept: dict[str, Any] = {side: {n.name: v for n, v in found.items()} for side, found in sides.items()}
        self.store.put(batch.index, {**kept, "pinned": batch.pinned})

    def finish(self) -> None:
        """Run the converted model to its end, so that every observer has seen every image."""
        for i, progress in enumerate(self.batches):
            batch, _ = self._open(i)
            end = len(batch.converted.steps)
            batch.converted.run(batch.values, progress.at[1], end, self.observers, number=batch.number)
        self.batches.clear()
