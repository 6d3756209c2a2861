"""Sums of products and the choice of the penalty."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normswap.calibration.ridge import PENALTIES, Gram, _lowest, fast_products, solve

from ..tolerance import LINEAR_FLOAT64


def test_moments_about_any_point_are_those_of_the_rows():
    x, y = torch.randn(50, 4).double() + 100, torch.randn(50, 3).double() - 50
    gram = Gram.like(x[:10], y[:10])
    for part in (slice(0, 10), slice(10, 37), slice(37, 50)):
        gram.update(x[part], y[part])
    at_x, at_y = torch.randn(4).double(), torch.randn(3).double()
    moments = gram.reduce().about(at_x, at_y)
    torch.testing.assert_close(moments.xx, (x - at_x).T @ (x - at_x) / 50, rtol=LINEAR_FLOAT64, atol=0)
    torch.testing.assert_close(moments.xy, (x - at_x).T @ (y - at_y) / 50, rtol=LINEAR_FLOAT64, atol=0)
    torch.testing.assert_close(moments.yy, (y - at_y).square().mean(0), rtol=LINEAR_FLOAT64, atol=0)


def test_fast_products_put_the_precision_back():
    before = torch.get_float32_matmul_precision()
    inside = []

    def fail() -> None:
        with fast_products():
            inside.append(torch.get_float32_matmul_precision())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == ["medium"]
    assert torch.get_float32_matmul_precision() == before


@settings(max_examples=50, deadline=None)
@given(best=st.integers(0, 7), start=st.integers(0, 7))
def test_the_walk_ends_at_the_lowest(best, start):
    tried = []
    assert _lowest(lambda i: tried.append(i) or abs(i - best), start, 8) == best  # type: ignore[func-returns-value]
    assert len(tried) == len(set(tried))


def test_the_first_guess_does_not_change_the_solution():
    torch.manual_seed(1)
    x = torch.randn(300, 6).double()
    y = x @ torch.randn(6, 4).double() + torch.randn(300, 4).double()
    fit = Gram.like(x, y)
    held_out = fit.empty()
    fit.update(x[:200], y[:200])
    held_out.update(x[200:], y[200:])
    fit.reduce()
    held_out.reduce()
    weight, bias = torch.zeros(4, 6), torch.zeros(4)
    first, *others = (solve(fit, held_out, weight, bias, guess=guess) for guess in (PENALTIES[0], 0.1, PENALTIES[-1]))
    assert all(other.penalty == first.penalty for other in others)
    assert all(torch.equal(other.weight, first.weight) for other in others)
