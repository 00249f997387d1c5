"""Combinations of named rewards against loops of numpy, and a constrained problem whose multiplier is known otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from functional.ragged import normals
from scipy.optimize import minimize

import rlhf_jax.functional as floor
from rlhf_jax.functional import (
    dual_ascent,
    group_relative,
    lagrangian_reward,
    reinforce_plus_plus_baseline,
    weighted_sum,
    worst_of,
    zero_spread,
)

fill_missing = jax.jit(floor.fill_missing, static_argnames="group_size")
normalize_rewards = jax.jit(floor.normalize_rewards, static_argnames=("group_size", "eps"))

N, B, G = 3, 12, 4
SCORES = normals(0, N, B) * np.float32([[1], [100], [0.01]]) + np.float32([[5], [-300], [0]])
MASK = np.ones((N, B), bool)
MASK[0, 2] = MASK[1, 7] = MASK[1, 2] = False
MASK[2, 8:11] = False
KEPT = MASK.all(axis=0)
POISONED = jnp.where(MASK, SCORES, np.nan)


def test_by_weights():
    weights = np.float32([2.0, -0.5, 10.0])
    expected = [sum(weights[n] * SCORES[n, b] for n in range(N)) if KEPT[b] else 0.0 for b in range(B)]
    np.testing.assert_allclose(weighted_sum(POISONED, jnp.asarray(weights), jnp.asarray(MASK)), expected, rtol=1e-5)


@pytest.mark.parametrize("group_size", [None, G])
def test_normalised_each_on_its_own_scale_without_the_completions_that_lack_one(group_size):
    found = normalize_rewards(POISONED, jnp.asarray(MASK), group_size=group_size, eps=1e-6)
    expected = np.zeros((N, B))
    for rows in np.arange(B).reshape(-1, group_size or B):
        rows = rows[KEPT[rows]]
        for n in range(N):
            values = SCORES[n, rows].astype(np.float64)
            if len(rows) > 1:
                expected[n, rows] = (values - values.mean()) / (values.std(ddof=1) + 1e-6)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-4)
    if group_size is None:
        np.testing.assert_allclose(np.abs(found).sum(axis=1), np.abs(found).sum(axis=1)[0], rtol=0.5)  # no loudest


def test_normalised_then_summed_is_not_summed_then_normalised():
    """Two rewards of which one varies a hundred times as much: only the first form lets both decide."""
    scores, mask = jnp.asarray([[0.0, 1.0, 0.0, 1.0], [100.0, 0.0, 0.0, 100.0]]), jnp.ones((2, 4), bool)
    ones, first = jnp.ones(2), normalize_rewards(scores, mask)
    np.testing.assert_allclose(weighted_sum(first, ones, mask), [0, 0, -np.sqrt(3), np.sqrt(3)], atol=2e-3)
    last = normalize_rewards(weighted_sum(scores, ones, mask)[None], mask[:1])[0]
    assert np.asarray(last)[0] > 0.8
    assert np.asarray(last)[1] < -0.8


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6 / 3])
def test_a_constant_reward_gives_exactly_0(constant):
    """Rounding of a mean over a tiny spread must not become a reward; its gradient is 0, not NaN."""
    scores = jnp.full((1, 7), constant, jnp.float32)
    gradient = jax.jit(
        jax.grad(lambda x: jnp.vdot(normalize_rewards(x, jnp.ones((1, 7), bool)), jnp.arange(7.0)[None]))
    )
    np.testing.assert_array_equal(normalize_rewards(scores, jnp.ones((1, 7), bool)), 0)
    np.testing.assert_array_equal(gradient(scores), 0)


def test_worst_of():
    expected = [min(SCORES[n, b] for n in range(N)) if KEPT[b] else 0.0 for b in range(B)]
    np.testing.assert_array_equal(worst_of(POISONED, jnp.asarray(MASK)), np.float32(expected))


def test_missing_scores_move_no_baseline():
    scores = normals(1, B)
    mask = np.ones(B, bool)
    mask[[1, 6, 7]] = mask[8:] = False
    filled = np.asarray(fill_missing(jnp.where(mask, scores, np.nan), jnp.asarray(mask), group_size=G))
    np.testing.assert_array_equal(filled[mask], scores[mask])
    found = np.asarray(group_relative(jnp.asarray(filled), group_size=G, scale=False))
    for start in (0, 4):
        rows = np.arange(start, start + G)
        rows = rows[mask[rows]]
        np.testing.assert_allclose(found[rows], scores[rows] - scores[rows].mean(), atol=1e-6)
        scaled = np.asarray(group_relative(jnp.asarray(filled), group_size=G, eps=1e-9))[rows]
        factor = np.sqrt((len(rows) - 1) / (G - 1))
        np.testing.assert_allclose(scaled, found[rows] / scores[rows].std(ddof=1) / factor, rtol=1e-4)
    np.testing.assert_allclose(filled[8:], scores[mask].mean(), rtol=1e-5)  # a group without any
    np.testing.assert_allclose(fill_missing(jnp.asarray(filled), jnp.zeros(B, bool)), 0)
    tokens = jnp.asarray(np.repeat(mask[:, None], 2, axis=1))
    rewards = jnp.stack([jnp.asarray(filled), jnp.zeros(B)], axis=1)
    whitened = np.asarray(reinforce_plus_plus_baseline(rewards, tokens, group_size=G))
    np.testing.assert_allclose(whitened[mask].std(), 1, rtol=1e-4)
    np.testing.assert_array_equal(whitened[~mask], 0)


@pytest.mark.parametrize("score", [0.1, 0.7, 1.1])
def test_a_group_of_equal_scores_stays_equal(score):
    """Exactly, though the mean of some of them is not."""
    size = 12
    scores, mask = jnp.full(2 * size, score, jnp.float32), jnp.arange(2 * size) % size != 1
    assert zero_spread(fill_missing(scores, mask, group_size=size), group_size=size).all()


def test_lagrangian_is_the_difference_of_rewards_to_cost():
    """At the same leash: (r - kl) - λ (c + kl) over 1 + λ is the score minus kl (Safe RLHF puts the KL into both)."""
    rewards, costs, kl = (normals(seed, B) for seed in range(3))
    mask = jnp.asarray(np.arange(B) != 5)
    for multiplier in (0.0, 0.3, 4.0):
        both = ((rewards - kl) - multiplier * (costs + kl)) / (1 + multiplier)
        found = lagrangian_reward(jnp.asarray(rewards), jnp.asarray(costs), mask, multiplier=multiplier) - kl
        np.testing.assert_allclose(found[mask], both[mask], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        lagrangian_reward(jnp.asarray(rewards), jnp.asarray(costs), mask, multiplier=1e6),
        jnp.where(mask, -costs, 0),
        atol=1e-4,
    )


def test_dual_ascent_by_hand():
    assert float(dual_ascent(0.0, 0.5, limit=0.2)) == pytest.approx(0.1 * 0.3)
    assert float(dual_ascent(np.log(2.0), -1.0)) == pytest.approx(np.log(2.0) - 0.1 * 2)
    assert float(dual_ascent(np.log(4.9), 10.0)) == pytest.approx(np.log(5.0))


K, LEASH = 5, 0.2
REWARDS = np.array([2.0, 1.5, 1.0, 0.2, 0.0])
COSTS = np.array([1.5, 0.4, 0.3, -0.5, -1.0])
REF = np.array([0.15, 0.25, 0.2, 0.3, 0.1])


def divergence(policy):
    return float(np.sum(policy * np.log(policy / REF)))


def best(limit, leash, *, leash_in_cost):
    """The constrained problem itself, by a solver that knows no multiplier: the best policy and its value."""
    constraint = {
        "type": "ineq",
        "fun": lambda p: limit - p @ COSTS - (leash * divergence(p) if leash_in_cost else 0.0),
    }
    solved = minimize(
        lambda p: leash * divergence(p) - p @ REWARDS,
        REF,
        method="SLSQP",
        bounds=[(1e-9, 1)] * K,
        constraints=[constraint, {"type": "eq", "fun": lambda p: p.sum() - 1}],
        options={"ftol": 1e-11, "maxiter": 500},
    )
    assert solved.success
    return solved.x, -solved.fun


@jax.jit
def constrained(limit, kl_in_cost):
    """Policy gradient on the enumerated policy, the multiplier beside it, 3000 steps of each."""
    ref, optimizer = jnp.log(jnp.asarray(REF, jnp.float32)), optax.adam(0.03)

    def objective(logits, log_multiplier):
        policy = jax.nn.softmax(logits)
        kl = policy * (jax.nn.log_softmax(logits) - ref)
        multiplier = jnp.exp(log_multiplier)
        everywhere = jnp.ones(K, bool)
        scores = lagrangian_reward(
            jnp.asarray(REWARDS, jnp.float32), jnp.asarray(COSTS, jnp.float32), everywhere, multiplier=multiplier
        )
        return LEASH * kl.sum() - policy @ scores, (policy @ jnp.asarray(COSTS, jnp.float32), kl.sum())

    def step(carry, _):
        logits, opt_state, log_multiplier = carry
        gradient, (cost, kl) = jax.grad(objective, has_aux=True)(logits, log_multiplier)
        updates, opt_state = optimizer.update(gradient, opt_state)
        cost = cost + kl_in_cost * LEASH * kl
        log_multiplier = dual_ascent(log_multiplier, cost, limit=limit, learning_rate=0.05)
        return (optax.apply_updates(logits, updates), opt_state, log_multiplier), None

    start = (ref, optimizer.init(ref), jnp.zeros(()))
    (logits, _, log_multiplier), _ = jax.lax.scan(step, start, length=3000)
    return jax.nn.softmax(logits), jnp.exp(log_multiplier)


@pytest.mark.parametrize("kl_in_cost", [True, False])
def test_the_multiplier_comes_to_the_kkt_value_and_the_limit_is_met(kl_in_cost):
    """λ* is what the optimum loses per unit of the limit (envelope theorem), by differences of the solver's values."""
    limit, h = 0.1, 1e-3
    policy, multiplier = (np.asarray(x, np.float64) for x in constrained(limit, float(kl_in_cost)))
    leash = LEASH if kl_in_cost else LEASH * (1 + float(multiplier))
    values = [best(limit + sign * h, leash, leash_in_cost=kl_in_cost)[1] for sign in (1, -1)]
    expected, _ = best(limit, leash, leash_in_cost=kl_in_cost)
    np.testing.assert_allclose(policy, expected, atol=2e-3)
    assert multiplier == pytest.approx((values[0] - values[1]) / (2 * h), rel=0.01)
    assert policy @ COSTS + kl_in_cost * LEASH * divergence(policy) == pytest.approx(limit, abs=1e-3)
    unlimited = REF * np.exp(REWARDS / LEASH)
    assert unlimited @ COSTS / unlimited.sum() > 1.0  # the limit is what holds the policy back


def test_a_limit_that_does_not_bind_has_no_price():
    policy, multiplier = constrained(1.6, 0.0)
    assert float(multiplier) < 0.03
    unlimited = REF * np.exp(REWARDS / LEASH)
    np.testing.assert_allclose(policy, unlimited / unlimited.sum(), atol=0.02)
