"""Set one norm, re-solve the layers that read it, re-solve a layer that writes to the residual stream.

The readers' target is what the original's same layers give; a writer's is what puts the converted model's residual
stream, which has drifted, back on the original's. That is layer-wise reconstruction (Frantar et al. 2022, "Optimal
Brain Compression", section 3; Frantar et al. 2023, "GPTQ") with the original's activations as targets throughout.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..distributed import all_sum, gathered
from ..errors import CalibrationError
from ..inputs.batches import HELD_OUT
from ..layers import TokenBatchNorm
from ..records.report import Calibration, LayerFit, StreamError
from .attention_refinement import STEPS, Branch, Problem
from .estimators import ESTIMATORS
from .lockstep import Lane, Lockstep, Stop
from .moments import CACHED_ROWS
from .ridge import Gram, Solution, solve
from .solvable_layers import NoRoute, Readers, Route, Writer, find_route, layer_at, picked, rows_in, rows_out

# Batches on which the error of the residual stream is measured.
MEASURED = 4
# A layer with K inputs is solved from at least so many rows per input; below it keeps its weights. Rows of one image
# resemble each other, so fewer would fit the images at hand and no others.
ROWS_PER_INPUT = 1
# More rows than this, or than so many per input, are thinned out at random: their products would cost more than both
# models together, and the last ones would hardly change the solution (docs/calibration.md).
ROWS_KEPT, ROWS_KEPT_PER_INPUT = 20480, 13
# A layer with at least this share of zeros was pruned, and keeps them.
PRUNED = 0.05


class Reconstruction:
    """The work at each stop, over the batches of a `Lockstep`.

    Args:
        lockstep: both models.
        method: name of the estimator for the norms.
        original: the model with LayerNorm.
        norms: every BatchNorm of the converted model, by path.
        refine_steps: gradient steps for the layers that attention reads; None: one on every batch, or `STEPS` if more.
    """

    def __init__(
        self,
        lockstep: Lockstep,
        method: str,
        original: nn.Module,
        norms: dict[str, TokenBatchNorm],
        refine_steps: int | None,
    ) -> None:
        self.lockstep, self.method, self.original, self.norms = lockstep, method, original, norms
        self.penalties: dict[torch.Size, float] = {}
        self.batches = lockstep.count
        self.prefix_tokens = int(getattr(original, "num_prefix_tokens", 0) or 0)
        fitted_to = sum(not held_out(number) for number in range(self.batches))
        self.refine_steps = max(STEPS, fitted_to) if refine_steps is None else refine_steps
        self.result = Calibration(refine_steps=self.refine_steps if method == "reconstruct" else None)
        self.routes: dict[tuple[int, Stop], Route | NoRoute] = {}

    def set_norm(self, path: str, writer: Writer | None, bound: str) -> None:
        """Fit one BatchNorm; behind a writer that is still to be solved, on what the writer gives as it is.

        ``bound`` is the name of the bound that it has.
        """
        norm, site = self.norms[path], Stop(path)
        estimator = ESTIMATORS[self.method](norm, self.original.get_submodule(path))  # type: ignore[arg-type]
        for batch in self.lockstep.visit(site, writer.stop if writer else site, [site]):
            source = batch.converted.steps[batch.converted.at(site)].reads[0]
            x = batch.peek(batch.converted.place(source)) if writer else batch.values[source]
            tokens, targets = norm.tokens(x), norm.tokens(batch.collected[site])
            prefix = prefix_rows(x, norm, self.prefix_tokens)
            if self.method == "reconstruct":  # the layers behind make up for what a part of the rows leaves open
                tokens, targets, prefix = drawn(batch.number, ROWS_KEPT, self.batches, tokens, targets, prefix)
            for part in zip(*(rows.split(CACHED_ROWS) for rows in (tokens, targets, prefix)), strict=True):
                estimator.update(*part)
        self.result.sites.append(replace(estimator.solve(path), bound=bound))

    def note_bound(self, path: str, bound: str) -> None:
        """Note the bound that a norm got after it was fitted."""
        self.result.sites = [replace(f, bound=bound) if f.site == path else f for f in self.result.sites]

    def solve_readers(self, readers: Readers, writers: list[Writer]) -> None:
        """Fit the layers that read one value to what the original's give."""
        lane = self._lane
        readers = replace(readers, stops=tuple(stop for stop in readers.stops if not self._pruned(stop, "reader")))
        if not readers.stops:
            return
        layers = [layer_at(lane, stop) for stop in readers.stops]
        first, last = readers.stops[0], max(readers.stops, key=self._original_lane.at)
        grams: dict[bool, _Grams] = {}
        with_bias = {True: [], False: []}  # type: dict[bool, list[Any]]
        for stop, layer in zip(readers.stops, layers, strict=True):
            with_bias[layer.bias is not None].append((stop, layer))
        for batch in self.lockstep.visit(last, first, readers.stops):
            source = batch.converted.node(first).all_input_nodes[0]
            x = rows_in(layers[0], batch.values[source])
            for key, members in with_bias.items():
                if members:
                    outputs = [rows_out(layer, batch.collected[stop]) for stop, layer in members]
                    y = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
                    grams.setdefault(key, _Grams(self.batches)).update(batch.number, x, y)
        for key, members in with_bias.items():
            if members:
                self._set(grams[key].reduce(), [layer for _, layer in members], [s.path for s, _ in members], key)
        branch_end = self._branch_end(readers, writers)
        if branch_end is not None and self.refine_steps and all(isinstance(layer, nn.Linear) for layer in layers):
            gram = next(iter(grams.values()))
            if gram.enough(layers[0].weight[0].numel()):
                self._refine(readers, branch_end, gram.total())

    def solve_writer(self, writer: Writer) -> None:
        """Fit a layer so that the residual stream behind it is the original's."""
        layer = layer_at(self._lane, writer.stop)
        first = self._route(self._lane, writer)
        if self._pruned(writer.stop, "writer"):
            return
        if isinstance(first, NoRoute):
            for _ in self.lockstep.visit(writer.end, writer.stop):
                pass
            self._keep(writer.stop.path, "writer", 0, f"its way to the residual stream: {first.reason}")
            return
        scale = first.scale().to(layer.weight.device)
        grams = _Grams(self.batches)
        wanted: dict[int, Any] = {}
        before = _StreamSums(self.prefix_tokens)
        for batch in self.lockstep.visit(writer.end, writer.stop, [writer.end]):
            route = self._route(batch.converted, writer)
            if isinstance(route, NoRoute):
                raise CalibrationError(f"{writer.stop.path}: {route.reason} in one batch, and not in another")
            source = batch.converted.node(writer.stop).all_input_nodes[0]
            node = batch.converted.node(writer.stop)
            empty = torch.zeros(node.meta["val"].shape, dtype=layer.weight.dtype, device=layer.weight.device)
            # What is there without the layer: the stream, and every shift on the way.
            rest = batch.peek(writer.end, override=empty)
            stream = batch.collected[writer.end]
            rows = picked(rows_in(layer, batch.values[source]), route.rows_layer)
            wanted_rows = route.rows(stream) - route.rows(rest)
            grams.update(batch.number, rows, wanted_rows)
            if batch.index < MEASURED:
                wanted[batch.index] = stream
                before.add(batch.peek(writer.end), stream)
        self._set(grams.reduce(), [layer], [writer.stop.path], layer.bias is not None, "writer", scale)
        after = _StreamSums(self.prefix_tokens)
        for batch in self.lockstep.visit():
            if batch.index in wanted:
                after.add(batch.peek(writer.end), wanted[batch.index])
        self.result.stream.append(before.report(writer.stop.path, after))

    @property
    def _lane(self) -> Lane:
        return self.lockstep.converted

    @property
    def _original_lane(self) -> Lane:
        return self.lockstep.original

    def _route(self, lane: Lane, writer: Writer) -> Route | NoRoute:
        key = (id(lane), writer.stop)
        if key not in self.routes:
            self.routes[key] = find_route(lane, writer)
        return self.routes[key]

    def _set(
        self,
        grams: "_Grams",
        layers: list[nn.Linear | nn.Conv2d],
        paths: list[str],
        intercept: bool,
        role: str = "reader",
        scale: torch.Tensor | None = None,
    ) -> None:
        """Solve layers with the same input and give them their weights."""
        weight = torch.cat([layer.weight.detach().flatten(1) for layer in layers]).double()  # [O, K]
        bias = torch.cat([_bias(layer) for layer in layers]).double()
        if not grams.finite:
            raise CalibrationError(f"{paths[0]}: sums are not finite: an image or a weight gives NaN or infinity there")
        rows, inputs = grams.seen, weight.shape[1]
        if not grams.enough(inputs):
            need = f"{inputs} inputs need at least {ROWS_PER_INPUT * inputs} rows, these images give {rows}"
            for path in paths:
                self._keep(path, role, rows, need)
            return
        # A channel that is scaled to nothing on its way cannot be set from what arrives.
        alive = (
            torch.ones(len(weight), dtype=torch.bool, device=weight.device) if scale is None else scale.abs() > 1e-12
        )
        factor = torch.ones(len(weight), dtype=weight.dtype, device=weight.device) if scale is None else scale
        guess = self.penalties.get(weight.shape, 1e-1)  # the layer of the same shape one block before
        solution = solve(grams.fit, grams.held_out, weight * factor[:, None], bias * factor, intercept, guess)
        self.penalties[weight.shape] = solution.penalty
        new_weight = torch.where(alive[:, None], solution.weight / factor[:, None], weight)
        new_bias = torch.where(alive, solution.bias / factor, bias) if intercept else bias
        start = 0
        for layer, path in zip(layers, paths, strict=True):
            rows_of = slice(start, start + len(layer.weight))
            start += len(layer.weight)
            _assign(path, layer, new_weight[rows_of], new_bias[rows_of])
            self._note(path, role, rows, inputs, solution)

    def _note(self, path: str, role: str, rows: int, inputs: int, solution: Solution) -> None:
        fit = LayerFit(path, role, rows, solution.r2_before, solution.r2, solution.penalty, inputs=inputs)
        self.result.layers.append(fit)

    def _keep(self, path: str, role: str, rows: int, reason: str) -> None:
        self.result.layers.append(LayerFit(path, role, rows, reason=reason))

    def _pruned(self, stop: Stop, role: str) -> bool:
        """Return, and note, whether a layer keeps its weights because a new solution would fill its zeros."""
        share = float((layer_at(self._lane, stop).weight == 0).double().mean())
        if share < PRUNED:
            return False
        zeros = f"{100 * share:.0f} % of its weights are zero, as after pruning, and would not be any more"
        self._keep(stop.path, role, 0, zeros)
        return True

    def _branch_end(self, readers: Readers, writers: list[Writer]) -> Stop | None:
        """Return the writer that ends the readers' branch, if tokens are mixed on the way."""
        lane = self._original_lane
        last = max(lane.at(stop) for stop in readers.stops)
        for writer in sorted(writers, key=lambda w: lane.at(w.stop)):
            if lane.at(writer.stop) > last:
                branch = Branch(lane, readers.stops, writer.stop)
                return writer.stop if branch.usable and branch.mixes_tokens else None
        return None

    def _refine(self, readers: Readers, end: Stop, gram: Gram) -> None:
        branches: dict[int, Branch] = {}
        for batch in self.lockstep.visit(end, None, [end]):
            batch.pinned["wanted"] = batch.collected[end]
            if id(batch.original) not in branches:
                branches[id(batch.original)] = Branch(batch.original, readers.stops, end)

        def load(index: int) -> tuple[torch.Tensor, Branch, torch.Tensor]:
            batch = self.lockstep.look(index)
            source = batch.converted.node(readers.stops[0]).all_input_nodes[0]
            return batch.values[source], branches[id(batch.original)], batch.pinned["wanted"]

        layers: list[Any] = [layer_at(self._lane, stop) for stop in readers.stops]
        problem = Problem(layers, gram, load, len(self.lockstep.batches), held_out)
        left = problem.refine(self.refine_steps)
        for batch in self.lockstep.visit():
            batch.pinned.clear()
        paths = {stop.path for stop in readers.stops}
        self.result.layers = [replace(f, refined=left) if f.layer in paths else f for f in self.result.layers]


def held_out(number: int) -> bool:
    """Return whether the batch with that number, over all processes, chooses instead of being fitted to."""
    return number % HELD_OUT == HELD_OUT - 1


def drawn(number: int, kept: int, batches: int, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return a random part of the rows `[M, C]` of a batch, the same of each tensor.

    Args:
        number: of the batch over all processes; the same number draws the same rows.
        kept: about so many are kept of all batches together.
        batches: how many batches all processes have.
    """
    count = len(rows[0])
    share = kept / (batches * count)
    if share >= 1:
        return rows
    generator = torch.Generator().manual_seed(number)
    index = torch.randperm(count, generator=generator)[: math.ceil(share * count)].sort().values.to(rows[0].device)
    return tuple(tensor.index_select(0, index) for tensor in rows)


class _Grams:
    """The sums over the images fitted to, and over those held out.

    Args:
        batches: how many batches all processes have together.
    """

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.parts: list[Gram] = []
        self.seen = 0

    def update(self, number: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add rows of the batch with that number over all processes, or a random part of them if there are plenty."""
        self.seen += len(x)
        x, y = drawn(number, max(ROWS_KEPT, ROWS_KEPT_PER_INPUT * x.shape[1]), self.batches, x, y)
        if not self.parts:
            fit = Gram.like(x, y)
            self.parts = [fit, fit.empty()]
        self.parts[held_out(number)].update(x, y)

    def reduce(self) -> "_Grams":
        for part in self.parts:
            part.reduce()
        self.seen = sum(gathered(self.seen))
        return self

    @property
    def fit(self) -> Gram:
        return self.parts[0]

    @property
    def held_out(self) -> Gram:
        return self.parts[1]

    def total(self) -> Gram:
        return self.fit + self.held_out

    def enough(self, inputs: int) -> bool:
        return self.seen >= ROWS_PER_INPUT * inputs

    @property
    def finite(self) -> bool:
        return all(part.finite for part in self.parts)


class _StreamSums:
    """Relative errors of a residual stream, for prefix and patch tokens apart."""

    def __init__(self, prefix_tokens: int) -> None:
        self.prefix_tokens = prefix_tokens
        self.sums = torch.zeros(4, dtype=torch.float64)  # patch: sum, count; prefix: sum, count

    def add(self, converted: torch.Tensor, original: torch.Tensor) -> None:
        """Add streams `[B, N, C]`; of other shapes every row along the last dimension counts as a patch."""
        converted, original = converted.double(), original.double()
        size = (original - original.mean(-1, keepdim=True)).norm(dim=-1).clamp(min=1e-30)
        error = (converted - original).norm(dim=-1) / size
        error = error[:, None] if error.ndim == 1 else error  # [B] -> [B, 1], behind a pool
        prefix = self.prefix_tokens if error.ndim == 2 and error.shape[1] > self.prefix_tokens else 0
        for at, part in ((0, error[:, prefix:]), (2, error[:, :prefix])):
            self.sums[at] += part.sum().cpu()
            self.sums[at + 1] += part.numel()

    def means(self) -> tuple[float, float | None]:
        all_sum(self.sums)
        patch, patches, prefix, prefixes = self.sums.tolist()
        return patch / max(patches, 1), prefix / prefixes if prefixes else None

    def report(self, layer: str, after: "_StreamSums") -> StreamError:
        patch_before, prefix_before = self.means()
        patch, prefix = after.means()
        return StreamError(layer, patch_before, patch, prefix_before, prefix)


def prefix_rows(x: torch.Tensor, norm: TokenBatchNorm, prefix_tokens: int) -> torch.Tensor:
    """Return which rows `[M]` of ``norm.tokens(x)`` are prefix tokens; none, unless x is tokens `[B, N, C]`."""
    rows = torch.zeros(x.numel() // norm.num_features, dtype=torch.bool, device=x.device)
    if x.ndim == 3 and norm.channel_dim in (-1, 2) and x.shape[1] > prefix_tokens:
        rows.view(x.shape[:2])[:, :prefix_tokens] = True  # [M] -> [B, N]
    return rows


def _bias(layer: nn.Linear | nn.Conv2d) -> torch.Tensor:
    return layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach()


def _assign(path: str, layer: nn.Linear | nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Give a layer its weights, rows `[O, K]`, or fail before anything is changed."""
    ready = weight.reshape(layer.weight.shape).to(layer.weight), bias.to(layer.weight)  # [O, K] -> [O, K, kh, kw]
    if not all(bool(torch.isfinite(t).all()) for t in ready):
        raise CalibrationError(f"{path}: the re-solved weights are not finite in {layer.weight.dtype}")
    layer.weight.copy_(ready[0])
    if layer.bias is not None:
        layer.bias.copy_(ready[1])
