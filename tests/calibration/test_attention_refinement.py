"""The gradient steps on what attention reads: how far a row goes, which batches are stepped on."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from normswap.calibration.attention_refinement import LEAST, Descent, Problem
from normswap.calibration.ridge import Gram

RATE = 0.25
ROUNDING = 1e-12  # of float64, through a square, a root and a quotient


def _stepped(weight: torch.Tensor, bias: torch.Tensor, share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far one step goes for these gradients, `[O, K]` and `[O]`."""
    parameters = [torch.zeros_like(weight), torch.zeros_like(bias)]
    Descent(parameters, [RATE]).step((weight, bias), share)
    return parameters[0], parameters[1]


@given(
    seed=st.integers(0, 2**32),
    rows=st.integers(1, 5),
    inputs=st.integers(1, 6),
    share=st.floats(0.01, 1.0),
    scales=st.lists(st.floats(0.5, 2.0), min_size=5, max_size=5),
)
def test_a_row_goes_against_its_gradient_by_the_rate_whatever_its_scale(seed, rows, inputs, share, scales):
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(rows, inputs + 1, generator=generator, dtype=torch.float64)
    gradient *= (torch.tensor(scales[:rows], dtype=torch.float64) / gradient.square().mean(1).sqrt())[:, None]
    weight, bias = _stepped(gradient[:, :-1], gradient[:, -1], share)
    moved = torch.cat([weight, bias[:, None]], 1)
    length = moved.square().mean(1).sqrt()
    # At most by the rate, and hardly less: LEAST of the mean is a small part of a row at least a quarter of it.
    assert bool((length <= RATE * share * (1 + ROUNDING)).all())
    assert bool((length >= RATE * share * (1 - 16 * LEAST**2)).all())
    cosine = (moved * gradient).sum(1) / moved.norm(dim=1) / gradient.norm(dim=1)
    torch.testing.assert_close(cosine, -torch.ones_like(cosine), rtol=ROUNDING, atol=0)


def test_no_gradient_is_no_step():
    weight, bias = _stepped(torch.zeros(3, 4), torch.zeros(3))
    assert not weight.any()
    assert not bias.any()


def test_a_row_that_hardly_matters_hardly_moves():
    gradient = torch.ones(10, 4, dtype=torch.float64)
    gradient[0] *= 1e-6
    weight, _ = _stepped(gradient, torch.zeros(10, dtype=torch.float64))
    assert 0 < float(weight[0].abs().max()) < 1e-3 * float(weight[1].abs().min())


@pytest.mark.parametrize("gradient", [1e-3, 1.0, 1e3])
def test_a_bias_whose_weights_have_no_gradient_moves_by_its_share_of_the_row(gradient):
    _, bias = _stepped(torch.zeros(2, 8, dtype=torch.float64), torch.full((2,), gradient, dtype=torch.float64))
    assert bool((bias.abs() <= RATE * math.sqrt(9) * (1 + ROUNDING)).all())
    assert bool(bias.all())


def test_steps_get_longer_with_a_direction_that_stays_and_stay_short_with_noise():
    torch.manual_seed(0)
    steady, noise = torch.ones(1, 64, dtype=torch.float64), torch.randn(40, 1, 64, dtype=torch.float64)
    reached = []
    for gradients in (steady.expand(40, 1, 64), noise):
        weight, bias = torch.zeros(1, 64, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        descent = Descent([weight, bias], [RATE])
        for gradient in gradients:
            descent.step((gradient, torch.zeros_like(bias)), 1.0)
        reached.append(float(weight.norm()))
    assert reached[0] > 4 * reached[1] > 0


def test_every_batch_fitted_to_is_stepped_on_once_in_as_many_steps():
    torch.manual_seed(0)
    batches = [torch.randn(4, 5, 6, dtype=torch.float64) for _ in range(10)]
    layer, wanted = nn.Linear(6, 6, dtype=torch.float64), nn.Linear(6, 6, dtype=torch.float64)
    gram = Gram(torch.zeros(6, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    for batch in batches:
        gram.update(batch.flatten(0, 1), torch.zeros(20, 1, dtype=torch.float64))  # [4, 5, 6] -> [20, 6]
    loaded: Counter[int] = Counter()

    def load(index: int):
        loaded[index] += 1
        return batches[index], lambda outputs: outputs[0].tanh(), wanted(batches[index]).tanh()

    with torch.no_grad():
        problem = Problem([layer], gram.reduce(), load, len(batches), lambda number: number % 5 == 4)
        assert problem.refine(8) < 1
    assert loaded == {
        **{index: 1 for index in range(10) if index % 5 != 4},
        4: 2,
        9: 2,
    }  # those held out: before, after
