"""Which tokens count, and that counting them more, or drawing fewer, is what it says it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normswap.gram import PENALTIES, Gram, _lowest, fast_products, solve
from normswap.influence import FLOOR, row_weights, token_influence
from normswap.lockstep import Stop
from normswap.reconstruct import _drawn

from .models import family, images
from .tolerance import LINEAR_FLOAT64

SITES = [f"blocks.{i}.norm{n}" for i in range(2) for n in (1, 2)] + ["norm"]


def _influence(model, *paths):
    stops = {Stop(path, "linear"): -1 for path in paths}
    found = token_influence(model, images(model, 8), SITES, stops)
    return [found[stop] for stop in stops]


def test_the_class_token_counts_and_what_nobody_reads_gets_the_floor():
    model = family("vit", torch.float64)
    first, last = _influence(model, "blocks.0.mlp.fc2", "blocks.1.mlp.fc2")
    assert first.shape == last.shape == (5,)  # a class token and 2x2 patches
    assert float(first.mean()) == pytest.approx(1) == float(last.mean())
    assert first.min() > last.min()  # after the last attention only the head reads, and only the class token
    torch.testing.assert_close(last[1:], last[1].expand(4))
    assert float(last[1] / last[0]) == pytest.approx(FLOOR / 5)


def test_patches_count_alike_where_they_are_averaged_and_the_class_token_is_not_read():
    (weights,) = _influence(family("avg_pool", torch.float64), "blocks.1.mlp.fc2")
    torch.testing.assert_close(weights[1:], weights[1].expand(4))
    assert weights[0] < 0.1 * weights[1]


def test_features_without_a_head_have_an_influence_too():
    (weights,) = _influence(family("headless", torch.float64), "blocks.0.mlp.fc2")
    assert weights[0] > 10 * weights[1]  # the class token is the feature


def test_an_answer_that_is_not_finite_weighs_nothing():
    model = family("vit", torch.float64)
    model.head.bias.data[0] = float("nan")
    (weights,) = _influence(model, "blocks.0.mlp.fc2")
    assert weights.tolist() == [1.0]


def test_the_model_and_its_gradients_stay():
    model = family("vit", torch.float64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _influence(model, "blocks.0.mlp.fc2")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_row_weights_repeat_image_by_image():
    positions = torch.tensor([2.0, 0.5, 0.5])
    assert row_weights(positions, 6).tolist() == [2.0, 0.5, 0.5] * 2
    assert row_weights(positions, 7) is None
    assert row_weights(torch.ones(3), 6) is None


@settings(max_examples=30, deadline=None)
@given(counts=st.lists(st.integers(1, 4), min_size=12, max_size=24), wide=st.booleans(), seed=st.integers(0, 99))
def test_a_weight_of_three_is_a_row_that_is_there_three_times(counts, wide, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(counts), 6 if wide else 2)
    x = torch.randn(len(counts), 4, generator=generator, dtype=torch.float64)
    y = torch.randn(shape, generator=generator, dtype=torch.float64) + 3
    weights = torch.tensor(counts, dtype=torch.float64)
    weighted = Gram.like(x, y, weights)
    weighted.update(x, y, weights)
    repeated = weighted.empty()
    repeated.update(x.repeat_interleave(weights.long(), 0), y.repeat_interleave(weights.long(), 0))
    for a, b in zip(_sums(weighted.reduce()), _sums(repeated.reduce()), strict=True):
        torch.testing.assert_close(a, b, rtol=LINEAR_FLOAT64, atol=LINEAR_FLOAT64)


def _sums(gram: Gram) -> list[torch.Tensor]:
    moments = gram.about(*gram.means())
    return [gram.count, *gram.means(), moments.xx, moments.xy, moments.yy]


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


@pytest.mark.parametrize("weighted", [False, True])
def test_drawn_rows_keep_every_sum_on_average(weighted):
    x = torch.randn(400, 2) + 1
    weights = torch.rand(400) ** 4 * 5 + 0.01 if weighted else None
    known = torch.ones(400) if weights is None else weights
    full = (known @ x) / known.sum()
    sums, counts = torch.zeros(2), 0
    for seed in range(200):
        drawn_x, drawn_y, drawn = _drawn(x, x, weights, 0.25, seed)
        assert torch.equal(drawn_x, drawn_y)
        sums += drawn @ drawn_x / known.sum() / 200
        counts += len(drawn_x) / 200
    assert 60 < counts < 110  # a quarter of 400, less what is always taken anyway
    torch.testing.assert_close(sums, full, rtol=0.03, atol=0)  # 200 draws: a standard error of a hundredth


def test_a_row_that_outweighs_the_others_is_always_drawn():
    weights = torch.full((200,), 0.01)
    weights[7] = 100.0
    x = torch.arange(200.0)[:, None]
    assert all(7.0 in _drawn(x, x, weights, 0.2, seed)[0] for seed in range(50))


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
