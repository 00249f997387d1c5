"""PPO's two losses against loops, and where their gradients stop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functional.ragged import MASK, B, T, normals, poisoned

from rlhf_jax.functional import (
    cispo_loss,
    clipped_policy_loss,
    clipped_sequence_loss,
    clipped_value_loss,
    gspo_loss,
    reinforce_loss,
)

OLD, ADVANTAGES = normals(0, B, T), normals(1, B, T)
LOGPROBS = OLD + 0.4 * normals(2, B, T)
policy_gradient = jax.jit(jax.grad(lambda *arguments, **options: clipped_policy_loss(*arguments, **options).sum()))
value_gradient = jax.jit(jax.grad(lambda *arguments, **options: clipped_value_loss(*arguments, **options).sum()))


def as_arrays(*arrays):
    return [jnp.asarray(x, jnp.float32) for x in arrays]


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (1, 0.1), (0.0, 0.0)])
def test_policy_loss(low, high):
    expected = np.zeros((B, T))
    for index in np.ndindex(B, T):
        ratio = np.exp(np.float64(LOGPROBS[index]) - OLD[index])
        advantage = ADVANTAGES[index]
        expected[index] = -min(advantage * ratio, advantage * min(max(ratio, 1 - low), 1 + high))
    found = clipped_policy_loss(*as_arrays(LOGPROBS, OLD, ADVANTAGES), clip_low=low, clip_high=high)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_on_policy_it_is_the_policy_gradient():
    old, advantages = as_arrays(OLD, ADVANTAGES)
    np.testing.assert_array_equal(clipped_policy_loss(old, old, advantages), -advantages)
    np.testing.assert_allclose(policy_gradient(old, old, advantages), -advantages, rtol=1e-6)


def test_gradient_is_zero_exactly_where_the_clip_holds():
    arguments = as_arrays(LOGPROBS, OLD, ADVANTAGES)
    ratio = np.exp(LOGPROBS - OLD)
    stopped = ((ADVANTAGES > 0) & (ratio > 1.28)) | ((ADVANTAGES < 0) & (ratio < 0.9))
    assert 3 < stopped.sum() < B * T - 3
    found = policy_gradient(*arguments, clip_low=0.1, clip_high=0.28)
    np.testing.assert_allclose(found, np.where(stopped, 0, -ADVANTAGES * ratio), rtol=1e-5)


@pytest.mark.parametrize("log_ratio", [-1e4, 1e4])
def test_a_wild_ratio_stays_finite(log_ratio):
    arguments = as_arrays([[log_ratio, log_ratio]], [[0, 0]], [[1, -1]])
    assert np.all(np.isfinite(clipped_policy_loss(*arguments)))
    assert np.all(np.isfinite(policy_gradient(*arguments)))
    assert np.abs(clipped_policy_loss(*arguments)).max() < 1.001 * np.exp(20)


@pytest.mark.parametrize("clip", [0.2, 0.0, 1, np.inf])
def test_value_loss(clip):
    values, old, returns = normals(3, B, T), normals(4, B, T), normals(5, B, T)
    expected = np.zeros((B, T))
    for index in np.ndindex(B, T):
        clipped = min(max(values[index], old[index] - clip), old[index] + clip)
        expected[index] = 0.5 * max((values[index] - returns[index]) ** 2, (clipped - returns[index]) ** 2)
    found = clipped_value_loss(*as_arrays(values, old, returns), clip=clip)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_value_gradient_is_the_error_until_the_clip_holds():
    """V_old = 0, clip 0.2, target 1: pulled while below 0.2, free beyond, pulled from below."""
    values, old, returns = as_arrays([[0.0, 0.1, 0.3, 0.9, -0.3]], [[0.0] * 5], [[1.0] * 5])
    np.testing.assert_allclose(value_gradient(values, old, returns), [[-1, -0.9, 0, 0, -1.3]], rtol=1e-6)


def test_value_loss_at_the_old_values_is_half_the_squared_error():
    old, returns = as_arrays(OLD, ADVANTAGES)
    np.testing.assert_allclose(clipped_value_loss(old, old, returns), 0.5 * (OLD - ADVANTAGES) ** 2, rtol=1e-5)


def test_dual_clip_bounds_bad_tokens_that_became_likely():
    arguments = as_arrays(OLD + 4 * normals(2, B, T), OLD, ADVANTAGES)
    plain, bounded = clipped_policy_loss(*arguments), clipped_policy_loss(*arguments, dual_clip=3.0)
    ratio = np.exp(np.float64(arguments[0]) - OLD)
    far = (ADVANTAGES < 0) & (ratio > 3)
    assert 3 < far.sum() < B * T - 3
    np.testing.assert_allclose(bounded, np.where(far, -3 * ADVANTAGES, plain), rtol=1e-6)
    assert not np.any(np.asarray(policy_gradient(*arguments, dual_clip=3.0))[far])
    assert np.all(np.asarray(policy_gradient(*arguments))[far])


def gspo_by_sequence(logprobs, advantages, low, high):
    """The paper's sequence form (eq. 5), row by row in plain jax: mean over the rows' tokens of a loss per row."""
    total = 0.0
    for b in range(B):
        kept = np.flatnonzero(MASK[b])
        if kept.size:
            ratio = jnp.exp((logprobs[b, kept] - OLD[b, kept]).mean())
            clipped = jnp.clip(ratio, 1 - low, 1 + high)
            total = total + jnp.maximum(-advantages[b] * ratio, -advantages[b] * clipped)
    return total


def test_gspo_is_the_sequence_form():
    """Value and gradient, with an advantage per row; rows with holes and padding, clipped and unclipped ones."""
    logprobs, rows = jnp.asarray(OLD + 0.01 * normals(2, B, T)), jnp.asarray(ADVANTAGES[:, 0])
    options = {"clip_low": 0.002, "clip_high": 0.003}

    def by_tokens(logprobs):
        advantages = jnp.broadcast_to(rows[:, None], (B, T))
        losses = gspo_loss(logprobs, jnp.asarray(OLD), advantages, jnp.asarray(MASK), **options)
        return (losses.sum(axis=1) / np.maximum(MASK.sum(axis=1), 1)).sum()

    value, gradient = jax.value_and_grad(by_tokens)(logprobs)
    expected, by_hand = jax.value_and_grad(lambda x: gspo_by_sequence(x, rows, 0.002, 0.003))(logprobs)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-5, atol=1e-7)
    stopped = [not np.any(row) for row, kept in zip(np.asarray(gradient), MASK, strict=True) if kept.any()]
    assert any(stopped)
    assert not all(stopped)


def test_a_completion_s_ratio_is_the_product_of_its_tokens():
    """Value and gradient against a loop over rows; at the old policy the gradient is REINFORCE's."""
    logprobs, rows = jnp.asarray(OLD + 0.05 * normals(2, B, T)), jnp.asarray(ADVANTAGES[:, 0])
    broadcast = jnp.broadcast_to(rows[:, None], (B, T))
    options = {"clip_low": 0.1, "clip_high": 0.05}

    def by_tokens(logprobs, **options):
        return clipped_sequence_loss(logprobs, jnp.asarray(OLD), broadcast, jnp.asarray(MASK), **options).sum()

    def by_rows(logprobs):
        total = 0.0
        for b in range(B):
            kept = np.flatnonzero(MASK[b])
            if kept.size:
                ratio = jnp.prod(jnp.exp(logprobs[b, kept] - OLD[b, kept]))
                total = total + jnp.maximum(-rows[b] * ratio, -rows[b] * jnp.clip(ratio, 0.9, 1.05))
        return total

    value, gradient = jax.value_and_grad(by_tokens)(logprobs, **options)
    expected, by_hand = jax.value_and_grad(by_rows)(logprobs)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, by_hand, rtol=1e-5, atol=1e-6)
    stopped = [not np.any(row) for row, kept in zip(np.asarray(gradient), MASK, strict=True) if kept.any()]
    assert any(stopped)
    assert not all(stopped)
    at_the_start = jax.grad(by_tokens)(jnp.asarray(OLD))
    np.testing.assert_allclose(at_the_start, np.where(MASK, -ADVANTAGES[:, :1], 0), rtol=1e-5, atol=1e-6)


def test_cispo_weighs_and_never_drops():
    logprobs, old, advantages = as_arrays(OLD + 2 * normals(2, B, T), OLD, ADVANTAGES)
    weight = np.minimum(np.exp(np.float64(logprobs) - OLD), 2.0)
    assert 3 < (weight == 2.0).sum() < B * T - 3
    value, gradient = jax.value_and_grad(lambda x: cispo_loss(x, old, advantages, max_ratio=2.0).sum())(logprobs)
    np.testing.assert_allclose(value, np.sum(-weight * ADVANTAGES * np.float64(logprobs)), rtol=1e-4)
    np.testing.assert_allclose(gradient, -weight * ADVANTAGES, rtol=1e-5)


def test_reinforce_is_minus_advantage_times_logprob():
    logprobs, old, advantages = as_arrays(LOGPROBS, OLD, ADVANTAGES)
    np.testing.assert_allclose(reinforce_loss(logprobs, old, advantages), -ADVANTAGES * LOGPROBS, rtol=1e-6)
    slope = jax.grad(lambda x: reinforce_loss(x, old, advantages).sum())(logprobs)
    np.testing.assert_allclose(slope, -ADVANTAGES, rtol=1e-6)


@pytest.mark.parametrize("loss_fn", [clipped_policy_loss, cispo_loss, reinforce_loss, gspo_loss, clipped_sequence_loss])
def test_a_mask_keeps_what_is_outside_out(loss_fn):
    """All policy losses are called alike; NaN outside the mask reaches neither value nor gradient."""
    mask = jnp.asarray(MASK)
    clean = [jnp.where(mask, x, 0.0) for x in as_arrays(LOGPROBS, OLD, ADVANTAGES)]
    dirty = [poisoned(x) for x in (LOGPROBS, OLD, ADVANTAGES)]
    for arguments in (clean, dirty):
        losses, slopes = loss_fn(*arguments, mask=mask), jax.grad(lambda *x: loss_fn(*x, mask=mask).sum())(*arguments)
        assert np.all(np.asarray(losses)[~MASK] == 0)
        assert np.all(np.asarray(slopes)[~MASK] == 0)
        assert np.all(np.isfinite(losses))
        assert np.any(np.asarray(losses))
    np.testing.assert_array_equal(loss_fn(*clean, mask=mask), loss_fn(*dirty, mask=mask))
