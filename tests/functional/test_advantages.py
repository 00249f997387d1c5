"""GAE against the definition's double loop, its special cases, rows with their padding cut out; and group baselines."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functional.ragged import MASK, B, T, normals, poisoned

from rlhf_jax.functional import (
    batch_relative,
    gae,
    group_relative,
    leave_one_out,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    rewards_to_go,
    standardize,
    zero_spread,
)

REWARDS, VALUES = normals(0, B, T), normals(1, B, T)
jitted = jax.jit(gae)


def from_definition(rewards, values, discount, gae_lambda):
    """A_t = Σ_k (γλ)^k δ_{t+k} of one row without padding, in float64."""
    rewards, values = np.float64(rewards), np.append(np.float64(values), 0.0)
    deltas = rewards + discount * values[1:] - values[:-1]
    length = len(rewards)
    return [sum((discount * gae_lambda) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]


@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.7), (1, 1), (0.8, 0), (0, 0.5)])
def test_equals_the_definition_on_compacted_rows(discount, gae_lambda):
    advantages, returns = jitted(
        poisoned(REWARDS), poisoned(VALUES), jnp.asarray(MASK), discount=discount, gae_lambda=gae_lambda
    )
    expected = np.zeros((B, T))
    for b in range(B):
        kept = MASK[b]
        expected[b, kept] = from_definition(REWARDS[b, kept], VALUES[b, kept], discount, gae_lambda)
    np.testing.assert_allclose(advantages, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(MASK, expected + VALUES, 0), rtol=1e-5, atol=1e-5)


def test_defaults_are_one_and_095():
    arguments = jnp.asarray(REWARDS), jnp.asarray(VALUES), jnp.asarray(MASK)
    explicit = jitted(*arguments, discount=1.0, gae_lambda=0.95)
    np.testing.assert_allclose(gae(*arguments), explicit, rtol=1e-6, atol=1e-6)


def test_lambda_one_is_return_to_go_minus_value():
    kept = np.where(MASK, REWARDS, 0)
    to_go = np.flip(np.cumsum(np.flip(kept, 1), 1), 1)
    advantages, returns = jitted(
        jnp.asarray(REWARDS), jnp.asarray(VALUES), jnp.asarray(MASK), discount=1.0, gae_lambda=1.0
    )
    np.testing.assert_allclose(advantages, np.where(MASK, to_go - VALUES, 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(returns, np.where(MASK, to_go, 0), rtol=1e-5, atol=1e-5)


def test_lambda_zero_is_the_td_residual():
    everywhere = jnp.ones((B, T), bool)
    advantages, _ = jitted(jnp.asarray(REWARDS), jnp.asarray(VALUES), everywhere, discount=0.9, gae_lambda=0.0)
    later = np.append(VALUES[:, 1:], np.zeros((B, 1), np.float32), axis=1)
    np.testing.assert_allclose(advantages, REWARDS + 0.9 * later - VALUES, rtol=1e-5, atol=1e-5)


def test_a_perfect_critic_leaves_no_advantage():
    everywhere = jnp.ones((B, T), bool)
    values = np.flip(np.cumsum(np.flip(REWARDS, 1), 1), 1)
    advantages, _ = jitted(jnp.asarray(REWARDS), jnp.asarray(values.copy()), everywhere, discount=1.0, gae_lambda=0.5)
    np.testing.assert_allclose(advantages, 0, atol=1e-5)


def test_hyper_parameters_can_be_vmapped():
    """As coefficients of a sweep: one program, many λ."""
    arguments = jnp.asarray(REWARDS), jnp.asarray(VALUES), jnp.asarray(MASK)
    lambdas = jnp.asarray([0.0, 0.5, 1.0])
    swept, _ = jax.vmap(lambda value: gae(*arguments, gae_lambda=value))(lambdas)
    for one, value in zip(swept, lambdas, strict=True):
        np.testing.assert_allclose(one, jitted(*arguments, discount=1.0, gae_lambda=value)[0], rtol=1e-5, atol=1e-6)


SCORES = normals(2, 12)


@pytest.mark.parametrize("group_size", [2, 3, 6])
def test_group_baselines_by_hand(group_size):
    whitened, centred, others = (np.zeros(12) for _ in range(3))
    for i in range(12):
        group = np.float64(SCORES[i // group_size * group_size :][:group_size])
        whitened[i] = (SCORES[i] - group.mean()) / (group.std(ddof=1) + 1e-4)
        centred[i] = SCORES[i] - group.mean()
        others[i] = SCORES[i] - (group.sum() - SCORES[i]) / (group_size - 1)
    scores = jnp.asarray(SCORES)
    np.testing.assert_allclose(group_relative(scores, group_size=group_size), whitened, rtol=1e-4, atol=1e-6)
    unscaled = group_relative(scores, group_size=group_size, scale=False)
    np.testing.assert_allclose(unscaled, centred, rtol=1e-4, atol=1e-6)
    found = leave_one_out(scores, group_size=group_size)
    np.testing.assert_allclose(found, others, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(unscaled, found * (group_size - 1) / group_size, rtol=1e-4, atol=1e-6)


def test_one_spread_for_the_whole_batch():
    """Of the scores as they are, or of what is standardised; nothing where all are equal."""
    scores, spread = jnp.asarray(SCORES), np.float64(SCORES).std(ddof=1)
    centred = np.float64(SCORES) - np.repeat(np.float64(SCORES).reshape(4, 3).mean(axis=1), 3)
    np.testing.assert_allclose(batch_relative(scores, group_size=3), centred / (spread + 1e-4), rtol=1e-4, atol=1e-6)
    expected = (np.float64(SCORES) - SCORES.mean()) / (spread + 0.5)
    np.testing.assert_allclose(standardize(scores, eps=0.5), expected, rtol=1e-4, atol=1e-6)
    for function in (partial(batch_relative, group_size=3), standardize):
        flat, slope = function(jnp.full(6, 0.5)), jax.grad(lambda x, f=function: f(x)[0])(jnp.full(6, 0.5))
        assert not np.any(flat)
        assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("scale", [True, False])
def test_a_group_of_equal_scores_teaches_nothing(scale):
    scores = jnp.asarray([0.7, 0.7, 0.7, 0.0, 1.0, 0.0])

    def total(scores):
        return jnp.vdot(group_relative(scores, group_size=3, scale=scale), jnp.arange(6.0))

    np.testing.assert_allclose(group_relative(scores, group_size=3, scale=scale)[:3], 0, atol=1e-3)
    assert np.all(np.isfinite(jax.grad(total)(scores)))


def test_groups_must_divide_the_batch():
    for function in (group_relative, leave_one_out):
        with pytest.raises(ValueError, match="group_size must be a divisor of the number of scores, 12: got 5"):
            function(jnp.asarray(SCORES), group_size=5)


def loop_to_go(discount):
    """Rewards-to-go of the compacted rows, in float64; NaN where no token is."""
    expected = np.full((B, T), np.nan)
    for b in range(B):
        kept = np.flatnonzero(MASK[b])
        for place, t in enumerate(kept):
            expected[b, t] = sum(discount**k * np.float64(REWARDS[b, s]) for k, s in enumerate(kept[place:]))
    return expected


@pytest.mark.parametrize("discount", [1.0, 0.8])
def test_rewards_to_go_and_their_whitened_form(discount):
    """REINFORCE++ has one mean and one standard deviation over the tokens of all rows."""
    expected = loop_to_go(discount)
    found = rewards_to_go(poisoned(REWARDS), jnp.asarray(MASK), discount=discount)
    np.testing.assert_allclose(found, np.nan_to_num(expected), rtol=1e-5, atol=1e-5)
    white = np.nan_to_num((expected - np.nanmean(expected)) / np.nanstd(expected))
    found = reinforce_plus_plus(poisoned(REWARDS), jnp.asarray(MASK), discount=discount)
    np.testing.assert_allclose(found, white, rtol=1e-4, atol=1e-5)


def test_reinforce_plus_plus_baseline_takes_the_group_first():
    sums = np.where(MASK, REWARDS, 0).sum(axis=1, dtype=np.float64).reshape(2, 3)
    centred = (sums - sums.mean(axis=1, keepdims=True)).ravel()
    tokens = np.repeat(centred, MASK.sum(axis=1))
    expected = np.where(MASK, (centred[:, None] - tokens.mean()) / tokens.std(), 0)
    found = reinforce_plus_plus_baseline(poisoned(REWARDS), jnp.asarray(MASK), group_size=3)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_zero_spread_is_exact_equality_within_a_group():
    scores = jnp.asarray([1.0, 1.0, 1.0, 1.0 + 1e-6, 0.0, 0.0])
    assert zero_spread(scores, group_size=2).tolist() == [True, True, False, False, True, True]
    assert zero_spread(scores, group_size=3).tolist() == [True] * 3 + [False] * 3
