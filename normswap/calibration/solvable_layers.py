"""Find the layers that can be re-solved: those that read a norm, and those that write to the residual stream.

Nothing here knows an architecture. A reader is a linear layer or convolution that takes a norm's output, through
whatever only moves elements. A writer is one whose output reaches an addition with a value that is already there,
through whatever moves elements or scales and shifts channels (LayerScale, a position embedding, a BatchNorm).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..layers import NormedConv2d, NormedLinear, TokenBatchNorm, TokenBatchNorm2d
from ..model_utils import widened
from ..planning.channels import REARRANGING, SHAPE_ONLY, UNCHANGED, channel_ids, follow, moved
from ..planning.graph import Call, argument, operation, owner, users, weight_and_bias
from .lockstep import Lane, Stop

_LAYERS: dict[str, type[nn.Module]] = {"linear": nn.Linear, "conv2d": nn.Conv2d}
_PLAIN = (nn.Linear, nn.Conv2d, NormedLinear, NormedConv2d)


@dataclass(frozen=True)
class Readers:
    """Layers that read the same value, which is made of the outputs of ``sites``."""

    stops: tuple[Stop, ...]
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Writer:
    """A layer and where its output joins the residual stream; ``sites`` are the norms on the way."""

    stop: Stop
    end: Stop
    sites: tuple[str, ...] = ()


def rows_in(layer: nn.Linear | nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """Return a layer's input as rows `[M, K]` that its weight, as `[O, K]`, multiplies."""
    if isinstance(layer, nn.Linear):
        return widened(x.reshape(-1, x.shape[-1]))  # [..., K] -> [M, K]
    if layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding in ((0, 0), "valid", "same"):
        return widened(x.movedim(1, -1).reshape(-1, x.shape[1]))  # [B, K, H, W] -> [B*H*W, K]
    padding: Any = (0, 0) if layer.padding == "valid" else layer.padding
    patches = nn.functional.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    return widened(patches.transpose(1, 2).reshape(-1, patches.shape[1]))  # [B, K*kh*kw, L] -> [B*L, K*kh*kw]


def rows_out(layer: nn.Linear | nn.Conv2d, y: torch.Tensor) -> torch.Tensor:
    """Return a layer's output as rows `[M, O]`."""
    channels_last = y if isinstance(layer, nn.Linear) else y.movedim(1, -1)
    return widened(channels_last.reshape(-1, channels_last.shape[-1]))  # [..., O] -> [M, O]


def picked(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return ``rows[index]``, without a copy where that is all of them in their order, as it is in most models."""
    if len(index) == len(rows) and torch.equal(index, torch.arange(len(index))):
        return rows
    return rows[index.to(rows.device)]


def layer_at(lane: Lane, stop: Stop) -> nn.Linear | nn.Conv2d:
    """Return the layer that runs at a stop."""
    return lane.model.get_submodule(stop.path)  # type: ignore[return-value]


def find_readers(lane: Lane, sites: list[str]) -> list[Readers]:
    """Return the layers that read a site, those of one value together, in execution order."""
    by_source: dict[fx.Node, tuple[dict[fx.Node, None], dict[str, None]]] = {}
    for path in sites:
        (call,) = lane.graph.calls(path)
        norm: Any = lane.model.get_submodule(path)
        for read in follow(call.output, channel_ids(call.output, norm.channel_dim)):
            if argument(read.node, 0) is read.source and _solvable(lane, read.node):
                nodes, found = by_source.setdefault(read.source, ({}, {}))
                nodes[read.node] = found[path] = None
    groups = [
        Readers(tuple(lane.place(node) for node in sorted(nodes, key=lane.index.__getitem__)), tuple(found))
        for nodes, found in by_source.values()
    ]
    return sorted(groups, key=lambda group: lane.at(group.stops[0]))


def find_writers(lane: Lane, sites: list[str]) -> list[Writer]:
    """Return the layers whose output joins the residual stream behind the first site, in execution order."""
    calls = {path: lane.graph.calls(path)[0] for path in sites}
    entered = {node: path for path, call in calls.items() for node in call.nodes}
    norms = _Norms(calls, entered, image_dependent(lane))
    tainted = descendants([call.output for call in calls.values()])
    found = []
    for step in lane.steps:
        if step.call is None and _solvable(lane, step.node):
            way = _way(lane, step.node, norms)
            if way is not None and (way[1] or step.node in tainted or way[0] in tainted):
                found.append(Writer(lane.place(step.node), lane.place(way[0]), tuple(way[1])))
    return found


def image_dependent(lane: Lane) -> set[fx.Node]:
    """Return every node whose value depends on the images."""
    return descendants(lane.inputs)


def descendants(starts: list[fx.Node]) -> set[fx.Node]:
    """Return the nodes and all whose values depend on theirs."""
    found, pending = set(starts), list(starts)
    while pending:
        for node in users(pending.pop()):
            if node not in found and operation(node) not in SHAPE_ONLY:
                found.add(node)
                pending.append(node)
    return found


def _solvable(lane: Lane, node: fx.Node) -> bool:
    """Return whether the node is a layer whose own weight nobody else reads and a matrix solve can set."""
    kind = _LAYERS.get(operation(node))
    if kind is None or node not in lane.index:
        return False
    path = owner(node)
    layer = lane.model.get_submodule(path)
    if not isinstance(layer, kind) or type(layer) not in _PLAIN or getattr(layer, "groups", 1) != 1:
        return False
    names = [lane.graph.attribute(tensor) for tensor in weight_and_bias(node)]
    wanted = [f"{path}.weight"] + ([f"{path}.bias"] if layer.bias is not None else [])
    shared = any(len(users(tensor)) > 1 for tensor in weight_and_bias(node))
    if names != wanted or shared or any(lane.graph.tied.get(name) for name in wanted):
        return False
    return getattr(layer, "padding_mode", "zeros") == "zeros" and getattr(layer, "padding", 0) != "same"


@dataclass(frozen=True)
class _Norms:
    """The norms that a way to the residual stream may pass, and what depends on the images."""

    calls: dict[str, Call]
    entered: dict[fx.Node, str]
    dependent: set[fx.Node]


def _way(lane: Lane, start: fx.Node, norms: _Norms) -> tuple[fx.Node, list[str]] | None:
    """Return where a layer's output joins the residual stream and the sites on the way, None if it does not."""
    node, sites = start, list[str]()
    while True:
        readers = [user for user in node.users if operation(user) not in SHAPE_ONLY]
        paths = {norms.entered.get(user) for user in readers}
        if len(paths) == 1 and None not in paths:
            path = str(paths.pop())
            if norms.calls[path].input is not node or type(lane.model.get_submodule(path)) not in _NORMS:
                return None
            node = norms.calls[path].output
            sites.append(path)
            continue
        if len(readers) != 1:
            # A norm in front of the stream, as in a stem: what it gives is the stream.
            return (node, sites) if sites and node is norms.calls[sites[-1]].output and len(readers) > 1 else None
        (user,) = readers
        others = [n for n in user.all_input_nodes if n is not node]
        moving = [n for n in others if n in norms.dependent]
        if operation(user) == "add" and len(moving) == 1 and len(others) == 1:
            return (user, sites) if _joins(lane, start, node, user, moving[0]) else None
        if moving or not _passes(lane, user, others):
            return None
        node = user


def _joins(lane: Lane, start: fx.Node, node: fx.Node, user: fx.Node, stream: fx.Node) -> bool:
    """Return whether an addition puts ``node`` onto a stream that is there before the layer at ``start`` runs."""
    ready = lane.index.get(stream, -1) < lane.index[start]
    same = stream.meta["val"].shape == user.meta["val"].shape == node.meta["val"].shape
    return ready and same and user in lane.index and not user.kwargs


def _passes(lane: Lane, user: fx.Node, others: list[fx.Node]) -> bool:
    """Return whether a node only moves elements, or scales and shifts channels by what depends on no image."""
    moves = operation(user) in REARRANGING | UNCHANGED and not others
    return user in lane.index and (moves or operation(user) in ("add", "mul", "cat"))


_NORMS = (TokenBatchNorm, TokenBatchNorm2d)


@dataclass(frozen=True)
class NoRoute:
    """Why the outputs of a writer cannot be found again in the value it ends in."""

    reason: str


class Route:
    """How the outputs of a writer lie in the value it ends in, for one shape of batch; see `find_route`.

    A layer whose two outputs are scaled on the way to the stream, by LayerScale:

    >>> class Block(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.fc, self.gamma = nn.Linear(2, 2), nn.Parameter(torch.tensor([3.0, 4.0]))
    ...
    ...     def forward(self, x):
    ...         return x + self.fc(x) * self.gamma
    >>> lane = Lane(Block().eval(), torch.zeros(1, 5, 2), [])
    >>> route = find_route(lane, Writer(Stop("fc", "linear"), Stop("", "add")))
    >>> route.scale().tolist()
    [3.0, 4.0]
    >>> route.rows(torch.zeros(1, 5, 2)).shape
    torch.Size([5, 2])

    Attributes:
        rows_layer, rows_end: rows of the layer's output `[M, O]` and of the end value that belong together.
        end_dim: the dimension of the end value that holds the channels.
    """

    rows_layer: torch.Tensor
    rows_end: torch.Tensor
    end_dim: int

    def __init__(self, lane: Lane, writer: Writer) -> None:
        self.lane, self.writer = lane, writer
        shape = lane.node(writer.stop).meta["val"].shape
        linear = isinstance(layer_at(lane, writer.stop), nn.Linear)
        self.width = shape[-1] if linear else shape[1]
        self._inner = 1 if linear else shape[2] * shape[3]
        self._scales: list[tuple[Any, torch.Size, torch.Tensor]] = []

    def trace(self) -> NoRoute | None:
        """Follow the outputs to the end value; return what stands in the way, None if nothing does."""
        lane, end = self.lane, self.lane.node(self.writer.end)
        calls = {node: path for path in self.writer.sites for node in lane.graph.calls(path)[0].nodes}
        node = lane.node(self.writer.stop)
        shape = node.meta["val"].shape
        ids = torch.arange(1, shape.numel() + 1).reshape(shape)  # each element's own number, as the layer's output
        while node is not end:
            user = next(u for u in node.users if operation(u) not in SHAPE_ONLY)
            if user in calls:
                (call,) = lane.graph.calls(calls[user])
                self._scales.append((lane.model.get_submodule(calls[user]), ids.shape, self._pick(ids)))
                node = call.output
                continue
            name = operation(user)
            if name == "mul":
                factors = [n for n in user.all_input_nodes if n is not node]
                if not factors or node.meta["val"].shape != user.meta["val"].shape:
                    return NoRoute("scaled by a number or broadcast")
                self._scales.append((factors[0], ids.shape, self._pick(ids)))
            elif user is not end or name != "add":
                following = moved(user, node, ids, name in ("add", "cat"))
                if not isinstance(following, torch.Tensor):
                    return NoRoute("cannot be followed")
                ids = following
            node = user
        return None if self._match(ids) else NoRoute("its channels do not arrive as channels")

    def _channel(self, ids: torch.Tensor) -> torch.Tensor:
        return (ids - 1) // self._inner % self.width

    def _pick(self, ids: torch.Tensor) -> torch.Tensor:
        """Return, per channel of the layer, the flat index of one element that holds it."""
        flat = ids.flatten()
        (there,) = (flat > 0).nonzero(as_tuple=True)
        return torch.zeros(self.width, dtype=torch.long).scatter_(0, self._channel(flat[there]), there)

    def _match(self, ids: torch.Tensor) -> bool:
        """Find the rows that belong together; return whether no channels are mixed up in them."""
        for dim in (-1, 1):
            rows = ids.movedim(dim, -1).reshape(-1, ids.shape[dim])  # [..., O] -> [M, O]
            if rows.shape[1] != self.width:
                continue
            there = (rows > 0).all(1)
            known = rows[there]
            if len(known) and (self._channel(known) == torch.arange(self.width)).all():
                self.end_dim = dim
                (self.rows_end,) = there.nonzero(as_tuple=True)
                element = known[:, 0] - 1
                outer = element // (self._inner * self.width)
                self.rows_layer = outer * self._inner + element % self._inner
                return True
        return False

    def scale(self) -> torch.Tensor:
        """Return what each output channel is multiplied with on the way, `[O]`, float64."""
        total = torch.ones(self.width, dtype=torch.float64)
        for source, shape, pick in self._scales:
            if isinstance(source, TokenBatchNorm):
                vector = source.affine64()[0].cpu()
                factor = vector if source.channel_dim == -1 else vector.reshape(-1, 1, 1)  # [C] -> [C, 1, 1]
            else:
                factor = self.lane.execute_constant(source).detach().double().cpu()
            total = total * factor.expand(shape).reshape(-1)[pick]  # [...] -> [O]
        return total

    def rows(self, end_value: torch.Tensor) -> torch.Tensor:
        """Return the rows of the end value that the layer writes, `[M, O]`, in the order of ``rows_layer``."""
        rows = end_value.movedim(self.end_dim, -1).reshape(-1, self.width)  # [..., O] -> [M, O]
        return widened(picked(rows, self.rows_end))


def find_route(lane: Lane, writer: Writer) -> Route | NoRoute:
    """Return how the outputs of a writer lie in the value it ends in, or why that cannot be said."""
    route = Route(lane, writer)
    return route.trace() or route
