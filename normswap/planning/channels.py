"""Follow channels through a graph, exactly: where a norm's output goes, and what its input is made of.

Instead of one axis rule per operator, the operators themselves are run on integers. A value whose elements hold
their own channel number (from 1) is sent through every operator that only moves elements; what arrives says which
channel each reader sees at each of its input features, through any reshape, permutation, window partition, roll,
split or token pick. A 0 that arrives came from padding, where a shift does not survive.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .graph import operation

# Operators whose output elements are input elements, in another place. clone, dropout and dtype casts included:
# the graph is one of eval mode.
REARRANGING = frozenset(
    "view reshape _unsafe_view permute transpose t swapaxes swapdims movedim moveaxis numpy_T select slice "
    "narrow squeeze unsqueeze flatten unflatten expand repeat clone contiguous alias detach roll flip "
    "unbind split split_with_sizes chunk unfold pixel_shuffle pixel_unshuffle pad constant_pad_nd lift_fresh_copy "
    "getitem".split()
)
UNCHANGED = frozenset("dropout feature_dropout to _to_copy clone contiguous alias".split())
# A mean of equal channels is that channel, and an average of a*x + b is a*average(x) + b.
AVERAGING = frozenset("mean adaptive_avg_pool2d adaptive_avg_pool1d avg_pool1d avg_pool2d".split())
PADDING = frozenset(["pad", "constant_pad_nd"])
# They read a shape, not the values.
SHAPE_ONLY = frozenset(
    "sym_size sym_numel sym_stride zeros_like ones_like full_like empty_like rand_like new_zeros new_ones new_full "
    "new_empty _assert_tensor_metadata _assert_async _assert_scalar".split()
)


@dataclass(frozen=True, eq=False)
class Read:
    """One node that reads the followed value as more than a rearrangement of it.

    Attributes:
        node: the reader.
        source: the argument through which it reads.
        ids: what arrives there, same shape as the argument: channel numbers from 1, 0 for anything else.
    """

    node: fx.Node
    source: fx.Node
    ids: torch.Tensor


def channel_ids(node: fx.Node, channel_dim: int) -> torch.Tensor:
    """Return integers of the node's shape whose elements are their own channel number, from 1."""
    shape = node.meta["val"].shape
    ids = torch.arange(1, shape[channel_dim] + 1)
    return ids.reshape([-1 if d == channel_dim % len(shape) else 1 for d in range(len(shape))]).expand(shape)


def follow(
    start: fx.Node,
    ids: torch.Tensor,
    through: frozenset[fx.Node] = frozenset(),
    stop: frozenset[fx.Node] = frozenset(),
) -> Iterator[Read]:
    """Yield every `Read` of ``start``, looking through whatever only rearranges or averages.

    Args:
        start: the value to follow.
        ids: its channel numbers, see `channel_ids`.
        through: additions and concatenations to look through as well; in a concatenation the other parts count
            as 0, in an addition the other side does not matter.
        stop: nodes that always count as readers.
    """
    pending: list[tuple[fx.Node, Any]] = [(start, ids)]
    while pending:
        source, value = pending.pop()
        for node in source.users:
            if operation(node) in SHAPE_ONLY:
                continue
            after = None if node in stop else moved(node, source, value, node in through)
            if after is not None:
                pending.append((node, after))
            else:
                yield Read(node, source, value)


def moved(node: fx.Node, source: fx.Node, ids: Any, through: bool) -> Any:
    """Return the ids after ``node`` (a tuple after a split), or None if the node does more than move them."""
    name = operation(node)
    if node.op != "call_function" or (node.all_input_nodes != [source] and not through):
        return None
    if name in UNCHANGED:
        return ids
    if name in AVERAGING and isinstance(ids, torch.Tensor):
        return _averaged(node, ids)
    if through and name == "cat":
        tensors: Any = node.args[0]
        parts = [ids if t is source else torch.zeros(t.meta["val"].shape, dtype=torch.long) for t in tensors]
        cat: Any = torch.cat
        return cat(parts, *node.args[1:], **node.kwargs)
    if through:
        return ids.expand(node.meta["val"].shape)
    if name not in REARRANGING:
        return None
    if node.target is operator.getitem:
        return ids[node.args[1]]
    if name in PADDING and any(node.args[2:]) and node.args[2:] != ("constant",):
        return None  # another fill than 0 would look like a channel
    if name in ("view", "_unsafe_view") and isinstance(node.args[1], list | tuple):
        return ids.reshape(node.args[1])  # our strides need not be the value's
    target: Any = node.target
    args = fx.map_arg(node.args, lambda _: ids)
    try:
        return target(*args, **node.kwargs)
    except (RuntimeError, TypeError):
        return None  # not defined on integers: we cannot know, so it counts as a reader of its own


def _averaged(node: fx.Node, ids: torch.Tensor) -> torch.Tensor | None:
    """Return the ids after an average if each element is one of equal channels with weights that sum to 1.

    Both hold where the average of the squares is the square of the average: padding that counts, another divisor and
    unequal channels break it.
    """
    target: Any = node.target

    def run(value: torch.Tensor) -> torch.Tensor:
        return target(*fx.map_arg(node.args, lambda _: value), **node.kwargs)

    mean, square = run(ids.double()), run(ids.double().square())
    after = mean.round()
    # Unequal integers among a million elements spread by more than this, float64 averages err by less.
    exact = (mean - after).abs().max() < _EQUAL and (square - after.square()).abs().max() < _EQUAL
    return after.long() if exact else None


_EQUAL = 1e-7
