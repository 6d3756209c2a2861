"""Which LayerNorms are sensitive: replace one at a time by BatchNorm, and measure how far the outputs move."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from ..calibration.estimators import ChannelEstimator
from ..distributed import from_first
from ..evaluation.evaluate import evaluate_models
from ..model_utils import eval_mode
from ..planning.plan import Plan
from ..progress import Progress, no_progress
from ..records.budget import SiteCost
from ..surgery.swap import batch_norms, swap_norms

# Images that a site's cost is measured on. It orders sites that differ by factors, so a few do.
IMAGES = 128


@torch.no_grad()
def site_costs(
    model: nn.Module,
    original: nn.Module,
    plan: Plan,
    sites: Sequence[str],
    batches: Sequence[torch.Tensor],
    progress: Progress = no_progress,
) -> list[SiteCost]:
    """Return what each of ``sites`` costs if it alone of them becomes a BatchNorm, in the order given.

    The BatchNorm is set by least squares per channel on what ``model`` feeds it. No other layer is set again, so it
    takes one forward pass for each site, and one for all.

    Args:
        model: the original, or a conversion in which ``sites`` still are LayerNorms; stays as it is.
        original: what the answers are compared with.
        plan: of the original, with ``sites`` not kept.
        sites: module paths.
        batches: images `[B, C, H, W]`; under torch.distributed every process passes the same.
        progress: called with ("rank", sites done, sites in all).
    """
    part = replace(plan, sites=tuple(site for site in plan.sites if site.path in set(sites)), ffns=())
    trial = swap_norms(model, part, "none")
    norms = {path: norm for path, norm in batch_norms(trial).items() if path in set(sites)}
    estimators = {}
    hooks = []
    for path, norm in norms.items():
        layer_norm = copy.deepcopy(model.get_submodule(path))
        trial.set_submodule(path, layer_norm)
        estimators[path] = ChannelEstimator(norm, layer_norm)  # type: ignore[arg-type]
        hooks.append(layer_norm.register_forward_hook(_feed(estimators[path])))
    with eval_mode(trial):
        for batch in batches:
            trial(batch)
    for hook in hooks:
        hook.remove()
    costs = []
    answers: dict[int, torch.Tensor] = {}
    for i, path in enumerate(sites):
        progress("rank", i, len(sites))
        estimators[path].solve(path)
        layer_norm = trial.get_submodule(path)
        trial.set_submodule(path, norms[path])
        measured = evaluate_models({"original": original, path: trial}, batches, answers=answers)[-1].kl
        trial.set_submodule(path, layer_norm)
        costs.append(float("nan") if measured is None else measured)
    progress("rank", len(sites), len(sites))
    agreed = from_first(torch.tensor(costs, dtype=torch.float64, device=batches[0].device))
    return [SiteCost(path, kl) for path, kl in zip(sites, agreed.tolist(), strict=True)]


def _feed(estimator: ChannelEstimator) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        estimator.update(estimator.norm.tokens(inputs[0]), estimator.norm.tokens(output))

    return hook
