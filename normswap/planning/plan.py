"""Find each LayerNorm and each FFN of a model and say what will become of it, and why. Changes nothing.

Analysis reads the exported graph; surgery later edits the ``nn.Module`` at the path found, so that parameter
names stay timm's.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from rich.table import Table
from torch import nn

from ..ambient import known_context
from ..errors import ArgumentError, ModelRefusedError, NoLayerNormError
from ..layers import TokenBatchNorm
from ..model_utils import example_batch, meta_copy, pretrained_cfg, resolve_input_size, tied_names
from ..module_state import check_state
from ..tables import render, table
from .channels import REARRANGING, SHAPE_ONLY, UNCHANGED, channel_ids, follow
from .ffn import Ffn, find_ffns
from .foldability import KEEP, VERDICTS, NormCall, Target, Verdict, judge
from .graph import Call, ModelGraph, operation, owner, users
from .operands import Blocked


@dataclass(frozen=True)
class Site:
    """One LayerNorm: what it is, what becomes of it and why.

    Attributes:
        path: module path, timm's name for it.
        kind: class name.
        num_features: C.
        channel_dim: -1 for tokens `[..., C]`, 1 for maps `[B, C, H, W]`.
        verdict: fold-forward, fold-backward, affine or keep.
        reason: why, in words.
        targets: what takes the fold.
    """

    path: str
    kind: str
    num_features: int
    channel_dim: int
    verdict: str
    reason: str
    targets: tuple[Target, ...] = ()

    @property
    def readers(self) -> list[str]:
        """The layers that take a fold-forward, or the norms that take it on."""
        return [t.name for t in self.targets if t.side in ("input", "norm")]

    def row(self) -> dict[str, Any]:
        """Return the row that ``inspect --json`` prints."""
        row = asdict(self)
        del row["targets"]
        row["readers"] = self.readers
        row["producers"] = [t.name for t in self.targets if t.side in ("output", "value")]
        row["creates_bias"] = [t.name for t in self.targets if t.creates_bias]
        return row


@dataclass(frozen=True)
class Plan:
    """What normswap would do to a model; ``print(plan)`` is the table."""

    model: str
    input_size: tuple[int, int, int]
    sites: tuple[Site, ...]
    ffns: tuple[Ffn, ...]
    seconds: float = field(default=0.0, compare=False)

    @property
    def swapped_sites(self) -> tuple[Site, ...]:
        """The sites that lose their LayerNorm."""
        return tuple(site for site in self.sites if site.verdict != KEEP)

    def counts(self, ffn_bn: str = "pre-act") -> dict[str, int]:
        """Return how many sites got each verdict, and how many FFN BatchNorms go in."""
        verdicts = Counter(site.verdict for site in self.sites)
        inserted = sum(len(ffn.positions(ffn_bn)) for ffn in self.ffns)
        return {"total": len(self.sites), **{v: verdicts[v] for v in VERDICTS}, "ffn_bn": inserted}

    def summary(self, ffn_bn: str = "pre-act") -> str:
        """Return one line: how many were found and what becomes of them."""
        counts = self.counts(ffn_bn)
        verdicts = ", ".join(f"{counts[v]} {v}" for v in VERDICTS if counts[v])
        return f"{counts['total']} LayerNorms: {verdicts}; {counts['ffn_bn']} FFN BatchNorms"

    def to_json(self, ffn_bn: str = "pre-act") -> dict[str, Any]:
        """Return the rows that the table shows, as plain JSON types."""
        return {
            "model": self.model,
            "input_size": list(self.input_size),
            "counts": self.counts(ffn_bn),
            "sites": [site.row() for site in self.sites],
            "ffns": [asdict(ffn) for ffn in self.ffns],
        }

    def table(self) -> Table:
        """Return one row per LayerNorm, for a rich console."""
        rows = []
        for site in self.sites:
            readers = ", ".join(site.readers) or "-"
            rows.append([site.path, site.kind, str(site.num_features), readers, site.verdict, site.reason])
        return table(["site", "kind", "C", "readers", "verdict", "reason"], rows, right=["C"])

    def __str__(self) -> str:
        text = render(self.table())
        refused = [f"no FFN BatchNorm in {ffn.path} ({ffn.kind}): {ffn.reason}" for ffn in self.ffns if ffn.reason]
        return "\n".join([text, *refused, self.summary()])


@known_context()
def make_plan(model: nn.Module, keep: Iterable[str] = (), input_size: tuple[int, int, int] | None = None) -> Plan:
    """Return the plan for ``model``, which stays as it is; no memory is taken for weights.

    Args:
        model: a timm model, or any module that maps `[B, C, H, W]` to one tensor.
        keep: shell patterns of module paths whose LayerNorm stays.
        input_size: (channels, height, width); default: the model's own.

    Raises:
        NoLayerNormError: there is no LayerNorm in the forward pass.
        ModelRefusedError: the model cannot be exported.
        ArgumentError: a keep pattern matches no LayerNorm, or the input size is unknown.

    >>> plan = make_plan(timm.create_model("test_vit"), keep=["blocks.0.*"])
    >>> plan.summary()
    '13 LayerNorms: 11 fold-forward, 2 keep; 6 FFN BatchNorms'
    >>> plan.sites[2].path, plan.sites[2].verdict, plan.sites[2].readers
    ('blocks.1.norm1', 'fold-forward', ['blocks.1.attn.qkv'])
    """
    start = time.perf_counter()
    check_state(model)
    size = resolve_input_size(model, input_size)
    shadow = meta_copy(model).eval()
    graph = ModelGraph(shadow, example_batch(shadow, size), tied_names(model))
    if isinstance(model, nn.LayerNorm):
        raise ModelRefusedError("the model is itself a LayerNorm; there is nothing around it to fold into")
    if len(graph.outputs()) != 1:
        raise ModelRefusedError(f"{model_name(model)}: gives {len(graph.outputs())} values, not one tensor to compare")
    if graph.container is not None:
        wrap = "wrap it in a module whose forward returns the logits alone"
        raise ModelRefusedError(f"{model_name(model)}: answers with a {graph.container}, not with one tensor: {wrap}")
    paths = _layer_norms(graph)
    if not paths:
        raise NoLayerNormError(_nothing_to_swap(model))
    patterns = tuple(keep)
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise ArgumentError(
                f"`keep` {pattern!r} matches none of the {len(paths)} LayerNorms (for example {paths[0]})"
            )
    excluded = [path for path in paths if any(fnmatchcase(path, pattern) for pattern in patterns)]
    sites = tuple(_sites(graph, paths, excluded))
    return Plan(model_name(model), size, sites, find_ffns(graph), time.perf_counter() - start)


def keep_more(model: nn.Module, plan: Plan, sites: Iterable[str], reason: str) -> Plan:
    """Return ``plan`` with the LayerNorms at ``sites`` kept as well, and why.

    The others are judged anew, since nothing folds through a LayerNorm that stays.
    """
    added = set(sites)
    if not added:
        return plan
    stay = {site.path: site for site in plan.sites if site.verdict == KEEP}
    fresh = make_plan(model, [*stay, *added], plan.input_size)
    kept = {site.path: replace(site, reason=reason) for site in fresh.sites if site.path in added} | stay
    return replace(fresh, sites=tuple(kept.get(site.path, site) for site in fresh.sites))


def judge_norms(graph: ModelGraph, paths: Sequence[str]) -> dict[str, Verdict]:
    """Return the verdict for each BatchNorm of a swapped model, in the order in which they run."""
    calls, refused = _norm_calls(graph, paths)
    others = {node: norm for norm in calls.values() for node in norm.call.nodes}
    index = {node: i for i, node in enumerate(graph.nodes)}
    found = {path: Verdict(KEEP, reason) for path, reason in refused.items()}
    for path, norm in sorted(calls.items(), key=lambda item: index[item[1].call.output]):
        found[path] = judge(graph, norm, others)
    return found


def model_name(model: nn.Module) -> str:
    """Return timm's name of the architecture, or the class name."""
    return pretrained_cfg(model).get("architecture") or type(model).__name__


def _layer_norms(graph: ModelGraph) -> list[str]:
    """Return where a LayerNorm runs, in that order, and the modules that never do; "(model)" for the model itself."""
    ran = [owner(node) or "(model)" for node in graph.nodes if operation(node) == "layer_norm"]
    held = [path for path, module in graph.model.named_modules() if isinstance(module, nn.LayerNorm)]
    return list(dict.fromkeys([*ran, *held]))


def _sites(graph: ModelGraph, paths: list[str], excluded: list[str]) -> Iterator[Site]:
    modules = dict(graph.model.named_modules())
    norms = [path for path in paths if isinstance(modules.get(path), nn.LayerNorm)]
    calls, refused = _norm_calls(graph, norms)
    # A kept LayerNorm is no affine map, so nothing folds through it.
    others = {node: norm for path, norm in calls.items() if path not in excluded for node in norm.call.nodes}
    widths = {owner(n): int(n.meta["val"].shape[-1]) for n in graph.nodes if operation(n) == "layer_norm"}
    for path in paths:
        if path not in norms:
            verdict = Verdict(KEEP, "calls layer_norm as a function, so there is no module to replace")
            kind, width = "layer_norm", widths["" if path == "(model)" else path]
        else:
            verdict = judge(graph, calls[path], others) if path in calls else Verdict(KEEP, refused[path])
            norm: Any = modules[path]
            kind, width = type(norm).__name__, norm.normalized_shape[-1]
        if path in excluded:
            verdict = Verdict(KEEP, "excluded by a keep pattern")
        channel_dim = calls[path].channel_dim if path in calls else -1
        yield Site(path, kind, width, channel_dim, verdict.verdict, verdict.reason, verdict.targets)


def _norm_calls(graph: ModelGraph, paths: Iterable[str]) -> tuple[dict[str, NormCall], dict[str, str]]:
    """Return the call of each norm that is or can become an affine map, and for the others why not."""
    calls, refused = {}, {}
    for path in paths:
        try:
            calls[path] = _norm_call(graph, path)
        except (Blocked, ModelRefusedError) as reason:
            refused[path] = str(reason)
    return calls, refused


def _norm_call(graph: ModelGraph, path: str) -> NormCall:
    norm = graph.model.get_submodule(path)
    if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) != 1:
        raise Blocked(f"normalises over {len(norm.normalized_shape)} dimensions, not over channels")
    calls = graph.calls(path)
    if not calls:
        raise Blocked("never runs as a plain call in the forward pass")
    if len(calls) != 1:
        raise Blocked(f"runs {len(calls)} times in one forward pass, each with other statistics")
    if isinstance(norm, nn.LayerNorm):
        extra = [operation(n) for n in calls[0].nodes if operation(n) not in _NORMALISING]
        if extra:
            raise Blocked(f"{type(norm).__name__} does more than normalise ({', '.join(extra[:3])})")
        if not any(operation(n) == "layer_norm" for n in calls[0].nodes):
            raise Blocked("never runs as a plain call in the forward pass")
        if _read_elsewhere(graph, path, calls[0]):
            raise Blocked("its weight or bias is also read outside its own call")
    channel_dim = norm.channel_dim if isinstance(norm, TokenBatchNorm) else _channel_dim(calls[0])
    if channel_dim is None:
        raise Blocked("the place of its channels cannot be read from the graph")
    return NormCall(calls[0], channel_dim)


# What a LayerNorm's own call may consist of; a fused activation would be lost in the swap.
_NORMALISING = REARRANGING | UNCHANGED | SHAPE_ONLY | {"layer_norm"}


def _read_elsewhere(graph: ModelGraph, path: str, call: Call) -> bool:
    own = {f"{path}.weight", f"{path}.bias"}
    tensors = [node for node in graph.nodes if graph.attribute(node) in own]
    return any(not users(tensor) <= set(call.nodes) for tensor in tensors)


def _channel_dim(call: Call) -> int | None:
    for channel_dim in (-1, 1):
        for read in follow(call.input, channel_ids(call.input, channel_dim)):
            in_last_dim = torch.equal(read.ids, channel_ids(read.source, -1))
            if read.node in call.nodes and operation(read.node) == "layer_norm" and in_last_dim:
                return channel_dim
    return None


def _nothing_to_swap(model: nn.Module) -> str:
    others = Counter(type(m).__name__ for m in model.modules() if "norm" in type(m).__name__.lower())
    has = ", ".join(f"{n} {kind}" for kind, n in others.most_common())
    return f"{model_name(model)}: no LayerNorm in its forward pass{f' (it has {has})' if has else ''}: nothing to swap"
