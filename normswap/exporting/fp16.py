"""Does a model fit into FP16? The largest value of every tensor, and a run in which every tensor is FP16.

Two questions, two runs, since one cannot answer both. How near a tensor comes to 65,504, the largest FP16 number, only
a run in float32 can say: in FP16 what passes it is infinite. Whether the model stays finite, only a run in FP16 can
say, and PyTorch's is the one to ask, since it stores every tensor in FP16 on a CPU as on a GPU; ONNX Runtime's
CPU kernels keep values in float32 from node to node, where nothing overflows.

LayerNorm hides its largest tensors: the squares of the centred values, and the sum of them. PyTorch takes them in
float32 whatever the model's type; engines that run Pow and Reduce in FP16 do not (TensorRT warns of it).
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..errors import ArgumentError
from ..model_utils import example_batch
from ..planning.graph import export_program, operation, owner

LIMIT = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class TensorRange:
    """The largest absolute value of one tensor over all images, in float32.

    Attributes:
        tensor: module path and operator, as "blocks.0.mlp.fc1 linear", or the name of a weight.
        largest: of this model.
        original: of the same tensor in the original; None if it was not measured or has none of that name.
    """

    tensor: str
    largest: float
    original: float | None = None

    @property
    def overflows(self) -> bool:
        """Whether it has no FP16 number; NaN has none either."""
        return not self.largest <= LIMIT


@dataclass(frozen=True)
class NormRange:
    """What a LayerNorm computes on the way to its output, largest over all images.

    Attributes:
        site: module path.
        square: largest square of a value minus its token's mean.
        total: largest sum of the squares over a token's channels.
    """

    site: str
    square: float
    total: float

    @property
    def overflows(self) -> bool:
        return not (self.square <= LIMIT and self.total <= LIMIT)


@dataclass(frozen=True)
class HalfReport:
    """Whether a model fits into FP16.

    Attributes:
        images: how many were used.
        tensors: every tensor and weight of the model, the largest first.
        norms: every LayerNorm in the model.
        original_norms: every LayerNorm in the original; None if it was not measured.
        non_finite: images whose output in FP16 is NaN or infinite.
        first_non_finite: the first tensor that was, None if none was.
    """

    images: int
    tensors: tuple[TensorRange, ...]
    norms: tuple[NormRange, ...]
    original_norms: tuple[NormRange, ...] | None
    non_finite: int
    first_non_finite: str | None

    @property
    def overflowing(self) -> tuple[TensorRange, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.overflows)

    def lines(self) -> list[str]:
        """Return the findings: LayerNorm's own overflow, every other tensor, and the run in FP16."""
        lines = [] if self.original_norms is None else [_norms_line("in the original", self.original_norms)]
        lines.append(_norms_line("here", self.norms) if self.norms else "no LayerNorm here, so none that overflows")
        over = self.overflowing
        first = self.tensors[0]
        if not over:
            lines.append(f"largest tensor {first.largest:,.0f} of {LIMIT:,.0f} ({first.tensor}): none overflows")
        else:
            new = sum(1 for t in over if t.original is not None and t.original <= LIMIT)
            known = f", {new} of them not in the original" if self.original_norms is not None else ""
            lines.append(
                f"{len(over)} tensors pass {LIMIT:,.0f}{known}; the largest, {first.tensor}, is {first.largest:,.0f}"
            )
        where = f", first in {self.first_non_finite}" if self.first_non_finite else ""
        lines.append(f"run in FP16: {self.non_finite} of {self.images} images not finite{where}")
        return lines

    @property
    def problem(self) -> str | None:
        """Why the model must not run in FP16, None if nothing is known against it."""
        if self.non_finite:
            return f"{self.non_finite} of {self.images} images are not finite in FP16, first in {self.first_non_finite}"
        if self.overflowing:
            first = self.tensors[0]
            return (
                f"{len(self.overflowing)} tensors pass {LIMIT:,.0f} in FP16, as {first.tensor} ({first.largest:,.0f})"
            )
        return None


def _norms_line(where: str, norms: tuple[NormRange, ...]) -> str:
    over = [norm for norm in norms if norm.overflows]
    if not over:
        return f"LayerNorm {where}: none of {len(norms)} overflows inside"
    worst = max(over, key=lambda norm: norm.total)
    squares = sum(1 for norm in norms if not norm.square <= LIMIT)
    return (
        f"LayerNorm {where}: {len(over)} of {len(norms)} pass {LIMIT:,.0f} inside, {squares} in a single square and "
        f"{len(over)} in the sum; the largest, {worst.site}: square {worst.square:,.0f}, sum {worst.total:,.0f}"
    )


@torch.no_grad()
def check_fp16(model: nn.Module, batches: Iterable[torch.Tensor], original: nn.Module | None = None) -> HalfReport:
    """Run a model on images in float32 and in FP16, operator by operator.

    Args:
        model: in float32, any device.
        batches: images `[B, C, H, W]`, all of one size.
        original: the model it was made from, to say which overflow is old and which is new.

    Raises:
        ArgumentError: no images.
        ModelRefusedError: a model cannot be exported.
    """
    held = list(batches)
    if not held:
        raise ArgumentError("no images to check FP16 on")
    size = (held[0].shape[1], held[0].shape[2], held[0].shape[3])
    measured = _probe(model, held, size)
    half = _probe(copy.deepcopy(model).half(), held, size)
    before = None if original is None else _probe(original, held, size)
    old: Mapping[str, float] = {} if before is None else before.largest
    tensors = [TensorRange(name, value, old.get(name)) for name, value in measured.largest.items()]
    tensors.sort(key=lambda t: -math.inf if math.isnan(t.largest) else -t.largest)
    return HalfReport(
        images=sum(len(batch) for batch in held),
        tensors=tuple(tensors),
        norms=measured.norm_ranges(),
        original_norms=None if before is None else before.norm_ranges(),
        non_finite=half.non_finite,
        first_non_finite=half.first_non_finite if half.non_finite else None,
    )


def _probe(model: nn.Module, batches: list[torch.Tensor], size: tuple[int, int, int]) -> "_Probe":
    # A graph of its own per batch size: there are two at most, and so no model is refused for its batch.
    weight = next(model.parameters())
    probe: _Probe | None = None
    for count in dict.fromkeys(len(batch) for batch in batches):
        program = export_program(model, example_batch(model, size, count))
        probe = _Probe(program.module(), probe)
        for batch in batches:
            if len(batch) == count:
                probe.see(batch.to(weight))
    assert probe is not None  # there are batches
    return probe


class _Probe(fx.Interpreter):
    """Runs an exported graph node by node and keeps the largest absolute value of each tensor."""

    def __init__(self, module: Any, before: "_Probe | None" = None) -> None:
        super().__init__(module)
        self.largest: dict[str, float] = {} if before is None else before.largest
        self.norms: dict[str, tuple[float, float]] = {} if before is None else before.norms
        self.non_finite: int = 0 if before is None else before.non_finite
        self.first_non_finite: str | None = None if before is None else before.first_non_finite
        self.names = _names(self.graph)

    def see(self, batch: torch.Tensor) -> None:
        output = self.run(batch)
        rows = output.flatten(1) if output.ndim > 1 else output[:, None]  # [B, ...] -> [B, K]
        self.non_finite += int((~torch.isfinite(rows)).any(1).sum())

    def norm_ranges(self) -> tuple[NormRange, ...]:
        return tuple(NormRange(site, *values) for site, values in self.norms.items())

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function" and operation(n) in ("layer_norm", "native_layer_norm"):
            self._look_inside(owner(n) or n.name, *self.fetch_args_kwargs_from_env(n)[0][:2])
        if n.op == "call_function" and operation(n) == "scaled_dot_product_attention":
            self._note(f"{self.names[n]} scores", self._scores(n))
        if n.op in ("call_function", "get_attr", "placeholder") and isinstance(result, torch.Tensor):
            inputs = [self.env[source] for source in n.all_input_nodes if source in self.env]
            known = n.op == "get_attr" and self.names[n] in self.largest  # a weight stays what it is
            if not known and not any(_is_view(result, value) for value in inputs):
                self._note(self.names[n], result)
        return result

    def _note(self, name: str, tensor: torch.Tensor) -> None:
        if not tensor.is_floating_point() or not tensor.numel():
            return
        # In float32 an activation that is minus infinity is meant to be: it masks a score. In FP16 it may not be.
        values = tensor if tensor.dtype == torch.float16 else tensor.masked_fill(tensor.isneginf(), 0)
        largest = float(values.abs().max())  # of a NaN, NaN
        if not math.isfinite(largest) and self.first_non_finite is None:
            self.first_non_finite = name
        before = self.largest.get(name, 0.0)
        self.largest[name] = largest if math.isnan(largest) else max(before, largest)

    def _look_inside(self, site: str, x: torch.Tensor, shape: list[int]) -> None:
        dims = tuple(range(-len(shape), 0))
        squares = (x.double() - x.double().mean(dims, keepdim=True)).square()
        square, total = self.norms.get(site, (0.0, 0.0))
        self.norms[site] = max(square, float(squares.max())), max(total, float(squares.sum(dims).max()))

    def _scores(self, n: fx.Node) -> torch.Tensor:
        """Return what attention passes to its softmax `[B, heads, N, N]`; the fused kernel does not show it."""
        (query, key, *_), kwargs = self.fetch_args_kwargs_from_env(n)
        scale = kwargs.get("scale")
        return query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)


def _is_view(result: torch.Tensor, value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    memory = result.untyped_storage().data_ptr()
    return any(isinstance(v, torch.Tensor) and v.untyped_storage().data_ptr() == memory for v in values)


def _names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Return a name per node that another model of the same architecture gives to the same tensor."""
    names: dict[fx.Node, str] = {}
    counts: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            names[node] = str(node.target)
            continue
        name = "images" if node.op == "placeholder" else f"{owner(node)} {operation(node)}".strip()
        counts[name] = counts.get(name, 0) + 1
        names[node] = name if counts[name] == 1 else f"{name} {counts[name]}"
    return names
