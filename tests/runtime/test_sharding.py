"""Meshes and the table from logical names to mesh axes: the same numbers on one device and on two."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax.functional.masking import positions_from_segments
from rlhf_jax.models.parameters import logical_axes
from rlhf_jax.models.transformer import param_specs
from rlhf_jax.objectives import sft
from rlhf_jax.runtime.sharding import DEFAULT_RULES, make_mesh, named_shardings, replicated, shard_batch
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import SequenceBatch

AXES = logical_axes(param_specs(tiny.CONFIG))


def batch(num_rows=4):
    tokens = np.random.default_rng(0).integers(2, tiny.VOCAB, (num_rows, 6)).astype(np.int32)
    return SequenceBatch(tokens, np.ones_like(tokens), np.ones(tokens.shape, bool))


def test_mesh_sizes():
    assert dict(make_mesh().shape) == {"data": 2, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh(data=1, fsdp=-1).shape) == {"data": 1, "fsdp": 2, "tensor": 1}
    assert dict(make_mesh(devices=jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"data": 0}, "must be at least 1"),
        ({"fsdp": 3}, "needs a multiple of 3 devices, there are 2"),
        ({"data": 4}, "needs 4 devices, there are 2"),
        ({"data": 1}, "needs 1 devices, there are 2"),
    ],
)
def test_mesh_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_every_axis_of_the_model_has_a_rule():
    names = {name for axes in jax.tree.leaves(AXES, is_leaf=lambda x: isinstance(x, tuple)) for name in axes}
    assert names <= set(DEFAULT_RULES)


def test_names_without_a_rule_and_collisions():
    mesh = make_mesh()
    with pytest.raises(ValueError, match=r"\['expert'\]: no rule for logical axes \['experts'\]; the table knows"):
        named_shardings({"expert": ("experts", "embed")}, mesh)
    with pytest.raises(ValueError, match=r"\['w'\]: axes .* two dimensions on one mesh axis"):
        named_shardings({"w": ("heads", "mlp")}, mesh)


def test_fsdp_changes_no_forward_and_no_update():
    """Parameters, gradients and moments in halves on two devices; loss and next parameters are those of one."""
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(sft(tiny.MODEL), optimizer))
    params = tiny.init_params()
    alone, metrics = step(init_train_state(params, optimizer), batch())
    mesh = make_mesh(fsdp=2)
    spread = jax.device_put(params, named_shardings(AXES, mesh))
    assert spread["embedding"].addressable_shards[0].data.shape == (tiny.VOCAB, 8)
    state = init_train_state(spread, optimizer)
    assert state.opt_state[0].mu["embedding"].sharding == spread["embedding"].sharding
    together, spread_metrics = step(state, shard_batch(batch(), mesh))
    np.testing.assert_allclose(metrics["loss"], spread_metrics["loss"], rtol=1e-5)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5), alone.params, together.params)


def test_tensor_parallel_forward_is_the_same():
    tokens = batch().tokens
    segments = jnp.ones_like(tokens)
    forward = jax.jit(lambda p: tiny.MODEL.hidden(p, tokens, positions_from_segments(segments), segments)[0])
    params = tiny.init_params()
    rules = {**DEFAULT_RULES, "vocab": None}  # a vocabulary of 17 does not split in two
    spread = jax.device_put(params, named_shardings(AXES, make_mesh(data=1, tensor=2), rules))
    assert spread["layers"]["query"].addressable_shards[0].data.shape == (2, 16, 2, 4)
    np.testing.assert_allclose(forward(params), forward(spread), rtol=1e-5, atol=1e-5)


def test_batches_are_split_by_rows_or_refused():
    mesh = make_mesh()
    placed = shard_batch(batch(), mesh)
    assert placed.tokens.addressable_shards[0].data.shape == (2, 6)
    np.testing.assert_array_equal(placed.tokens, batch().tokens)
    with pytest.raises(ValueError, match=r"batch\.tokens has 3 rows, which 2 devices cannot share evenly: use 2 or 4"):
        shard_batch(batch(3), mesh)
    assert replicated(mesh).is_fully_replicated
