"""Shaped rewards against a loop, and the two penalties for completions that never ended."""

import jax.numpy as jnp
import numpy as np
import pytest
from functional.ragged import MASK, B, T, normals, poisoned

from rlhf_jax.functional import (
    gae,
    normalize_scores,
    replace_missing_eos,
    shape_rewards,
    subtract_missing_eos,
)
from rlhf_jax.functional.rewards import subtract_overlong

SCORES, LOGPROBS, REF_LOGPROBS = normals(0, B), normals(1, B, T), normals(2, B, T)
ENDED = np.array([True, False, True, False, True, False])


def shaped(kl_coef):
    return shape_rewards(
        jnp.asarray(SCORES), poisoned(LOGPROBS), poisoned(REF_LOGPROBS), jnp.asarray(MASK), kl_coef=kl_coef
    )


def test_shape_rewards():
    expected = np.zeros((B, T))
    for b in range(B):
        kept = np.flatnonzero(MASK[b])
        for t in kept:
            expected[b, t] = -0.3 * (LOGPROBS[b, t] - REF_LOGPROBS[b, t])
        if len(kept):
            expected[b, kept[-1]] += SCORES[b]
    np.testing.assert_allclose(shaped(0.3), expected, rtol=1e-5, atol=1e-6)


def test_without_a_leash_the_score_stands_alone_on_the_last_token():
    rewards = np.asarray(shaped(0.0))
    for b in range(B):
        kept = np.flatnonzero(MASK[b])
        np.testing.assert_array_equal(rewards[b, kept[-1:]], SCORES[b : b + 1][: len(kept)])
        assert np.count_nonzero(rewards[b]) == min(len(kept), 1)


def test_rewards_add_up_to_score_minus_leash():
    total = shaped(0.3).sum(axis=1)
    leash = 0.3 * ((LOGPROBS - REF_LOGPROBS) * MASK).sum(1)
    np.testing.assert_allclose(total, np.where(MASK.any(1), SCORES - leash, 0), rtol=1e-4, atol=1e-5)


def test_poison_stops_at_the_mask_all_the_way_to_the_advantages():
    advantages, _ = gae(shaped(0.3), jnp.zeros((B, T)), jnp.asarray(MASK))
    assert np.all(np.isfinite(advantages))


def test_subtract_missing_eos():
    scores, ended = jnp.asarray(SCORES), jnp.asarray(ENDED)
    np.testing.assert_allclose(subtract_missing_eos(scores, ended), SCORES - ~ENDED, rtol=1e-6)
    np.testing.assert_allclose(subtract_missing_eos(scores, ended, penalty=3.0), SCORES - 3.0 * ~ENDED, rtol=1e-6)
    np.testing.assert_array_equal(subtract_missing_eos(scores, ended, penalty=0), SCORES)


def test_replace_missing_eos():
    scores, ended = jnp.asarray(SCORES), jnp.asarray(ENDED)
    np.testing.assert_array_equal(replace_missing_eos(scores, ended), np.where(ENDED, SCORES, -1))
    np.testing.assert_array_equal(replace_missing_eos(scores, ended, value=-7), np.where(ENDED, SCORES, -7))


def test_normalize_scores():
    scores = jnp.asarray(5 + 3 * SCORES)
    whitened = normalize_scores(scores, mean=scores.mean(), std=scores.std())
    assert whitened.mean() == pytest.approx(0, abs=1e-5)
    assert whitened.std() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(normalize_scores(scores, mean=5.0, std=1.0), 3 * SCORES, rtol=1e-4, atol=1e-5)


def test_overlong_penalty_is_dapos_three_pieces():
    lengths, limit, buffer = np.arange(25), 20, 8
    expected = []
    for length in lengths:
        if length <= limit - buffer:
            expected.append(0.0)
        elif length <= limit:
            expected.append((limit - buffer - length) / buffer)
        else:
            expected.append(-1.0)
    found = subtract_overlong(jnp.full(25, 0.5), jnp.asarray(lengths), max_length=limit, buffer=buffer)
    np.testing.assert_allclose(found, 0.5 + np.array(expected), rtol=1e-6, atol=1e-6)
    halved = subtract_overlong(jnp.zeros(25), jnp.asarray(lengths), max_length=limit, buffer=buffer, penalty=0.5)
    np.testing.assert_allclose(halved, 0.5 * np.array(expected), rtol=1e-6, atol=1e-6)
