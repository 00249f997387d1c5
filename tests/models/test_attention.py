"""Attention against numpy loops and each other: grouped heads, packing, padding, windows, soft caps; who gets which."""

import dataclasses
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import Mesh

from rlhf_jax.functional.masking import positions_from_segments
from rlhf_jax.models import transformer
from rlhf_jax.models.architecture import LayerKind
from rlhf_jax.models.attention import (
    best_for,
    blocked_attention,
    causal_mask,
    cudnn_attention,
    distances,
    plain_attention,
    sights,
    tpu_attention,
    under_vmap,
    xla_attention,
)
from rlhf_jax.runtime.flops import matmul_flops

SEGMENTS = np.array([[0, 1, 1, 1, 2], [1, 1, 2, 2, 2]])
START = jnp.zeros((), jnp.int32)


def arrays(rows=2, length=5, heads=(6, 2, 2), width=4, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(rows, length, count, width)), dtype) for count in heads]


def sight_of(segments, windows=(None,), kind=0):
    return sights(jnp.asarray(segments), jnp.asarray(segments), START, windows)(jnp.asarray(kind))


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
    mask = np.asarray(causal_mask(jnp.asarray(SEGMENTS), jnp.asarray(SEGMENTS), START))
    for b, t, s in np.ndindex(2, 5, 5):
        assert mask[b, 0, t, s] == (s <= t and SEGMENTS[b, s] == SEGMENTS[b, t] > 0)
    later = np.asarray(causal_mask(jnp.asarray(SEGMENTS[:, 3:]), jnp.asarray(SEGMENTS), jnp.asarray(3)))
    np.testing.assert_array_equal(later, mask[:, :, 3:])
    np.testing.assert_array_equal(distances(2, 4, jnp.asarray(2)), [[2, 1, 0, -1], [3, 2, 1, 0]])
    both = [np.asarray(sight_of(SEGMENTS, (None, 2), kind).mask) for kind in (0, 1)]
    np.testing.assert_array_equal(both[0], mask)
    for b, t, s in np.ndindex(2, 5, 5):
        assert both[1][b, 0, t, s] == (mask[b, 0, t, s] and t - s < 2)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize(
    "attend",
    [plain_attention, xla_attention, cudnn_attention, tpu_attention, partial(blocked_attention, block=1)],
    ids=["plain", "xla", "cudnn", "tpu", "blocked"],
)
def test_equals_a_loop(attend, softcap):
    """Five tokens are odd and no multiple of 128, so the kernels hand over to XLA here."""
    sight = sight_of(SEGMENTS)
    expected = loop(*map(np.asarray, (*arrays(), sight.mask)), 0.3, softcap)
    found = attend(*arrays(), sight, scale=0.3, softcap=softcap)
    seen = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(found)[seen], expected[seen], rtol=1e-5, atol=1e-6)


ROWS = np.zeros((2, 256), np.int32)
ROWS[0, 30:] = 1  # padded left
ROWS[1, :100], ROWS[1, 100:228] = 1, 2  # packed, padded right; a segment ends inside a tile


@pytest.mark.parametrize(
    ("windows", "kind", "softcap", "dtype"),
    [((None,), 0, None, "float32"), ((70, None), 0, None, "float32"), ((None, 140), 1, 2.0, "float32"),
     ((None,), 0, None, "bfloat16")],
    ids=["all", "window", "window and cap", "bfloat16"],
)  # fmt: skip
@pytest.mark.parametrize(
    "attend", [partial(tpu_attention, interpret=True), blocked_attention], ids=["TPU kernel", "blocks"]
)
def test_equals_plain_attention(attend, windows, kind, softcap, dtype):
    """Forward and gradient of real tokens; what padding computes differs, and nobody reads it."""
    inputs = arrays(2, 256, (4, 2, 2), 16, dtype)
    sight, real = sight_of(ROWS, windows, kind), jnp.asarray(ROWS > 0)[:, :, None, None]
    towards = jnp.asarray(np.random.default_rng(1).normal(size=(2, 256, 4, 16)), jnp.float32)

    def run(attend, *inputs):
        found = jnp.where(real, attend(*inputs, sight, scale=0.4, softcap=softcap).astype(jnp.float32), 0.0)
        return (found * towards).sum(), found

    def both(attend):
        (_, found), gradients = jax.jit(jax.value_and_grad(partial(run, attend), (0, 1, 2), has_aux=True))(*inputs)
        return [np.asarray(x, np.float32) for x in (found, *gradients)]

    ours, expected = both(attend), both(plain_attention)
    # float32: sums in another order. bfloat16: weights and scaled queries are rounded elsewhere, 2^-9 each, times values.
    limit = 2e-6 if dtype == "float32" else 4 * 2.0**-9
    for mine, theirs in zip(ours, expected, strict=True):
        assert np.abs(mine - theirs).max() <= limit * np.abs(theirs).max()


def test_a_network_with_the_tpu_kernel():
    """Two kinds of layers under `scan` and `remat`, on two devices: each keeps its window."""
    config = dataclasses.replace(tiny.CONFIG, kinds=(LayerKind(), LayerKind(window=20)), layer_kinds=(1, 0), remat=True)
    mesh = Mesh(np.array(jax.devices()).reshape(1, 2), ("data", "tensor"))
    kernel = partial(tpu_attention, interpret=True, mesh=mesh, rows=("data",), heads="tensor")
    segments = jnp.asarray(ROWS[:, :128])
    tokens = jnp.asarray(np.random.default_rng(2).integers(2, tiny.VOCAB, segments.shape))

    def gradient(attend):
        def loss(params):
            own = dataclasses.replace(config, attention_fn=attend)
            states, _ = transformer.hidden(params, own, tokens, positions_from_segments(segments), segments)
            return jnp.where(segments[:, :, None] > 0, jnp.sin(states), 0.0).sum()

        return jax.jit(jax.value_and_grad(loss))

    params = tiny.init_params()
    lowered = gradient(kernel).lower(params).as_text()
    assert "manual_computation" in lowered or "SPMDFullToShardShape" in lowered
    (mine, found), (theirs, expected) = gradient(kernel)(params), gradient(xla_attention)(params)
    np.testing.assert_allclose(mine, theirs, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)


def test_blocks_leave_out_what_nobody_sees():
    """Four blocks of 64 multiply 10 of 16 parts; with more keys than queries, as with a cache, there is one block."""
    query, key, _ = arrays(2, 256, (4, 2, 2), 16)

    def work(attend, query, sight):
        return matmul_flops(lambda q, k: attend(q, k, k, sight, scale=1.0), query, key)

    sight = sight_of(ROWS)
    assert 16 * work(blocked_attention, query, sight) == 10 * work(plain_attention, query, sight)
    later = sights(jnp.asarray(ROWS[:, 192:]), jnp.asarray(ROWS), jnp.asarray(192), (None,))(jnp.asarray(0))
    found, expected = (
        attend(query[:, 192:], key, key, later, scale=1.0) for attend in (blocked_attention, xla_attention)
    )
    np.testing.assert_array_equal(found, expected)


def has_kernel(attend, query, key, sight):
    traced = jax.make_jaxpr(lambda q, k: attend(q, k, k, sight, scale=1.0))(query, key)
    return "pallas_call" in str(traced)


def test_when_the_tpu_kernel_is_left_out():
    query, key, _ = arrays(2, 128, (4, 2, 2), 16)
    segments = ROWS[:, :128]
    assert has_kernel(tpu_attention, query, key, sight_of(segments))
    assert not has_kernel(tpu_attention, query[:, :100], key[:, :100], sight_of(segments[:, :100]))
    cached = sights(jnp.asarray(segments[:, :1]), jnp.asarray(segments), jnp.asarray(5), (None,))(START)
    assert not has_kernel(tpu_attention, query[:, :1], key, cached)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 1), ("data", "tensor"))
    split = partial(tpu_attention, mesh=mesh, rows=("data",), heads="tensor")
    assert has_kernel(split, query, key, sight_of(segments))
    assert not has_kernel(split, query[:1], key[:1], sight_of(segments[:1]))


def test_cudnn_is_what_cuda_would_get(monkeypatch):
    """Lowered for CUDA without one, in place of running it: JAX asks for cuDNN's version and the card on the way."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91800)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda _: False)

    def lowered(length, softcap=None):
        query, key, _ = arrays(2, length, (4, 2, 2), 8, jnp.bfloat16)
        sight = sight_of(ROWS[:, :length], (3,))

        def total(query, key):
            return cudnn_attention(query, key, key, sight, scale=0.3, softcap=softcap).astype(jnp.float32).sum()

        return jax.jit(jax.grad(total, (0, 1))).trace(query, key).lower(lowering_platforms=("cuda",)).as_text()

    text = lowered(16)
    assert "__cudnn$fmhaScaleBiasSoftmax(" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in text
    assert "__cudnn" not in lowered(15)
    assert "__cudnn" not in lowered(16, softcap=2.0)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("windows", [(None,), (5,)], ids=["all", "window"])
@pytest.mark.parametrize("keys", [128, 160], ids=["own row", "cache"])
def test_cudnn_equals_plain_attention(windows, keys):
    """Values and gradients in bfloat16, padding left and right, packed rows; a float32 softmax is the reference."""
    segments = np.ones((3, 128), np.int32)
    segments[0, :40], segments[1, 100:], segments[2, 64:] = 0, 0, 2
    held = jnp.pad(jnp.asarray(segments), ((0, 0), (0, keys - 128)))
    sight = sights(jnp.asarray(segments), held, START, windows)(jnp.asarray(0))
    query = arrays(3, 128, (8, 2, 2), 64, jnp.bfloat16)[0]
    key, value = arrays(3, keys, (8, 2, 2), 64, jnp.bfloat16)[1:]
    real = jnp.asarray(segments > 0)[:, :, None, None]

    def summed(attend):
        def total(query, key, value):
            attended = attend(query, key, value, sight, scale=0.125).astype(jnp.float32)
            return jnp.where(real, jnp.sin(attended), 0.0).sum(), jnp.where(real, attended, 0.0)

        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(query, key, value)

    (gradients, attended), (expected_gradients, expected) = summed(cudnn_attention), summed(plain_attention)
    for got, want in zip((attended, *gradients), (expected, *expected_gradients), strict=True):
        got, want = (np.asarray(x, np.float32) for x in (got, want))
        assert np.linalg.norm(got - want) < 0.02 * np.linalg.norm(want)


def test_the_best_implementation():
    gpu = types.SimpleNamespace(platform="gpu", device_kind="NVIDIA H100")
    assert best_for(gpu, dtype="bfloat16", head_dim=64) is cudnn_attention
    assert [under_vmap(fn) for fn in (cudnn_attention, blocked_attention)] == [xla_attention, blocked_attention]
    for dtype, head_dim in (("float32", 64), ("bfloat16", 20), ("bfloat16", 256)):
        assert best_for(gpu, dtype=dtype, head_dim=head_dim) is xla_attention
    assert best_for(jax.devices("cpu")[0], dtype="bfloat16", head_dim=64) is xla_attention
    tpu = types.SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")
    assert best_for(tpu, dtype="bfloat16", head_dim=64) is tpu_attention
    assert best_for(tpu, dtype="float16", head_dim=64) is xla_attention
    mesh = Mesh(np.array(jax.devices()).reshape(2, 1), ("data", "tensor"))
    options = {"dtype": "float32", "head_dim": 64, "rows": ("data",), "heads": "tensor"}
    split = best_for(tpu, mesh=mesh, **options)
    assert split.keywords == {"mesh": mesh, "rows": ("data",), "heads": "tensor"}
    assert best_for(tpu, mesh=mesh, **options) is split
    assert best_for(tpu, mesh=Mesh(mesh.devices[:1], mesh.axis_names), **options) is tpu_attention
