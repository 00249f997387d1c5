"""The shift, the masked statistics and the positions, against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functional.ragged import MASK, B, T, normals, poisoned

from rlhf_jax.functional import (
    last_true_index,
    masked_mean,
    masked_sum,
    masked_var,
    masked_whiten,
    positions_from_segments,
    shift_right,
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32, jnp.bool_])
@pytest.mark.parametrize("rest", [(), (3,)])
def test_shift_right(dtype, rest):
    x = jnp.asarray(3 * normals(0, B, T, *rest)).astype(dtype)
    shifted = shift_right(x)
    assert shifted.dtype == dtype
    assert shifted.shape == x.shape
    assert not np.any(shifted[:, 0])
    for t in range(1, T):
        np.testing.assert_array_equal(shifted[:, t], x[:, t - 1])


def test_shift_right_drops_the_last_position():
    gradient = jax.grad(lambda x: jnp.square(shift_right(x)).sum())(jnp.ones((2, 4)))
    np.testing.assert_array_equal(gradient, [[2, 2, 2, 0]] * 2)


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 1)])
def test_sum_and_mean(axis):
    x = normals(1, B, T)
    total, count = np.sum(x * MASK, axis=axis), np.sum(MASK, axis=axis)
    np.testing.assert_allclose(masked_sum(poisoned(x), jnp.asarray(MASK), axis), total, rtol=1e-5, atol=1e-6)
    expected = np.where(count > 0, total / np.maximum(count, 1), 0)
    np.testing.assert_allclose(masked_mean(poisoned(x), jnp.asarray(MASK), axis), expected, rtol=1e-5, atol=1e-6)


def test_sum_counts_bools():
    assert masked_sum(jnp.asarray(MASK), jnp.asarray(MASK)) == MASK.sum()
    assert masked_sum(~jnp.asarray(MASK), jnp.asarray(MASK)) == 0


def test_bfloat16_is_summed_in_float32():
    ones = jnp.ones((1, 1000), jnp.bfloat16)
    total = masked_sum(ones, jnp.ones((1, 1000), bool))
    assert total == 1000
    assert total.dtype == jnp.float32


def test_variance_is_the_populations():
    x = 5 + normals(2, B, T)
    variance = masked_var(poisoned(x), jnp.asarray(MASK))
    np.testing.assert_allclose(variance, np.var(np.float64(x[MASK])), rtol=1e-5)
    unbiased = masked_var(poisoned(x), jnp.asarray(MASK), unbiased=True)
    np.testing.assert_allclose(unbiased, np.var(np.float64(x[MASK]), ddof=1), rtol=1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("unbiased", [False, True])
def test_whiten(shift_mean, unbiased):
    x, options = 5 + 3 * normals(3, B, T), {"shift_mean": shift_mean, "unbiased": unbiased}
    kept, ddof = np.float64(x[MASK]), int(unbiased)
    whitened = np.asarray(masked_whiten(poisoned(x), jnp.asarray(MASK), **options))
    expected = (kept - kept.mean()) / np.sqrt(kept.var(ddof=ddof) + 1e-8) + (0 if shift_mean else kept.mean())
    np.testing.assert_allclose(whitened[MASK], expected, rtol=1e-4, atol=1e-5)
    assert not np.any(whitened[~MASK])
    assert whitened[MASK].std(ddof=ddof) == pytest.approx(1, abs=1e-4)


def test_one_entry_has_no_spread():
    x, one = jnp.full((2, 3), 7.0), jnp.zeros((2, 3), bool).at[1, 2].set(True)
    assert masked_var(x, one, unbiased=True) == 0
    assert not np.any(masked_whiten(x, one, unbiased=True))


@pytest.mark.parametrize("function", [masked_sum, masked_mean, masked_var, masked_whiten])
def test_empty_mask_gives_zero(function):
    x = jnp.full((2, 3), jnp.nan)
    nothing = jnp.zeros((2, 3), bool)
    assert not np.any(function(x, nothing))
    assert not np.any(jax.grad(lambda x: function(x, nothing).sum())(x))


def test_last_true_index():
    expected = [max(np.flatnonzero(row), default=0) for row in MASK]
    np.testing.assert_array_equal(last_true_index(jnp.asarray(MASK)), expected)


def random_segments(rng, length):
    """One row of non-decreasing ids 1, 2, 3, ... with padding sprinkled anywhere."""
    ids = np.cumsum(rng.random(length) < 0.3) + 1
    return np.where(rng.random(length) < rng.choice([0.0, 0.3, 0.7]), 0, ids)


def test_positions_from_segments():
    rng = np.random.default_rng(4)
    segments = np.stack([random_segments(rng, 12) for _ in range(300)]).astype(np.int32)
    positions = np.asarray(positions_from_segments(jnp.asarray(segments)))
    assert positions.min() >= 0
    assert positions.max() < 12
    for row, found in zip(segments, positions, strict=True):
        seen = dict.fromkeys(row, 0)
        for segment, position in zip(row, found, strict=True):
            if segment:
                assert position == seen[segment], (row, found)
                seen[segment] += 1


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([1, 1, 1, 1, 1], [0, 1, 2, 3, 4]),
        ([0, 0, 1, 1, 1], [0, 0, 0, 1, 2]),
        ([1, 1, 1, 0, 0], [0, 1, 2, 2, 2]),
        ([1, 0, 1, 0, 1], [0, 0, 1, 1, 2]),
        ([1, 1, 2, 2, 3], [0, 1, 0, 1, 0]),
        ([0, 2, 0, 2, 5], [0, 0, 0, 1, 0]),
        ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
    ],
)
def test_positions_examples(segments, expected):
    np.testing.assert_array_equal(positions_from_segments(jnp.asarray([segments])), [expected])
