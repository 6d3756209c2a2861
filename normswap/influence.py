"""How much the model's output depends on each token, at each layer: the weights of the least squares.

A fit spreads its error over all tokens alike, but a class token is read by the head, and after the last attention the
patch tokens are read by nobody. The weight of a token is the mean square of the output's gradient with respect to it
(the diagonal of the Fisher information, Amari 1998, with labels drawn from the model's own answer), averaged over
images, so it is one number per position. It is measured on a few images of the original model.
"""

from collections.abc import Iterable

import torch
from torch import nn

from .lockstep import Lane, Stop

IMAGES = 8
DRAWS = 4
# Of the mean weight: a token that nobody reads still counts that much, for it keeps the least squares well posed.
FLOOR = 0.1


def token_influence(
    original: nn.Module, images: torch.Tensor, sites: Iterable[str], stops: dict[Stop, int]
) -> dict[Stop, torch.Tensor]:
    """Return the weight of each position at each stop of the original, `[P]` in float32 with mean 1.

    Args:
        original: the model with LayerNorm, in eval mode.
        images: a batch `[B, C, H, W]`; the first `IMAGES` are used.
        sites: paths of its norms.
        stops: where, and the dimension there that holds the channels; the positions are what is left of the shape,
            flattened, without the batch dimension.
    """
    images = images[:IMAGES].detach().clone().requires_grad_()
    lane = Lane(original, images.detach(), sites)
    nodes = {stop: lane.node(stop) for stop in stops}
    (output,) = lane.graph.outputs()
    with torch.enable_grad():
        # A clone, for a model may write into its input.
        values = lane.run({lane.inputs[0]: images.clone()}, 0, len(lane.steps), collect=[*nodes.values(), output])
        if not torch.isfinite(values[output]).all():  # the site where that begins is named when its turn comes
            return {stop: torch.ones(1, device=images.device) for stop in nodes}
        wanted = [values[node] for node in nodes.values()]
        squares = [torch.zeros_like(value) for value in wanted]
        for loss in _losses(values[output], int(getattr(original, "num_classes", 0) or 0)):
            for square, grad in zip(
                squares, torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True), strict=True
            ):
                if grad is not None:
                    square += grad.square()
    return {stop: _positions(square, stops[stop], len(images)) for stop, square in zip(nodes, squares, strict=True)}


def _losses(output: torch.Tensor, num_classes: int) -> Iterable[torch.Tensor]:
    """Yield losses whose squared gradients average to the Fisher information of the output `[B, K]`."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        if output.ndim == 2 and num_classes > 1:
            probabilities = output.detach().float().softmax(1).cpu()
            labels = torch.multinomial(probabilities, 1, generator=generator).to(output.device)
            yield -output.float().log_softmax(1).gather(1, labels).sum()
        else:  # features: each component counts alike
            signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
            yield (output * signs).sum()


def _positions(squares: torch.Tensor, channel_dim: int, batch_size: int) -> torch.Tensor:
    rows = squares.float().movedim(channel_dim, -1).sum(-1).flatten()  # [B, ..., O] -> [B*P]
    if len(rows) % batch_size:
        return torch.ones(1, device=rows.device)
    weights = rows.reshape(batch_size, -1).mean(0)  # [B*P] -> [P]
    mean = weights.mean()
    if not (torch.isfinite(mean) and mean > 0):
        return torch.ones_like(weights)
    weights = (weights / mean).clamp(min=FLOOR)
    return weights / weights.mean()


def row_weights(positions: torch.Tensor, rows: int) -> torch.Tensor | None:
    """Return the weight of each row where the positions `[P]` repeat image by image; None if all count 1."""
    if len(positions) == 1 or rows % len(positions) or bool((positions == 1).all()):
        return None
    return positions.repeat(rows // len(positions))  # [P] -> [B*P]
