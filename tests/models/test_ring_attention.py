"""Ring attention beside plain attention, forward and backward, on two devices; `runtime/eight.py` has more of them."""

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
from rlhf_jax.models.attention import plain_attention, sights, xla_attention
from rlhf_jax.models.ring_attention import ring_attention_on
from rlhf_jax.runtime.collectives import count_collectives
from rlhf_jax.runtime.sharding import make_mesh

SEGMENTS = np.zeros((2, 16), np.int32)
SEGMENTS[0, 3:] = 1  # padded left
SEGMENTS[1, :5], SEGMENTS[1, 5:13] = 1, 2  # packed over the border between the devices, padded right


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=1, sequence=2)


def arrays(dtype="float32", length=16):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, length, heads, 4)), dtype) for heads in (4, 2, 2)]


def sight_of(segments, windows=(None,), kind=0):
    segments = jnp.asarray(segments)
    return sights(segments, segments, jnp.zeros((), jnp.int32), windows)(jnp.asarray(kind))


@pytest.mark.parametrize(
    ("windows", "kind", "softcap", "dtype", "tile"),
    [((None,), 0, None, "float32", 512), ((5, None), 0, None, "float32", 4), ((2, 11), 1, 1.5, "float32", 4),
     ((1, 1), 1, None, "float32", 2), ((None,), 0, None, "bfloat16", 4)],
    ids=["all", "window", "window, cap, tiles", "itself", "bfloat16"],
)  # fmt: skip
def test_equals_plain_attention(mesh, windows, kind, softcap, dtype, tile):
    """Values and gradients of real tokens, with shared heads; padding gives exactly nothing."""
    inputs, sight, real = arrays(dtype), sight_of(SEGMENTS, windows, kind), (SEGMENTS > 0)[:, :, None, None]
    towards = jnp.asarray(np.random.default_rng(1).normal(size=inputs[0].shape), jnp.float32)

    def run(attend, *inputs):
        found = attend(*inputs, sight, scale=0.4, softcap=softcap).astype(jnp.float32)
        return (jnp.where(real, found, 0.0) * towards).sum(), found

    def both(attend):
        (_, found), gradients = jax.jit(jax.value_and_grad(partial(run, attend), (0, 1, 2), has_aux=True))(*inputs)
        return [np.asarray(x, np.float32) for x in (found, *gradients)]

    (found, *gradients), (expected, *others) = both(ring_attention_on(mesh, tile=tile)), both(plain_attention)
    assert not found[~real[:, :, 0, 0]].any()
    # bfloat16: weights are rounded before they are divided by their sum, not after, 2^-9 each.
    limit = 1e-6 if dtype == "float32" else 4 * 2.0**-9
    for mine, theirs in zip((found * real, *gradients), (expected * real, *others), strict=True):
        assert np.abs(mine - theirs).max() <= limit * max(np.abs(theirs).max(), 1.0)


def network(attend, **options):
    kinds = (LayerKind(), LayerKind(window=5))
    return dataclasses.replace(tiny.CONFIG, kinds=kinds, layer_kinds=(1, 0), attention_fn=attend, **options)


def test_a_network_for_every_member(mesh):
    """Two kinds of layers under `scan`, `remat` and `vmap`: each keeps its window."""
    segments = jnp.asarray(SEGMENTS)
    tokens = jnp.asarray(np.random.default_rng(2).integers(2, tiny.VOCAB, segments.shape))
    params = jax.tree.map(lambda *members: jnp.stack(members), tiny.init_params(0), tiny.init_params(1))

    def gradient(attend):
        def loss(params):
            config = network(attend, remat=True)
            states, _ = transformer.hidden(params, config, tokens, positions_from_segments(segments), segments)
            return jnp.where(segments[:, :, None] > 0, jnp.sin(states), 0.0).sum()

        return jax.jit(jax.vmap(jax.value_and_grad(loss)))(params)

    (mine, found), (theirs, expected) = gradient(ring_attention_on(mesh)), gradient(xla_attention)
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_blocks_travel_no_farther_than_windows(mesh):
    """Of eight columns on a device, a window of one needs no other block; what is not needed is not sent."""

    def sent(windows):
        attend = partial(ring_attention_on(mesh), scale=0.4)
        compiled = jax.jit(lambda *inputs: attend(*inputs, sight_of(SEGMENTS, windows))).lower(*arrays()).compile()
        return count_collectives(compiled).get("collective-permute", (0, 0))[0]

    assert sent((1, 1)) == 0 < sent((1, 2)) == sent((1, None)) == 3


def test_where_there_is_no_ring(mesh):
    """One part of the columns, a cache, and what the mesh does not divide."""
    told = []

    def otherwise(query, key, value, sight, **options):
        told.append((query.shape[1], key.shape[1]))
        return xla_attention(query, key, value, sight, **options)

    attend = ring_attention_on(mesh, otherwise=otherwise)
    assert attend is ring_attention_on(mesh, otherwise=otherwise)
    assert ring_attention_on(make_mesh(data=2), otherwise=otherwise) is otherwise
    segments, config = jnp.asarray(SEGMENTS[:, :6]), network(attend)
    tokens, positions = jnp.zeros_like(segments), positions_from_segments(segments)

    def run(tokens, positions, segments, cache=None):
        return jax.eval_shape(
            partial(transformer.hidden, tiny.init_params(), config), tokens, positions, segments, cache
        )

    run(tokens, positions, segments)
    assert told == []
    run(tokens[:, :5], positions[:, :5], segments[:, :5])
    cache = jax.eval_shape(lambda: transformer.init_cache(config, 2, 8))
    run(tokens, positions, segments, cache)
    run(tokens[:, :1], positions[:, :1], segments[:, :1], cache)
    assert set(told) == {(5, 5), (6, 8), (1, 8)}
    told.clear()
    for axes, count in (({"rows": ("sequence",)}, 1), ({"heads": "sequence"}, 2)):
        undivided = ring_attention_on(mesh, otherwise=otherwise, **axes)
        query, key, value = (x[:count] for x in arrays())
        sight = sight_of(SEGMENTS[:count])
        jax.eval_shape(partial(undivided, scale=1.0), query[:, :, :1], key[:, :, :1], value[:, :, :1], sight)
    assert told == [(16, 16)] * 2
