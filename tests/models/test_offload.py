"""Layers in the host's memory: what waits, and the same bits as from the device, forward and for an adapter's gradient."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.models import lora, transformer
from rlhf_jax.models.heads import head_specs, sequence_scores
from rlhf_jax.models.lora import MATRICES, adapter_model
from rlhf_jax.models.offload import _waiting_sharding, on_host, stream
from rlhf_jax.models.quantize import quantize
from rlhf_jax.objectives.supervised import sft
from rlhf_jax.runtime.sharding import constrain_on, make_mesh, named_shardings, replicated
from rlhf_jax.types import SequenceBatch

TOKENS = jnp.asarray(np.random.default_rng(0).integers(2, tiny.VOCAB, (4, 6)), jnp.int32)
SEGMENTS = jnp.ones_like(TOKENS)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(data=1, fsdp=2)


def kinds(tree):
    return {jax.tree_util.keystr(path): x.sharding.memory_kind for path, x in jax.tree.leaves_with_path(tree)}


def test_scores_have_the_same_bits(mesh):
    """Of a reward model in parts: only the matrices of its layers wait, and nothing else is asked for."""
    specs = {"trunk": transformer.param_specs(tiny.CONFIG), "head": head_specs(tiny.CONFIG.model_dim)}
    shardings = named_shardings(specs, mesh)
    model = transformer.causal_model(dataclasses.replace(tiny.CONFIG, constrain_fn=constrain_on(mesh)))
    params = jax.device_put(tiny.init_frozen().reward_params, shardings)
    waiting = jax.device_put(params, on_host(shardings))
    for path, kind in kinds(waiting).items():
        assert (kind == "pinned_host") == ("layers" in path and path.split("'")[-2] in MATRICES), path
    assert sum(kind == "pinned_host" for kind in kinds(waiting).values()) == 7
    assert set(kinds(params).values()) == {"device"}

    def score(params):
        return sequence_scores(model, params, TOKENS, SEGMENTS)

    expected, streamed = jax.jit(score)(params), jax.jit(lambda params: score(stream(params)))
    np.testing.assert_array_equal(streamed(waiting), expected)
    np.testing.assert_array_equal(streamed(params), expected)
    with pytest.raises(ValueError, match="memory_space"):
        jax.jit(score)(waiting)


@pytest.mark.parametrize("code", [lambda params: params, quantize], ids=["exact", "8 bits"])
def test_an_adapter_on_a_waiting_base(code):
    """Its gradient has the same bits; a layer comes again for the backward pass."""
    config = dataclasses.replace(tiny.CONFIG, remat=True)
    base, targets = code(tiny.init_params()), ("query", "down")
    adapter = lora.init_lora(jax.random.key(1), config, rank=2, targets=targets)
    here = jax.tree.map(lambda _: replicated(make_mesh(data=2)), base)
    batch = SequenceBatch(TOKENS, SEGMENTS, TOKENS > 4)

    def loss(adapter, base):
        total, weight, _ = sft(adapter_model(transformer.causal_model(config), base, scale=0.5))(adapter, batch)
        return total / weight

    expected = jax.jit(jax.grad(loss))(adapter, jax.device_put(base, here))
    waiting = jax.device_put(base, on_host(here))
    found = jax.jit(jax.grad(lambda adapter, base: loss(adapter, stream(base))))(adapter, waiting)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert any(np.abs(x).max() > 0 for x in jax.tree.leaves(found))


def test_what_cannot_wait_is_refused():
    device = types.SimpleNamespace(
        id=0, platform="toy", addressable_memories=lambda: [types.SimpleNamespace(kind="ram")]
    )
    with pytest.raises(
        ValueError, match=r"\(toy\) has memories \['ram'\], no 'pinned_host'; nothing was moved\. Fix: "
    ):
        _waiting_sharding(types.SimpleNamespace(addressable_devices={device.id: device}.values(), device_set=()))
    with pytest.raises(ValueError, match=r"no params\['layers'\] in \['dense'\]: nothing can wait\. Fix: "):
        stream({"dense": jnp.zeros(2)})
