"""Mixture of experts against a loop over tokens; experts that nobody chose included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models.experts import expert_mlp, experts_on, route, routed_mlp
from rlhf_jax.runtime.sharding import make_mesh


@pytest.mark.parametrize("renormalize", [True, False])
def test_equals_a_loop_over_tokens(renormalize):
    rng = np.random.default_rng(0)
    hidden, router = np.abs(rng.normal(size=(7, 4))), rng.normal(size=(4, 5))
    router[:, 3] = -100.0
    gate, up = rng.normal(size=(2, 5, 4, 3))
    down = rng.normal(size=(5, 3, 4))
    arrays = [jnp.asarray(x, jnp.float32) for x in (hidden, router, gate, up, down)]
    chosen, weights = route(*arrays[:2], experts_per_token=2, renormalize=renormalize)
    found = expert_mlp(arrays[0], chosen, weights, *arrays[2:], activation=jax.nn.silu)
    assert not (chosen == 3).any()
    for token, x in enumerate(hidden):
        logits = x @ router
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares)[:2]
        total = shares[best].sum() if renormalize else 1.0
        expected = np.zeros(4)
        for expert in best:
            inner = x @ gate[expert]
            inner = inner / (1 + np.exp(-inner)) * (x @ up[expert])
            expected += shares[expert] / total * (inner @ down[expert])
        np.testing.assert_allclose(found[token], expected, rtol=2e-4, atol=1e-5)


@functools.cache
def outputs_and_gradients(experts_fn):
    """Of five columns, which a sequence axis of two leaves whole; gradients of all five arguments."""
    rng = np.random.default_rng(1)
    shapes = ((2, 5, 8), (8, 4), (4, 8, 6), (4, 8, 6), (4, 6, 8))
    options = {"experts_per_token": 2, "renormalize": True, "activation": jax.nn.silu}

    def total(arrays):
        outputs = experts_fn(*arrays, **options)
        return jnp.square(outputs).sum(), outputs

    return jax.jit(jax.grad(total, has_aux=True))([rng.normal(size=shape).astype(np.float32) for shape in shapes])


@pytest.mark.parametrize("axis", ["tensor", "sequence"])
def test_in_parts_equals_the_whole(axis):
    """The expert axis is in `tests/runtime/test_meshes.py`."""
    on_mesh = experts_on(make_mesh(data=1, **{axis: 2}))
    assert on_mesh is experts_on(make_mesh(data=1, **{axis: 2}))
    found, expected = (jax.tree.leaves(outputs_and_gradients(x)) for x in (on_mesh, routed_mlp))
    for ours, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5 * np.abs(exact).max())
