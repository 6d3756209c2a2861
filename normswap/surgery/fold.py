"""Fold every BatchNorm ``y = s * x + h`` into its neighbours: exact, in float64, checked, then assigned all at once.

The whole fold, as `fold_norms` runs it:

1. *Judge.* The graph of the swapped model says for each norm what takes its scale and shift, by the same rules that
   made the plan (`normswap.planning.foldability`). So a checkpoint that was fine-tuned or came from disk folds alike.
2. *Post*, in the order in which the norms run. What reads a norm takes ``W' = W * s``, ``b' = b + W @ h``
   (`fold_input`); what makes its input takes ``W' = s[:, None] * W``, ``b' = s * b + h`` (`fold_output`); a position
   embedding or token takes ``s * v + h``; a norm behind it takes its map on. All on float64 copies.
3. *Commit.* Every result is cast to the dtype it will have and checked to be finite. Only then are all assigned.
4. *Clear away.* A folded norm becomes `nn.Identity`, or a `TokenBound` if its input has a bound; one that nothing could
   take becomes a `TokenAffine`. A bound stays where it is, in the units of what now arrives there: a norm folded
   backwards arrives scaled.

A new kind of layer is a new entry in `normswap.planning.operands` (where its weight and bias are, and what it does to
channels); nothing here has to know of it.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..ambient import known_context, thaw
from ..errors import ArgumentError, FoldError
from ..layers import NormedConv2d, NormedLinear, TokenAffine, TokenBatchNorm, TokenBound, detach_norm
from ..model_utils import example_batch, find_tensor, meta_copy, resolve_input_size, tied_names
from ..module_state import check_state, check_weights
from ..planning.foldability import KEEP, Target, Verdict
from ..planning.graph import ModelGraph
from ..planning.plan import judge_norms
from .swap import batch_norms

_Range = tuple[torch.Tensor, torch.Tensor]


def fold_input(
    weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, groups: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold ``s * x + h`` into the layer that reads it: ``W' = W * s`` (columns), ``b' = b + W @ h``.

    Args:
        weight: `[O, K]`, or `[O, K / groups, kh, kw]` of an unpadded convolution.
        bias: `[O]`.
        scale: `[K]`, one per input feature.
        shift: `[K]`.
        groups: of the convolution.

    >>> weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([0.5])
    >>> fold_input(weight, bias, scale=torch.tensor([10.0, 100.0]), shift=torch.tensor([1.0, -1.0]))
    (tensor([[ 10., 200.]]), tensor([-0.5000]))
    """
    per_group = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)  # [G, O/G, K/G, kh*kw]
    s, h = (v.reshape(groups, 1, -1, 1) for v in (scale, shift))  # [K] -> [G, 1, K/G, 1]
    return (per_group * s).reshape(weight.shape), bias + (per_group * h).sum((2, 3)).reshape(-1)


def fold_output(
    weight: torch.Tensor, bias: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold ``s * x + h`` into the layer that makes x: ``W' = s[:, None] * W`` (rows), ``b' = s * b + h``.

    Args:
        weight: `[O, ...]`.
        bias: `[O]`.
        scale: `[O]`, one per output feature.
        shift: `[O]`.

    >>> weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([0.5])
    >>> fold_output(weight, bias, scale=torch.tensor([10.0]), shift=torch.tensor([1.0]))
    (tensor([[10., 20.]]), tensor([6.]))
    """
    return weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), scale * bias + shift  # [O] -> [O, 1, ...]


@known_context()
@torch.no_grad()
def fold_norms(
    model: nn.Module,
    inplace: bool = False,
    input_size: tuple[int, int, int] | None = None,
    verdicts: Mapping[str, Verdict] | None = None,
) -> nn.Module:
    """Return the model with every BatchNorm folded away; a second call changes nothing.

    A BatchNorm that no neighbour can take becomes a `TokenAffine`; what bounds its input stays, as a `TokenBound` or in
    the `TokenAffine`. A layer without bias gets one where the fold needs it. dtype, device, ``requires_grad`` and
    training flags stay.

    Args:
        model: from `swap_norms`, calibrated or fine-tuned, in eval mode.
        inplace: change ``model`` itself instead of a deep copy. Nothing is changed if the fold fails.
        input_size: (channels, height, width); default: the model's own.
        verdicts: from `judge_fold`, where copies of one model are folded; default: judged here.

    Raises:
        ArgumentError: the model is in training mode, where a BatchNorm is no affine map.
        FoldError: a folded weight would not be finite in the model's dtype, or a weight is shared.

    >>> model = timm.create_model("test_vit").eval()
    >>> swapped = normswap.swap_norms(model)
    >>> [isinstance(fold_norms(m).norm, nn.Identity) for m in (swapped, model)]
    [True, False]
    """
    if any(norm.training for norm in batch_norms(model).values()):
        raise ArgumentError("fold in eval mode only: call model.eval() first")
    check_state(model)
    check_weights(model)
    if inplace:
        thaw(model)
    else:
        model = copy.deepcopy(model)
    norms = batch_norms(model)
    if norms:
        verdicts = judge_fold(model, input_size) if verdicts is None else verdicts
        ledger = _Ledger(model, norms)
        for path, verdict in verdicts.items():  # in the order they run: a norm may take on what comes before it
            ledger.post(path, verdict)
        ledger.commit()
        _clear_away(model, norms, verdicts, ledger)
    return model


@known_context()
def judge_fold(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> dict[str, Verdict]:
    """Return what `fold_norms` makes of each BatchNorm, by path, in the order in which they run.

    Args:
        model: from `swap_norms`.
        input_size: (channels, height, width); default: the model's own.

    >>> swapped = normswap.swap_norms(timm.create_model("test_vit"))
    >>> judge_fold(swapped)["norm"].verdict
    'fold-forward'
    """
    shadow = meta_copy(model).eval()
    example = example_batch(shadow, resolve_input_size(model, input_size))
    return judge_norms(ModelGraph(shadow, example, tied_names(model)), list(batch_norms(model)))


def _clear_away(
    model: nn.Module, norms: dict[str, TokenBatchNorm], verdicts: Mapping[str, Verdict], ledger: "_Ledger"
) -> None:
    """Put what is left of each norm in its place, and plain layers in the place of those that ended in a norm."""
    for path, norm in norms.items():
        model.set_submodule(path, _remainder(norm, verdicts[path], *ledger.affines[path], ledger.bounds.get(path)))
    for path, module in list(model.named_modules()):
        if isinstance(module, NormedLinear | NormedConv2d) and isinstance(module.norm, nn.Identity):
            model.set_submodule(path, detach_norm(module))


def created_biases(before: nn.Module, after: nn.Module) -> list[str]:
    """Return the names of the biases that a fold added."""
    had = {name for name, _ in before.named_parameters()}
    fresh = [name for name, _ in after.named_parameters() if name.endswith(".bias") and name not in had]
    return [name for name in fresh if not isinstance(after.get_submodule(name.rpartition(".")[0]), TokenAffine)]


def _remainder(
    norm: TokenBatchNorm, verdict: Verdict, scale: torch.Tensor, shift: torch.Tensor, bound: _Range | None
) -> nn.Module:
    left: nn.Module = nn.Identity() if bound is None else TokenBound()
    if not verdict.targets:
        left = affine = TokenAffine(norm.num_features, norm.channel_dim, norm.weight.device, norm.weight.dtype)
        affine.weight.copy_(scale)
        affine.bias.copy_(shift)
        affine.requires_grad_(norm.weight.requires_grad)
    if bound is not None:
        shape = (-1,) if norm.channel_dim == -1 else (-1, 1, 1)  # [C] or [C, 1, 1]
        left.lower, left.upper = (end.reshape(shape).to(norm.weight) for end in bound)
    return left.train(norm.training)


class _Ledger:
    """Float64 copies of every tensor a fold touches; they are assigned together, or not at all."""

    def __init__(self, model: nn.Module, norms: dict[str, TokenBatchNorm]) -> None:
        self.model = model
        self.affines = {path: norm.affine64() for path, norm in norms.items()}
        self.bounds: dict[str, _Range] = {
            path: (norm.lower.double(), norm.upper.double())
            for path, norm in norms.items()
            if norm.lower is not None and norm.upper is not None
        }
        self.tensors: dict[str, torch.Tensor] = {}
        self.fresh: set[str] = set()

    def post(self, path: str, verdict: Verdict) -> None:
        """Fold one BatchNorm into the copies, or into the BatchNorm that reads it."""
        if verdict.verdict == KEEP:
            raise FoldError(f"{path}: {verdict.reason}; it cannot be folded")
        scale, shift = self.affines[path]
        if not (torch.isfinite(scale).all() and torch.isfinite(shift).all()):
            raise FoldError(f"{path}: its scale or shift is not finite; calibrate first")
        for target in verdict.targets:
            self._fold(target, scale, shift)
        if path in self.bounds and any(target.side in ("output", "value") for target in verdict.targets):
            ends = torch.stack([end * scale + shift for end in self.bounds[path]])
            self.bounds[path] = ends.amin(0), ends.amax(0)  # a negative scale swaps them

    def _fold(self, target: Target, scale: torch.Tensor, shift: torch.Tensor) -> None:
        channels = torch.tensor(target.channels, device=scale.device)
        taken = channels >= 0
        s = torch.where(taken, scale[channels], 1.0)
        h = torch.where(taken & target.shift, shift[channels], 0.0)
        if target.side == "norm":
            outer, offset = self.affines[target.name]
            if target.name in self.bounds:
                h = self._rebound(target.name, s, h)
            self.affines[target.name] = outer * s, outer * h + offset
            return
        if target.side == "value":
            self.tensors[target.name] = self._copy(target.name) * s + h
            return
        weight = self._copy(target.weight)
        # Rows whose shift cancels have no bias to speak of.
        parts = [self._copy(b.name, b.features) if b.name else scale.new_zeros(b.features) for b in target.biases]
        bias = torch.cat(parts) if parts else scale.new_zeros(len(weight))
        if target.side == "input":
            weight, bias = fold_input(weight, bias, s, h, target.groups)
        else:
            weight, bias = fold_output(weight, bias, s, h)
        self.tensors[target.weight] = weight
        if target.creates_bias:
            self.fresh.update(b.name for b in target.biases)
        for b, rows in zip(target.biases, bias.split([b.features for b in target.biases]), strict=True):
            # One that another fold makes is scaled here as well.
            if b.name and (b.name in self.fresh or find_tensor(self.model, b.name) is not None):
                self.tensors[b.name] = rows

    def _rebound(self, path: str, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Let a norm that takes on ``s * x + h`` bound x instead; return h, itself bounded where s is 0."""
        lower, upper = self.bounds[path]
        constant = scale == 0
        ends = torch.stack([(end - shift) / scale for end in (lower, upper)])
        infinite = torch.full_like(lower, torch.inf)
        self.bounds[path] = (
            torch.where(constant, -infinite, ends.amin(0)),
            torch.where(constant, infinite, ends.amax(0)),
        )
        return torch.where(constant, shift.clamp(lower, upper), shift)

    def _copy(self, name: str, features: int = 0) -> torch.Tensor:
        if name in self.tensors:
            return self.tensors[name]
        tensor = find_tensor(self.model, name)
        if tensor is None:  # a bias that is to be made
            return torch.zeros(features, dtype=torch.float64, device=next(iter(self.affines.values()))[0].device)
        return tensor.detach().double()

    def commit(self) -> None:
        """Check every result in the dtype it will have, then assign them all."""
        ready = {}
        for name, tensor in self.tensors.items():
            path, _, attribute = name.rpartition(".")
            owner = self.model.get_submodule(path)
            like: torch.Tensor = owner.weight if name in self.fresh else getattr(owner, attribute)  # type: ignore
            ready[name] = (owner, attribute, tensor.to(like), like)
            if not torch.isfinite(ready[name][2]).all():
                raise FoldError(f"{name}: not finite in {like.dtype} after the fold; nothing was changed")
        for name, (owner, attribute, tensor, like) in ready.items():
            if name in self.fresh:
                owner.register_parameter(attribute, nn.Parameter(tensor, requires_grad=like.requires_grad))
            else:
                getattr(owner, attribute).copy_(tensor)
                # A buffer outside the state dict would be lost in the file.
                owner._non_persistent_buffers_set.discard(attribute)


@dataclass(frozen=True)
class Difference:
    """How far the outputs of two models are from each other.

    Attributes:
        largest: the largest absolute difference; infinite where one of them is not a number.
        relative: the same divided by the root mean square of the first model's outputs.
        agreement: percent of images with the same largest output.
    """

    largest: float
    relative: float
    agreement: float


@torch.no_grad()
def difference(a: nn.Module, b: nn.Module, batches: Iterable[torch.Tensor]) -> Difference:
    """Return how far the two models' outputs are from each other over image batches `[B, C, H, W]`.

    >>> difference(nn.Flatten(), nn.Sequential(nn.Flatten(), nn.ReLU()), [torch.tensor([[[[-2.0, 2.0]]]])])
    Difference(largest=2.0, relative=1.0, agreement=100.0)
    """
    worst, squares, numbers, images, same = 0.0, 0.0, 0, 0, 0
    for batch in batches:
        x, y = (model(batch).double().reshape(len(batch), -1) for model in (a, b))  # features: [B, N, C] -> [B, N * C]
        apart = (x - y).abs().max()
        worst = max(worst, float("inf") if torch.isnan(apart) else float(apart))
        squares, numbers = squares + float(x.square().sum()), numbers + x.numel()
        same, images = same + int((x.argmax(1) == y.argmax(1)).sum()), images + len(x)
    size = math.sqrt(squares / numbers) if numbers else 0.0
    # Outputs that are all zero have no size; neither have those that are not numbers.
    relative = 0.0 if worst == 0 else worst / size if 0 < size < float("inf") else float("inf")
    return Difference(worst, relative, 100 * same / max(images, 1))


def max_difference(a: nn.Module, b: nn.Module, batches: Iterable[torch.Tensor]) -> float:
    """Return the largest absolute difference of the two models' outputs over image batches `[B, C, H, W]`.

    A NaN in either counts as infinite.
    """
    return difference(a, b, batches).largest
