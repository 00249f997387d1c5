"""Best-of-n against enumeration: every subset of a pool, every n-tuple of outcomes, and draws."""

import itertools
from math import comb, log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functional.ragged import normals

from rlhf_jax.functional import best_of_n_kl, best_of_n_logprobs, best_of_n_mean, best_of_n_weights, exact_kl

POOL = 8
SCORES = np.stack([normals(0, POOL), np.array([1, 0, 1, 2, 0, 2, 2, 1], np.float32), np.ones(POOL, np.float32)])
"""Distinct, with ties in groups of two and three, and all equal."""
VALUES = normals(1, 3, POOL)


def mean_over_subsets(scores, values, n):
    """The bests of every subset of n, those of equal score with equal shares."""
    total = 0.0
    for subset in itertools.combinations(range(len(scores)), n):
        best = [i for i in subset if scores[i] == max(scores[j] for j in subset)]
        total += np.mean([values[i] for i in best])
    return total / comb(len(scores), n)


MEAN = jax.jit(best_of_n_mean, static_argnames="num_samples")
WEIGHTS = jax.jit(best_of_n_weights, static_argnames="num_samples")
LAW = jax.jit(best_of_n_logprobs)


@pytest.mark.parametrize("n", [1, 2, 5, POOL])
def test_pool_estimate_is_the_mean_over_all_subsets(n):
    expected = [mean_over_subsets(s, v, n) for s, v in zip(SCORES, VALUES, strict=True)]
    np.testing.assert_allclose(MEAN(SCORES, VALUES, num_samples=n), expected, atol=2e-6)


def test_ties_are_what_keeping_the_first_in_random_order_gives():
    scores, rng, n = SCORES[1], np.random.default_rng(0), 3
    orders = rng.permuted(np.tile(np.arange(POOL), (60_000, 1)), axis=1)[:, :n]
    kept = orders[np.arange(len(orders)), np.argmax(scores[orders], axis=1)]
    frequencies = np.bincount(kept, minlength=POOL) / len(orders)
    weights = WEIGHTS(scores[None], num_samples=n)[0]
    np.testing.assert_allclose(weights, frequencies, atol=4 * 0.5 / 60_000**0.5)
    for value in (0, 1, 2):
        assert len(np.unique(np.asarray(weights)[scores == value])) == 1


@pytest.mark.parametrize("n", [7, 64])
def test_a_pool_of_4096_is_exact(n):
    """Python's integers know no rounding."""
    pool = 4096
    order = np.random.default_rng(2).permutation(pool)
    weights = np.asarray(WEIGHTS(np.float32(order[None]), num_samples=n))[0]
    expected = np.array([comb(i, n - 1) / comb(pool, n) for i in range(pool)])[order]
    np.testing.assert_allclose(weights, expected, rtol=2e-7, atol=1e-37)
    assert float(weights.sum(dtype=np.float64)) == pytest.approx(1.0, abs=1e-6)


def test_the_estimate_is_unbiased_and_drawing_with_replacement_is_not():
    """Pools of 16 uniform samples: the best of 8 is 8/9 on average."""
    pools, n = jax.random.uniform(jax.random.key(0), (20_000, 16)), 8
    estimates = np.asarray(MEAN(pools, pools, num_samples=n), np.float64)
    error = estimates.std(ddof=1) / len(estimates) ** 0.5
    assert abs(estimates.mean() - n / (n + 1)) < 3 * error
    places = np.arange(1, 17) / 16
    again = np.sort(np.asarray(pools), axis=1) @ (places**n - (places - 1 / 16) ** n)
    assert abs(again.mean() - n / (n + 1)) > 10 * error


def test_a_pool_too_small_is_refused():
    for n in (0, POOL + 1):
        with pytest.raises(ValueError, match=rf"num_samples must be within \[1.0, {POOL}.0\], got {n}"):
            best_of_n_weights(jnp.asarray(SCORES), num_samples=n)
    for call in (
        best_of_n_kl,
        lambda num_samples: best_of_n_logprobs(*[jnp.zeros((1, 2))] * 2, num_samples=num_samples),
    ):
        with pytest.raises(ValueError, match="num_samples must be at least 1"):
            call(num_samples=0)


LOGITS = np.float64(normals(3, 3, 5))
PROBS = np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True)
OUTCOME_SCORES = np.stack([normals(4, 5), np.float32([0, 1, 1, 0, 2]), np.zeros(5, np.float32)])


def law_by_tuples(probs, scores, n):
    """Every way to draw n outcomes, the first of the best kept."""
    law = np.zeros(len(probs))
    for draw in itertools.product(range(len(probs)), repeat=n):
        law[max(draw, key=lambda i: scores[i])] += np.prod(probs[list(draw)])
    return law


@pytest.mark.parametrize("n", [1, 2, 4])
def test_law_is_that_of_all_draws(n):
    found = LAW(np.float32(np.log(PROBS)), OUTCOME_SCORES, num_samples=n)
    expected = [law_by_tuples(p, s, n) for p, s in zip(PROBS, OUTCOME_SCORES, strict=True)]
    np.testing.assert_allclose(np.exp(found), expected, rtol=2e-5)


def test_law_of_impossible_outcomes_and_of_certain_ones():
    logprobs = np.float32([[-np.inf, np.log(0.5), np.log(0.5), -np.inf, -np.inf]])
    found = LAW(logprobs, np.arange(5, dtype=np.float32)[None], num_samples=3)
    np.testing.assert_allclose(np.exp(found), [[0, 1 / 8, 7 / 8, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(LAW(logprobs, np.arange(5, dtype=np.float32)[None], num_samples=1), logprobs, atol=1e-6)


@jax.jit
def kl_of_best(logits, scores, n):
    logprobs = jax.nn.log_softmax(logits)[None]
    return exact_kl(best_of_n_logprobs(logprobs, scores[None], num_samples=n), logprobs)[0]


@pytest.mark.parametrize("n", [2, 8, 64])
def test_closed_form_bounds_the_kl_and_many_outcomes_reach_it(n):
    few, many = (np.random.default_rng(size).normal(size=(2, size)).astype(np.float32) for size in (20, 20_000))
    bound = float(best_of_n_kl(n))
    assert bound == pytest.approx(log(n) - (n - 1) / n, rel=1e-5)
    assert kl_of_best(*few, n) < 0.99 * bound
    assert kl_of_best(*many, n) == pytest.approx(bound, rel=0.01)
    assert kl_of_best(many[0], np.sign(many[1]), n) < log(2) + 0.05  # two values, about equally likely


def test_closed_form_of_many_n_at_once():
    np.testing.assert_allclose(best_of_n_kl(jnp.asarray([1, 2, 4])), [0, log(2) - 0.5, log(4) - 0.75], atol=1e-6)
