"""Attention against numpy loops: grouped heads, masks, windows, soft caps; and who gets which implementation."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.attention import best_for, causal_mask, cudnn_attention, distances, plain_attention, xla_attention

SEGMENTS = np.array([[0, 1, 1, 1, 2], [1, 1, 2, 2, 2]])


def arrays():
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, 5, heads, 4)), jnp.float32) for heads in (6, 2, 2)]


def loop(query, key, value, mask, scale, softcap):
    result = np.zeros(query.shape)
    for b, t, n in np.ndindex(*query.shape[:3]):
        group, seen = n // 3, np.flatnonzero(mask[b, 0, t])
        if not seen.size:
            continue
        logits = np.array([scale * query[b, t, n] @ key[b, s, group] for s in seen], np.float64)
        logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
        weights = np.exp(logits - logits.max())
        result[b, t, n] = sum(w * value[b, s, group] for w, s in zip(weights / weights.sum(), seen, strict=True))
    return result


def test_mask_by_hand():
    mask = np.asarray(causal_mask(jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS), jnp.zeros((), int)))
    for b, t, s in np.ndindex(2, 5, 5):
        assert mask[b, 0, t, s] == (s <= t and SEGMENTS[b, s] == SEGMENTS[b, t] > 0)
    later = np.asarray(causal_mask(jnp.asarray(SEGMENTS[:, 3:]), jnp.asarray(SEGMENTS), jnp.asarray(3)))
    np.testing.assert_array_equal(later, mask[:, :, 3:])
    np.testing.assert_array_equal(distances(2, 4, jnp.asarray(2)), [[2, 1, 0, -1], [3, 2, 1, 0]])


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_equals_a_loop(softcap):
    query, key, value = arrays()
    mask = causal_mask(jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS), jnp.zeros((), int))
    expected = loop(*map(np.asarray, (query, key, value, mask)), 0.3, softcap)
    seen = SEGMENTS > 0
    found = plain_attention(query, key, value, mask, scale=0.3, softcap=softcap)
    np.testing.assert_allclose(np.asarray(found)[seen], expected[seen], rtol=1e-5, atol=1e-6)
    if softcap is None:
        found = xla_attention(query, key, value, mask, scale=0.3)
        np.testing.assert_allclose(np.asarray(found)[seen], expected[seen], rtol=1e-5, atol=1e-6)


def test_the_best_implementation():
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100")
    assert best_for(gpu, dtype="bfloat16", head_dim=64) is cudnn_attention
    for dtype, head_dim in (("float32", 64), ("bfloat16", 20), ("bfloat16", 256)):
        assert best_for(gpu, dtype=dtype, head_dim=head_dim) is xla_attention
    assert best_for(jax.devices("cpu")[0], dtype="bfloat16", head_dim=64) is xla_attention
