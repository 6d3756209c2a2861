"""Blend LayerNorm into BatchNorm while training, all at once or one after the other.

``y = (1 - a) * LN(x) + a * BN(x)`` with a from 0 to 1, as scripts that take LayerNorm out of language models do
(docs/finetuning.md). When a is 1 nothing of LayerNorm is left. Everything is a share of the run, never a number of
steps, so that a short run fades as a long one does.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError
from ..surgery.swap import batch_norms


class Fade:
    """The blend of every norm as a function of how far the run is.

    Args:
        student: the swapped model.
        original: the model with LayerNorm.
        sites: paths of the norms, in the order in which they run.
        share: of the run, over which everything fades; 0 for no fade.
        order: "all" together, "blockwise" one norm after the other, or "mlp-first": those in front of an FFN in the
            first half, the others in the second.

    Raises:
        ArgumentError: "mlp-first" for a model in which no BatchNorm tells where its FFNs are.
    """

    def __init__(self, student: nn.Module, original: nn.Module, sites: Sequence[str], share: float, order: str) -> None:
        self.student, self.original, self.share = student, original, share
        self.windows: dict[str, tuple[float, float]] = {}
        self.amount = dict.fromkeys(sites, 1.0)
        if order == "mlp-first":
            norms = list(batch_norms(student))
            ffn = {a for a, b in pairwise(norms) if a in self.amount and b not in self.amount}
            if share and not ffn:
                raise ArgumentError("mlp-first needs a BatchNorm inside the FFNs: swap with ffn_bn pre-act or post-act")
            self.windows = {site: (0.0, 0.5) if site in ffn else (0.5, 1.0) for site in sites}
        elif order == "blockwise":
            self.windows = {site: (i / len(sites), (i + 1) / len(sites)) for i, site in enumerate(sites)}
        else:
            self.windows = {site: (0.0, 1.0) for site in sites}

    def at(self, progress: float) -> None:
        """Set every blend for a run that is so far, from 0 to 1."""
        for site, (start, end) in self.windows.items():
            done = 1.0 if self.share == 0 else min(progress / self.share, 1.0)
            self.amount[site] = min(max((done - start) / (end - start), 0.0), 1.0)

    @contextmanager
    def blended(self) -> Iterator[None]:
        """Let every norm of the student give its blend."""
        handles = []
        if self.share:
            handles = [self.student.get_submodule(s).register_forward_hook(self._hook(s)) for s in self.amount]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, site: str) -> Any:
        norm = self.original.get_submodule(site)

        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            amount = self.amount[site]
            return output if amount == 1 else torch.lerp(norm(inputs[0]).to(output), output, amount)

        return hook
