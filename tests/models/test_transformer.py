"""The transformer against an independent numpy forward, and by its laws: causal, padding-blind, cached = uncached."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.functional.masking import positions_from_segments
from rlhf_jax.models import transformer
from rlhf_jax.models.architecture import LayerKind
from rlhf_jax.models.parameters import is_spec, num_params
from rlhf_jax.models.rope import Rope


def numpy_forward(params, config, tokens):
    """One unpadded row in float64, written with loops over heads and positions."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def rope(x, position):  # x [C]
        half = config.head_dim // 2
        out = x.copy()
        for i in range(half):
            angle = position * config.kinds[0].rope.base ** (-2 * i / config.head_dim)
            out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    x = w["embedding"][tokens]
    for layer in range(config.num_layers):
        weights = {name: array[layer] for name, array in w["layers"].items()}
        h = norm(x, weights["attention_norm"])
        update = np.zeros_like(x)
        for head in range(config.num_heads):
            group = head * config.num_kv_heads // config.num_heads
            q = [rope(h[t] @ weights["query"][:, head], t) for t in range(len(tokens))]
            k = [rope(h[t] @ weights["key"][:, group], t) for t in range(len(tokens))]
            v = [h[t] @ weights["value"][:, group] for t in range(len(tokens))]
            for t in range(len(tokens)):
                logits = np.array([q[t] @ k[s] for s in range(t + 1)]) / np.sqrt(config.head_dim)
                p = np.exp(logits - logits.max())
                p /= p.sum()
                update[t] += sum(p[s] * v[s] for s in range(t + 1)) @ weights["out"][head]
        x = x + update
        h = norm(x, weights["mlp_norm"])
        gate = h @ weights["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ weights["up"])) @ weights["down"]
    matrix = w["embedding"] if config.tie_embeddings else w["unembedding"]
    return norm(x, w["final_norm"]) @ matrix.T


@partial(jax.jit, static_argnames="config")
def logits_of(params, config, tokens, segment_ids):
    hidden, _ = transformer.hidden(params, config, tokens, positions_from_segments(segment_ids), segment_ids)
    return transformer.unembed(params, config, hidden)


@pytest.mark.parametrize("tied", [True, False])
def test_equals_numpy(tied):
    config = dataclasses.replace(tiny.CONFIG, tie_embeddings=tied, kinds=(LayerKind(rope=Rope(base=100.0)),))
    params = transformer.init(jax.random.key(0), config)
    tokens = np.array([3, 7, 2, 2, 11, 5])
    logits = logits_of(params, config, jnp.asarray(tokens)[None], jnp.ones((1, 6), jnp.int32))
    np.testing.assert_allclose(logits[0], numpy_forward(params, config, tokens), rtol=2e-5, atol=2e-5)


def test_causal_by_gradient():
    params = tiny.init_params()
    positions, segments = jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32)
    embedded = jnp.eye(tiny.VOCAB)[jnp.asarray([3, 7, 2, 9, 11, 5])]

    @jax.jit
    @jax.grad
    def gradient(soft_tokens, at):
        # Tokens as rows of one-hots: position t gets the embedding soft_tokens[t] @ E through an appended vocabulary.
        own = {**params, "embedding": jnp.concatenate([params["embedding"], soft_tokens @ params["embedding"]])}
        ids = (tiny.VOCAB + jnp.arange(6))[None]
        hidden, _ = transformer.hidden(own, tiny.CONFIG, ids, positions, segments)
        return hidden[0, at].sum()

    for at in range(6):
        grads = np.abs(np.asarray(gradient(embedded, at))).sum(axis=-1)
        assert np.all(grads[: at + 1] > 0), at
        assert np.all(grads[at + 1 :] == 0), at


def test_padding_and_packing_change_nothing():
    params = tiny.init_params()
    row_a, row_b = [3, 7, 2, 9], [11, 5, 6]

    def run(tokens, segments):
        return np.asarray(logits_of(params, tiny.CONFIG, jnp.asarray([tokens]), jnp.asarray([segments])))[0]

    alone_a, alone_b = run(row_a, [1] * 4), run(row_b, [1] * 3)
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(run([0, 0, *row_a], [0, 0, 1, 1, 1, 1])[2:], alone_a, **close)
    np.testing.assert_allclose(run([*row_a, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0])[:4], alone_a, **close)
    np.testing.assert_allclose(run([3, 7, 0, 2, 9], [1, 1, 0, 1, 1])[[0, 1, 3, 4]], alone_a, **close)
    packed = run([*row_a, *row_b, 0], [1, 1, 1, 1, 2, 2, 2, 0])
    np.testing.assert_allclose(packed[:4], alone_a, **close)
    np.testing.assert_allclose(packed[4:7], alone_b, **close)


def test_cached_equals_uncached():
    params = tiny.init_params()
    tokens = jnp.asarray([[0, 0, 3, 7, 2, 9, 4], [5, 6, 3, 8, 2, 1, 4]])
    segments = jnp.asarray([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    positions = positions_from_segments(segments)

    @jax.jit
    def both(params):
        whole, _ = transformer.hidden(params, tiny.CONFIG, tokens, positions, segments)
        cache = transformer.init_cache(tiny.CONFIG, 2, 9)
        parts, start = [], 0
        for size in (4, 1, 2):  # a prefill, a decode step, a chunk
            cut = slice(start, start + size)
            part, cache = transformer.hidden(
                params, tiny.CONFIG, tokens[:, cut], positions[:, cut], segments[:, cut], cache
            )
            parts.append(part)
            start += size
        return whole, jnp.concatenate(parts, axis=1)

    whole, parts = jax.device_get(both(params))
    mask = np.asarray(segments) > 0
    np.testing.assert_allclose(parts[mask], whole[mask], rtol=1e-5, atol=1e-5)


def test_remat_changes_no_gradient():
    params, tokens, segments = tiny.init_params(), jnp.asarray([[3, 7, 2, 9]]), jnp.ones((1, 4), jnp.int32)

    @partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(params, config):
        return jnp.square(logits_of(params, config, tokens, segments)).sum()

    plain = gradient(params, tiny.CONFIG)
    remat = gradient(params, dataclasses.replace(tiny.CONFIG, remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, remat)


def test_bfloat16_keeps_float32_logits():
    config = dataclasses.replace(tiny.CONFIG, dtype="bfloat16")
    tokens, segments = jnp.asarray([[3, 7, 2, 9]]), jnp.ones((1, 4), jnp.int32)
    params = tiny.init_params()
    logits = logits_of(params, config, tokens, segments)
    exact = logits_of(params, tiny.CONFIG, tokens, segments)
    assert logits.dtype == jnp.float32
    assert 0 < np.abs(np.asarray(logits - exact)).max() < 0.1 * np.abs(np.asarray(exact)).max()


def test_every_array_has_its_axes_and_scale():
    specs = transformer.param_specs(tiny.CONFIG)
    params = tiny.init_params()
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda spec: spec.shape, specs, is_leaf=is_spec)
    assert all(len(spec.axes) == len(spec.shape) for spec in jax.tree.leaves(specs, is_leaf=is_spec))
    assert num_params(params) == 17 * 16 + 2 * (16 * 4 * 4 * 2 + 16 * 2 * 4 * 2 + 3 * 16 * 24 + 2 * 16) + 16
    assert abs(float(params["layers"]["gate"].std()) - 16**-0.5) < 0.03
    assert abs(float(params["layers"]["down"].std()) - (24 * 4) ** -0.5) < 0.02


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="num_heads 4 is not a multiple of num_kv_heads 3"):
        dataclasses.replace(tiny.CONFIG, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"rotary dimensions \[5\]: pairs turn"):
        dataclasses.replace(tiny.CONFIG, head_dim=5)
    with pytest.raises(ValueError, match="must agree"):
        transformer.hidden(
            tiny.init_params(), tiny.CONFIG, jnp.ones((1, 3), int), jnp.ones((1, 2), int), jnp.ones((1, 3), int)
        )
