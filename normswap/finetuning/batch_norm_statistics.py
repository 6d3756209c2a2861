"""BatchNorm's statistics, estimated again after training."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..calibration.moments import Moments
from ..errors import CalibrationError
from ..layers import TokenBatchNorm
from ..model_utils import eval_mode
from ..surgery.swap import batch_norms


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Sequence[torch.Tensor]) -> None:
    """Set every BatchNorm's statistics to the mean and variance `[C]` of what it sees in train mode, in place.

    Everything else is in eval mode, so that drop path does not shift the variance (Li & Yang 2019's variance shift,
    "Understanding the Disharmony between Dropout and Batch Normalization", section 3). Sums over all processes.
    """
    norms = batch_norms(model)
    moments = {path: Moments() for path in norms}
    hooks = [norm.register_forward_pre_hook(_watch(norm, moments[path])) for path, norm in norms.items()]
    try:
        with eval_mode(model):
            for norm in norms.values():
                norm.train()
            for batch in batches:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for path, norm in norms.items():
        moments[path].reduce()
        if not moments[path].finite:
            raise CalibrationError(f"{path}: statistics are not finite after fine-tuning: lower the learning rate")
        norm.set_statistics(moments[path].mean, moments[path].var)


def _watch(norm: TokenBatchNorm, moments: Moments) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        moments.update(norm.tokens(norm.bounded(inputs[0])))

    return hook
