"""Scalar heads: their initial laws, and scores read at the last real token wherever the padding is."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from rlhf_jax.models.heads import init_reward_head, init_value_head, scalar_head, sequence_scores


def test_initial_scales():
    head = init_reward_head(jax.random.key(0), 4095)
    assert abs(float(head["weight"].std()) * 64 - 1.0) < 0.05  # 1 / sqrt(4095 + 1)
    assert float(jnp.abs(head["bias"])) == 0.0
    value = init_value_head(8)
    assert all(float(jnp.abs(leaf).max()) == 0.0 for leaf in jax.tree.leaves(value))


def test_scalar_head_is_an_inner_product():
    hidden = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    head = {"weight": jnp.asarray([1.0, -2.0, 0.5, 3.0]), "bias": jnp.asarray(0.7)}
    expected = [
        [sum(h * w for h, w in zip(row, [1.0, -2.0, 0.5, 3.0], strict=True)) + 0.7 for row in r] for r in hidden
    ]
    np.testing.assert_allclose(scalar_head(head, jnp.asarray(hidden)), expected, rtol=1e-5)


def test_score_is_read_at_the_last_real_token():
    params = {"trunk": tiny.init_params(), "head": init_reward_head(jax.random.key(1), tiny.CONFIG.model_dim)}
    row = [3, 7, 2, 9]

    score_rows = jax.jit(partial(sequence_scores, tiny.MODEL))

    def score(tokens, segments):
        return float(score_rows(params, np.asarray([tokens]), np.asarray([segments]))[0])

    alone = score(row, [1] * 4)
    assert abs(score([0, 0, *row], [0, 0, 1, 1, 1, 1]) - alone) < 1e-5
    assert abs(score([*row, 0, 0], [1, 1, 1, 1, 0, 0]) - alone) < 1e-5
    assert abs(score([*row, 9, 9], [1, 1, 1, 1, 0, 0]) - alone) < 1e-5
    assert abs(score(row[:3], [1] * 3) - alone) > 1e-3
