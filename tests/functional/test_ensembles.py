"""Rules over members' scores against numpy, and what each promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functional.ragged import normals

from rlhf_jax.functional import ensemble_mean, normalize_members, uncertainty_weighted, worst_case

M, B = 5, 7
SCORES = normals(0, M, B)


def test_rules_are_numpys():
    scores = jnp.asarray(SCORES)
    np.testing.assert_allclose(ensemble_mean(scores), SCORES.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(worst_case(scores), SCORES.min(0))
    for unbiased in (False, True):
        expected = SCORES.mean(0) - 0.5 * np.var(SCORES, axis=0, ddof=int(unbiased))
        np.testing.assert_allclose(uncertainty_weighted(scores, coef=0.5, unbiased=unbiased), expected, rtol=1e-5)


def test_the_two_published_variances_differ_by_their_divisor():
    """lambda with the unbiased variance is lambda M / (M - 1) with the biased one."""
    scores = jnp.asarray(SCORES)
    biased = uncertainty_weighted(scores, coef=0.4 * M / (M - 1))
    np.testing.assert_allclose(uncertainty_weighted(scores, coef=0.4, unbiased=True), biased, rtol=1e-5, atol=1e-6)
    assert np.abs(uncertainty_weighted(scores, coef=0.4) - biased).max() > 0.01


def test_members_that_agree_are_one_member():
    same = jnp.tile(jnp.asarray(SCORES[:1]), (M, 1))
    for rule in (ensemble_mean, worst_case, uncertainty_weighted):
        np.testing.assert_allclose(rule(same), SCORES[0], rtol=1e-6)


def test_caution_never_raises_a_score():
    scores = jnp.asarray(SCORES)
    assert np.all(worst_case(scores) < ensemble_mean(scores))
    assert np.all(uncertainty_weighted(scores, coef=0.1) < ensemble_mean(scores))
    np.testing.assert_allclose(uncertainty_weighted(scores, coef=0.0), ensemble_mean(scores), rtol=1e-6)


def test_uncertainty_pulls_outliers_down_most():
    """d/ds_m of mean - c var is (1 - 2 c (s_m - mean)) / M."""
    found = jax.grad(lambda x: uncertainty_weighted(x, coef=0.3).sum())(jnp.asarray(SCORES))
    np.testing.assert_allclose(found, (1 - 0.6 * (SCORES - SCORES.mean(0))) / M, rtol=1e-4, atol=1e-6)


def test_a_loud_member_decides_until_members_are_normalised():
    quiet = SCORES.astype(np.float64)
    loud = quiet * np.array([1, 1, 1, 1, 100.0])[:, None] + np.array([0, 3, -7, 1, 1000.0])[:, None]

    def normalised(scores):
        scores = jnp.asarray(scores, jnp.float32)
        return normalize_members(scores, scores.mean(1), scores.std(1))

    assert np.argmax(ensemble_mean(jnp.asarray(loud, jnp.float32))) == np.argmax(quiet[4])
    np.testing.assert_allclose(normalised(loud), normalised(quiet), atol=1e-4)
    expected = (quiet - quiet.mean(1, keepdims=True)) / quiet.std(1, keepdims=True)
    np.testing.assert_allclose(normalised(quiet), expected, rtol=1e-4, atol=1e-5)


def test_a_member_that_tells_nothing_apart_counts_nothing():
    scores = jnp.asarray([[1.0, 2.0], [5.0, 5.0]])
    found = normalize_members(scores, jnp.asarray([1.5, 5.0]), jnp.asarray([0.5, 0.0]))
    np.testing.assert_array_equal(found, [[-1, 1], [0, 0]])
    gradient = jax.grad(lambda x: normalize_members(x, jnp.asarray([1.5, 5.0]), jnp.asarray([0.5, 0.0])).sum())(scores)
    np.testing.assert_array_equal(gradient, [[2, 2], [0, 0]])


def test_one_member_has_no_unbiased_variance():
    with pytest.raises(ValueError, match="num_members must be at least 2"):
        uncertainty_weighted(jnp.ones((1, 3)), unbiased=True)
    np.testing.assert_array_equal(uncertainty_weighted(jnp.ones((1, 3))), 1)
