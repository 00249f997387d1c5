"""Log-probabilities and entropies against float64 loops, and where they stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from functional.ragged import MASK, B, T, normals, poisoned

from rlhf_jax.functional import entropy, sequence_logprobs, token_logprobs

V = 5
LOGITS = 2 * normals(0, B, T, V)
TOKENS = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)


def law(logits, temperature):
    """log softmax in float64."""
    scaled = np.float64(logits) / temperature
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2])
def test_token_logprobs(temperature):
    expected = np.zeros((B, T))
    for b in range(B):
        for t in range(1, T):
            expected[b, t] = law(LOGITS[b, t - 1], temperature)[TOKENS[b, t]]
    found = token_logprobs(jnp.asarray(LOGITS), jnp.asarray(TOKENS), temperature=temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[:, 0], 0)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2])
def test_entropy(temperature):
    laws = law(LOGITS, temperature)
    expected = np.zeros((B, T))
    expected[:, 1:] = -(np.exp(laws) * laws).sum(-1)[:, :-1]
    found = entropy(jnp.asarray(LOGITS), temperature=temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_entropy_is_the_mean_surprise_of_the_token_at_its_place():
    """Σ_v p(v) (-log p(v)) with both read from `token_logprobs`, so the two functions are aligned alike."""
    every_token = [token_logprobs(jnp.asarray(LOGITS), jnp.full((B, T), v, jnp.int32)) for v in range(V)]
    logprobs = np.stack(every_token)[:, :, 1:]
    found = entropy(jnp.asarray(LOGITS))[:, 1:]
    np.testing.assert_allclose(found, -(np.exp(logprobs) * logprobs).sum(0), rtol=1e-5, atol=1e-6)


def test_temperature_divides_the_logits():
    logits, tokens = jnp.asarray(LOGITS), jnp.asarray(TOKENS)
    cool = token_logprobs(logits, tokens, temperature=0.5)
    np.testing.assert_allclose(cool, token_logprobs(logits / 0.5, tokens), rtol=1e-6)
    np.testing.assert_allclose(entropy(logits, temperature=0.5), entropy(logits / 0.5), rtol=1e-5, atol=1e-6)
    assert np.all(entropy(logits, temperature=0.5)[:, 1:] < entropy(logits)[:, 1:])


def test_adding_a_constant_to_the_logits_changes_nothing():
    shifted = token_logprobs(jnp.asarray(LOGITS + 1000), jnp.asarray(TOKENS))
    np.testing.assert_allclose(shifted, token_logprobs(jnp.asarray(LOGITS), jnp.asarray(TOKENS)), atol=3e-4)


def test_gradient_is_one_hot_minus_softmax_one_position_earlier():
    gradient = jax.grad(lambda x: token_logprobs(x, jnp.asarray(TOKENS), temperature=0.7).sum())(jnp.asarray(LOGITS))
    expected = np.zeros((B, T, V))
    expected[:, :-1] = (np.eye(V)[TOKENS[:, 1:]] - np.exp(law(LOGITS[:, :-1], 0.7))) / 0.7
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_last_position_is_not_read():
    broken = LOGITS.copy()
    broken[:, -1] = np.nan
    logits, tokens = jnp.asarray(LOGITS), jnp.asarray(TOKENS)
    np.testing.assert_array_equal(token_logprobs(jnp.asarray(broken), tokens), token_logprobs(logits, tokens))
    np.testing.assert_array_equal(entropy(jnp.asarray(broken)), entropy(logits))


def test_uniform_law():
    logits = jnp.full((B, T, V), 3.0)
    np.testing.assert_allclose(entropy(logits)[:, 1:], np.log(V), rtol=1e-6)
    np.testing.assert_allclose(token_logprobs(logits, jnp.asarray(TOKENS))[:, 1:], -np.log(V), rtol=1e-6)


def test_impossible_tokens():
    """-inf logits: log-probability -inf, no contribution to the entropy, and no NaN in any gradient."""
    limited = LOGITS.copy()
    limited[:, :, 0] = -np.inf
    logits = jnp.asarray(limited)
    np.testing.assert_allclose(entropy(logits), entropy(jnp.asarray(LOGITS[:, :, 1:])), rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda x: entropy(x).sum())(logits)))
    assert np.all(token_logprobs(logits, jnp.zeros((B, T), jnp.int32))[:, 1:] == -np.inf)
    possible = jnp.asarray(np.maximum(TOKENS, 1))
    assert np.all(np.isfinite(jax.grad(lambda x: token_logprobs(x, possible).sum())(logits)))


def test_nan_logits_stay_visible():
    logits = jnp.asarray(LOGITS).at[0, 0, 0].set(jnp.nan)
    assert np.isnan(entropy(logits)[0, 1])
    assert np.isnan(token_logprobs(logits, jnp.asarray(TOKENS))[0, 1])


def test_bfloat16_logits_are_computed_in_float32():
    logits = jnp.asarray(LOGITS).astype(jnp.bfloat16)
    tokens = jnp.asarray(TOKENS)
    found = token_logprobs(logits, tokens, temperature=0.7)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, token_logprobs(logits.astype(jnp.float32), tokens, temperature=0.7), rtol=1e-6)
    np.testing.assert_allclose(entropy(logits), entropy(logits.astype(jnp.float32)), rtol=1e-6)


def test_sequence_logprobs():
    logprobs = -np.abs(normals(2, B, T))
    found = sequence_logprobs(poisoned(logprobs), jnp.asarray(MASK))
    np.testing.assert_allclose(found, (logprobs * MASK).sum(1), rtol=1e-5)
