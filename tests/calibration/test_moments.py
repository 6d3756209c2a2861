"""Moments against numpy's two-pass result, for large means, and whatever the batches."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normswap.calibration.moments import JointMoments, Moments

from ..tolerance import MOMENTS, SPLIT, SPLIT_FLOAT32


def _split(x: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    cuts = sorted({size % len(x) for size in sizes} - {0})
    return [part for part in torch.tensor_split(x, cuts) if len(part)]


@settings(max_examples=60, deadline=None)
@given(offset=st.floats(-1e5, 1e5), sizes=st.lists(st.integers(1, 500), max_size=8), seed=st.integers(0, 1000))
def test_joint_moments_match_numpy(offset, sizes, seed):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(257, 3)) * [0.1, 1, 10] + offset
    y = 0.5 * x + generator.normal(size=x.shape)
    joint = JointMoments()
    for a, b in zip(_split(torch.from_numpy(x), sizes), _split(torch.from_numpy(y), sizes), strict=True):
        joint.update(a, b)
    spread = x.std(0)
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    assert joint.x.count == 257
    np.testing.assert_allclose(joint.x.mean, x.mean(0), atol=float(spread.max()) * MOMENTS, rtol=1e-14)
    # An offset of 1e5 leaves 11 digits of a spread of 0.1.
    np.testing.assert_allclose(joint.x.var, x.var(0), rtol=1e-7)
    np.testing.assert_allclose(joint.y[0].var, y.var(0), rtol=1e-7)
    np.testing.assert_allclose(joint.cov[0], (centred_x * centred_y).mean(0), rtol=1e-6, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 500), min_size=1, max_size=10))
def test_splitting_does_not_matter(sizes):
    for dtype, tolerance in ((torch.float64, SPLIT), (torch.float32, SPLIT_FLOAT32)):
        _split_alike(torch.randn(300, 4, dtype=dtype), torch.randn(300, 4, dtype=dtype), sizes, tolerance)


def _split_alike(x, y, sizes, tolerance):
    whole, parts = JointMoments(), JointMoments()
    whole.update(x, y)
    for a, b in zip(_split(x, sizes), _split(y, sizes), strict=True):
        parts.update(a, b)
    torch.testing.assert_close(parts.x.var, whole.x.var, rtol=tolerance, atol=0)
    torch.testing.assert_close(parts.cov[0], whole.cov[0], rtol=tolerance, atol=tolerance)


def test_a_large_mean_survives_float32_data():
    """The formula E[x^2] - E[x]^2 in float32 gives a negative variance here."""
    x = (torch.randn(20_000, 1) * 0.1 + 1000).float()
    moments = Moments()
    for part in x.split(64):
        moments.update(part)
    naive = x.square().mean() - x.mean().square()
    expected = float(x.double().var(correction=0))
    assert abs(float(moments.var) - expected) < 1e-9
    assert abs(float(naive) - expected) > 1e-3


def test_non_finite_samples_show():
    moments = Moments()
    moments.update(torch.tensor([[1.0], [float("nan")]]))
    assert not moments.finite
    joint = JointMoments()
    joint.update(torch.ones(2, 1), torch.tensor([[1.0], [float("inf")]]))
    assert not joint.finite


def test_a_batch_without_rows_changes_nothing():
    """A process may have no token of a kind; what it has must still be of the shape that the others add up."""
    x, y = torch.randn(20, 3), torch.randn(20, 3)
    whole, parts = JointMoments(), JointMoments()
    whole.update(x, y)
    for rows in (slice(0, 0), slice(0, 12), slice(12, 12), slice(12, 20)):
        parts.update(x[rows], y[rows])
        assert parts.x.mean.shape == parts.cov[0].shape == (3,)
    assert parts.x.count == 20
    torch.testing.assert_close(parts.x.var, whole.x.var)
    torch.testing.assert_close(parts.cov[0], whole.cov[0])
    empty = JointMoments()
    empty.update(x[:0], y[:0])
    empty.reduce()
    assert (empty.x.count, empty.x.var.tolist(), empty.finite) == (0, [0.0] * 3, True)
