"""Tune the layers that read a norm by what comes out of their branch, where the branch mixes tokens.

Least squares makes q, k and v each as close as can be, but what counts is what attention makes of them: errors of q
and k meet in a product and in a softmax. So the solved layers are taken as a start, and gradient steps, one on each
batch, lower the error of the branch's end (the output of the layer that writes to the residual stream, with the
original's weights). The steps run in the whitened coordinates of the layer's input, where every direction of the data
has variance one (the idea of K-FAC, Martens & Grosse 2015, section 3; here one factor, known exactly), which is why so
few are enough. Images held out decide whether the result is taken.
"""

from collections.abc import Callable, Sequence

import torch
from torch import fx, nn

from ..distributed import all_sum, gathered, world
from ..planning.graph import operation
from .lockstep import Lane, Stop, Values
from .ridge import Gram, fast_products
from .solvable_layers import descendants, image_dependent

STEPS = 28  # at least, if nothing else is said; as many as there are batches to fit to, if those are more
LEARNING_RATE = 0.03  # times the root mean square of the whitened weights: what those of a row move by
WARM_UP = 3  # steps
MOMENTUM = 0.5  # of the gradient and of its mean square, both short: the gradient is mostly noise of the batch
TESTED_ON = 3  # batches at most, before and after
LEAST = 0.01  # of a layer's mean gradient: a row with less, as of a k that nothing attends to, is not moved as far
ROUNDING = 1e-8  # of a gradient, the loss being 1 at the start: less than that is no direction
DAMPING = 0.01  # of the whitening, relative to the mean variance
_MIXING = frozenset("scaled_dot_product_attention matmul bmm baddbmm softmax _softmax einsum".split())


class Branch:
    """The original's way from the outputs of some layers to the output of the layer that ends their branch.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Softmax(-1), nn.Linear(2, 2)).eval()
    >>> lane = Lane(model, torch.zeros(1, 2), [])
    >>> branch = Branch(lane, [Stop("0", "linear")], Stop("2", "linear"))
    >>> branch.usable, branch.mixes_tokens
    (True, True)
    >>> x = torch.randn(1, 2)
    >>> torch.equal(branch([model[0](x)]), model(x))
    True
    """

    def __init__(self, lane: Lane, readers: Sequence[Stop], end: Stop) -> None:
        self.lane, self.end = lane, lane.node(end)
        self.starts = [lane.node(stop) for stop in readers]
        inner = descendants(self.starts)
        needed: set[fx.Node] = set()
        pending = [self.end]
        while pending:
            node = pending.pop()
            if node not in needed and node not in self.starts:
                needed.add(node)
                pending.extend(n for n in node.all_input_nodes if n.op != "placeholder")
        dependent = image_dependent(lane)
        self.usable = (
            self.end in inner
            and not any(n in dependent and n not in inner for n in needed)
            and all(node in lane.index and lane.steps[lane.index[node]].call is None for node in needed)
        )
        self.nodes = [step.node for step in lane.steps if step.node in needed]
        self.mixes_tokens = any(operation(node) in _MIXING for node in self.nodes)

    def __call__(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        values: Values = dict(zip(self.starts, outputs, strict=True))
        for node in self.nodes:
            values[node] = self.lane.execute(node, values)
        return values[self.end]


class Descent:
    """Gradient descent in whitened coordinates, with a step length of its own for every row of a weight.

    Inputs have variance one in every direction there, so the gradients of one row differ by the data alone and not by
    scale; rows differ by how much attention makes of them. So where Adam has a mean square per weight, which with so
    few steps is mostly noise, this has one per row.

    Args:
        parameters: weights `[O, K]`, then as many biases `[O]`; changed in place.
        rates: for each weight.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], rates: Sequence[float]) -> None:
        count = len(rates)
        self.pairs = list(zip(parameters[:count], parameters[count:], rates, strict=True))
        self.averages = [
            (torch.zeros_like(weight), torch.zeros_like(bias), torch.zeros_like(bias)) for weight, bias, _ in self.pairs
        ]
        self.steps = 0

    def step(self, gradients: Sequence[torch.Tensor], share: float) -> None:
        """Go against these gradients, in the order of the parameters, by that share of the rate."""
        self.steps += 1
        unbias = 1 - MOMENTUM**self.steps  # as in Adam: the averages start at zero
        count = len(self.pairs)
        found = zip(self.pairs, self.averages, gradients[:count], gradients[count:], strict=True)
        for (weight, bias, rate), (weights, biases, squares), slope, bias_slope in found:
            weights.lerp_(slope, 1 - MOMENTUM)
            biases.lerp_(bias_slope, 1 - MOMENTUM)
            # A bias is the weight of one more input, the constant 1, of the same size as the whitened ones.
            total = slope.square().sum(1) + bias_slope.square()  # [O]
            squares.lerp_(total / (weight.shape[1] + 1), 1 - MOMENTUM)
            least = LEAST**2 * squares.mean() + ROUNDING**2
            length = rate * share / unbias / ((squares + least) / unbias).sqrt()  # [O]
            weight.sub_(weights * length[:, None])
            bias.sub_(biases * length)


class Problem:
    """What `refine` works on: layers with a common input and how far the end of their branch is off.

    Args:
        layers: linear layers; their weights are changed if that helps.
        gram: second moments of their input.
        load: gives, for the number of a batch on this process, the layers' input, the branch, and the wanted end.
        batches: how many batches this process has.
        held_out: whether a batch, by its number over all processes, is held out.
    """

    def __init__(
        self,
        layers: Sequence[nn.Linear],
        gram: Gram,
        load: Callable[[int], tuple[torch.Tensor, Branch, torch.Tensor]],
        batches: int,
        held_out: Callable[[int], bool],
    ) -> None:
        self.layers, self.load = list(layers), load
        self.unit = 1.0  # of the loss, which has no scale of its own
        rank, _ = world()
        everyone = [(i, r) for r, count in enumerate(gathered(batches)) for i in range(count)]
        everyone.sort()  # the order in which one process alone would have them
        mine = [(n, i if r == rank else None) for n, (i, r) in enumerate(everyone)]
        self.train = [place for place in mine if not held_out(place[0])]
        self.test = [place for place in mine if held_out(place[0])][:TESTED_ON]
        # Without a bias there is nothing to take the mean's share, so the mean stays in the input.
        mean, _ = centre = gram.means()
        self.mean = mean if all(layer.bias is not None for layer in self.layers) else torch.zeros_like(mean)
        covariance = gram.about(self.mean, centre[1]).xx
        damped = covariance + torch.eye(len(covariance), dtype=torch.float64, device=covariance.device) * (
            DAMPING * covariance.diagonal().mean() + torch.finfo(torch.float64).tiny
        )
        self.whiten = torch.linalg.inv(torch.linalg.cholesky(damped))
        self.colour = torch.linalg.inv(self.whiten)

    def _loss(self, index: int, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> torch.Tensor:
        x, branch, wanted = self.load(index)
        outputs = self._outputs(self._white(x, weights[0].dtype), weights, biases, wanted.dtype)
        return (branch(outputs) - wanted).to(weights[0].dtype).square().mean()

    def _white(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return (x.to(dtype) - self.mean.to(dtype)) @ self.whiten.T.to(dtype)  # [..., K]

    def _outputs(
        self, x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor], dtype: torch.dtype
    ) -> list[torch.Tensor]:
        return [nn.functional.linear(x, w, b).to(dtype) for w, b in zip(weights, biases, strict=True)]

    def _test(self, weights: list[torch.Tensor], biases: list[torch.Tensor]) -> float:
        total = torch.zeros((), dtype=torch.float64, device=self.mean.device)
        for _, index in self.test:
            if index is not None:
                total += self._loss(index, weights, biases).double()
        all_sum(total)
        return float(total)

    def refine(self, steps: int) -> float:
        """Tune the layers, on one batch a step; return what is left of the held-out error, 1 if nothing was gained."""
        if len(self.train) < 2 or not self.test:
            return 1.0
        dtype = torch.float64 if self.layers[0].weight.dtype == torch.float64 else torch.float32
        weights = [(layer.weight.detach().double() @ self.colour).to(dtype) for layer in self.layers]
        biases = [self._offset(layer).to(dtype) for layer in self.layers]
        before = self._test(weights, biases)
        if not before > 0:
            return 1.0
        self.unit = before / len(self.test)
        parameters = [t.clone() for t in (*weights, *biases)]
        descent = Descent(parameters, [LEARNING_RATE * float(weight.square().mean().sqrt()) for weight in weights])
        order: list[int] = []
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            if not order:
                order = torch.randperm(len(self.train), generator=generator).tolist()
            _, index = self.train[order.pop()]
            gradients = self._gradients(index, parameters, len(weights))
            descent.step(gradients, min(1.0, (step + 1) / WARM_UP) * (1 - step / steps))
        after = self._test(parameters[: len(weights)], parameters[len(weights) :])
        if not after < before:
            return 1.0
        for layer, weight, bias in zip(self.layers, parameters, parameters[len(weights) :], strict=False):
            plain = weight.double() @ self.whiten
            layer.weight.copy_(plain)
            if layer.bias is not None:
                layer.bias.copy_(bias.double() - plain @ self.mean)
        return after / before

    def _offset(self, layer: nn.Linear) -> torch.Tensor:
        bias = 0.0 if layer.bias is None else layer.bias.detach().double()
        return bias + layer.weight.detach().double() @ self.mean

    def _gradients(self, index: int | None, parameters: list[torch.Tensor], count: int) -> list[torch.Tensor]:
        """Return the gradients of one batch, from the process that has it, on every process."""
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        if index is not None:
            x, branch, wanted = self.load(index)
            # Only a direction to step in: the layers' own products may be fast ones, the branch's stay exact.
            with fast_products():
                x = self._white(x, parameters[0].dtype)
                outputs = self._outputs(x, parameters[:count], parameters[count:], wanted.dtype)
            with torch.enable_grad():
                for output in outputs:
                    output.requires_grad_()
                loss = (branch(outputs) - wanted).to(x.dtype).square().mean() / self.unit
                # Of layers with a common input some may write elsewhere, as a projection of the residual stream does.
                grads = torch.autograd.grad(loss, outputs, materialize_grads=True)
            x = x.flatten(0, -2)  # [..., K] -> [M, K]
            for i, grad in enumerate(grads):
                rows = grad.to(x.dtype).flatten(0, -2)  # [..., O] -> [M, O]
                with fast_products():
                    gradients[i] = rows.T @ x
                if self.layers[i].bias is not None:
                    gradients[count + i] = rows.sum(0)
        all_sum(*gradients)
        return gradients
