"""Meshes and the table from logical names to mesh axes: the same numbers on one device and on two."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec

from rlhf_jax.functional.masking import positions_from_segments
from rlhf_jax.models.architecture import param_specs
from rlhf_jax.models.heads import head_specs, init_reward_head, init_value_head
from rlhf_jax.models.parameters import ParamSpec, is_spec
from rlhf_jax.objectives import sft
from rlhf_jax.runtime.sharding import (
    DEFAULT_RULES,
    constrain_on,
    init_sharded,
    make_mesh,
    named_shardings,
    replicated,
    reshard,
    shard_batch,
    state_shardings,
)
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import SequenceBatch

SPECS = param_specs(tiny.CONFIG)
EXPERTS = dataclasses.replace(tiny.CONFIG, num_experts=4)


def batch(num_rows=4):
    tokens = np.random.default_rng(0).integers(2, tiny.VOCAB, (num_rows, 6)).astype(np.int32)
    return SequenceBatch(tokens, np.ones_like(tokens), np.ones(tokens.shape, bool))


def test_mesh_sizes():
    def sizes(mesh):
        return {name: size for name, size in mesh.shape.items() if size > 1}

    assert tuple(make_mesh().shape) == ("data", "fsdp", "expert", "sequence", "tensor")
    assert sizes(make_mesh()) == {"data": 2}
    assert sizes(make_mesh(data=1, fsdp=-1)) == {"fsdp": 2}
    assert sizes(make_mesh(sequence=2)) == {"sequence": 2}
    assert sizes(make_mesh(devices=jax.devices()[:1])) == {}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": -1, "fsdp": -1}, "at most one of them -1"),
        ({"data": 0}, "must be at least 1"),
        ({"expert": 3}, r"needs a multiple of 3 devices, there are 2 in 1 processes\. Fix: other sizes"),
        ({"data": 4}, "needs 4 devices, there are 2 in 1 processes"),
        ({"data": 1}, "needs 1 devices, there are 2"),
    ],
)
def test_mesh_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_a_process_without_a_device_of_the_mesh(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match=r"processes \[1, 2\] of 3 have none of the mesh's 2 devices"):
        make_mesh()


def test_every_axis_of_the_model_has_a_rule():
    specs = [*jax.tree.leaves(SPECS, is_leaf=is_spec), *jax.tree.leaves(param_specs(EXPERTS), is_leaf=is_spec)]
    assert {name for spec in specs for name in spec.axes} <= set(DEFAULT_RULES)


@pytest.mark.parametrize(
    ("shape", "axes", "rules", "message"),
    [
        ((4, 4), ("experts", "embed"), {}, r"\['w'\]: no rule for logical axes \['experts'\]; the table knows"),
        ((4, 4), ("heads", "mlp"), {}, r"\['w'\]: axes .* two dimensions on one mesh axis"),
        ((4, 4), ("heads", "embed"), {"embed": ("fsdp", "tensor")}, "two dimensions on one mesh axis"),
        ((4, 4), ("embed",), {}, "declares no array with a shape and a name for each of its dimensions"),
        ((4,), ("embed",), {"embed": "fsdq"}, r"map to \['fsdq'\]; the mesh has \('data', 'fsdp', 'expert'"),
        (
            (4, 17),
            (None, "vocab"),
            {},
            r"^\['w'\]: dimension 1 \(vocab\) has size 17, which mesh axis tensor of 2 does not divide\. "
            r"Fix: an axis that divides it, or rules=\{\*\*DEFAULT_RULES, 'vocab': None\}, which leaves it whole$",
        ),
        ((3,), ("embed",), {"embed": ("fsdp", "tensor")}, r"which mesh axis fsdp\+tensor of 2 does not divide"),
    ],
)
def test_parameters_that_cannot_be_placed(shape, axes, rules, message):
    """All before anything is compiled."""
    mesh = make_mesh(data=1, tensor=2)
    with pytest.raises(ValueError, match=message):
        named_shardings({"w": ParamSpec(shape, axes, None)}, mesh, {**DEFAULT_RULES, **rules})


def test_rules_and_where_they_lead():
    mesh = make_mesh(data=1, expert=2)
    gate = named_shardings(param_specs(EXPERTS), mesh)["layers"]["gate"]
    assert gate.spec == PartitionSpec(None, "expert", "fsdp", "tensor")
    assert gate.shard_shape((2, 4, 16, 24)) == (2, 2, 16, 24)
    both = named_shardings(ParamSpec((8,), ("embed",), None), mesh, {"embed": ("fsdp", "expert")})
    assert both.shard_shape((8,)) == (4,)


def test_the_state_follows_its_parameters():
    """Moments, accumulated gradients and averages as their parameters; scalars and factored moments whole."""
    mesh = make_mesh(fsdp=2)
    shardings = named_shardings(SPECS, mesh)
    optimizer = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)), 2)
    state = init_sharded(lambda: init_train_state(tiny.init_params(), optimizer), specs=SPECS, mesh=mesh)
    adam = state.opt_state.inner_opt_state[1][0]
    for tree in (state.params, adam.mu, adam.nu, state.opt_state.acc_grads):
        assert jax.tree.map(lambda x: x.sharding, tree) == shardings
    assert state.step.sharding == adam.count.sharding == replicated(mesh)
    jax.tree.map(np.testing.assert_array_equal, state.params, tiny.init_params())
    factored = jax.eval_shape(optax.adafactor(min_dim_size_to_factor=8).init, tiny.init_params())
    found = state_shardings(factored, SPECS, mesh)[0]
    assert found.v_row["embedding"] == replicated(mesh)
    assert found.v["layers"]["mlp_norm"] == shardings["layers"]["mlp_norm"]


def test_a_state_that_would_be_whole_everywhere_is_refused():
    state = jax.eval_shape(lambda: {"policy": tiny.init_params(), "critic": {"head": init_value_head(16)}})
    with pytest.raises(
        ValueError, match=r"^state\['critic'\]\['head'\]\['weight'\] \(16,\) belongs to no declared parameter, so that"
    ):
        state_shardings(state, {"policy": SPECS}, make_mesh())
    state_shardings(state, {"policy": SPECS, "critic": {"head": head_specs(16)}}, make_mesh())


def test_heads_are_what_their_specs_say():
    key, specs = jax.random.key(0), head_specs(16)
    shapes = jax.tree.map(lambda spec: spec.shape, specs, is_leaf=is_spec)
    for head in (init_value_head(16), init_reward_head(key, 16)):
        assert jax.tree.map(jnp.shape, head) == shapes


def test_activations_are_placed_where_they_can_be():
    """A dimension that does not divide is left whole: one token a row, while decoding."""
    mesh = make_mesh(data=1, sequence=2)
    constrain = constrain_on(mesh)
    assert constrain is constrain_on(make_mesh(data=1, sequence=2))
    assert constrain is not constrain_on(mesh, {**DEFAULT_RULES, "length": None})
    placed = jax.jit(lambda x: constrain(x, ("batch", "length", None)))(jnp.zeros((4, 6, 3)))
    assert placed.sharding.shard_shape(placed.shape) == (4, 3, 3)
    assert constrain(jnp.zeros((4, 1, 3)), ("batch", "length", None)).sharding.is_fully_replicated
    with pytest.raises(ValueError, match=r"activation \(4,\): no rule for logical axes \['batch'\]; the table knows"):
        constrain_on(mesh, {"embed": None})(jnp.zeros(4), ("batch",))


def test_from_one_layout_to_another_and_back():
    mesh = make_mesh(data=1, fsdp=2)
    rules = {**DEFAULT_RULES, "embed": None, "heads": "fsdp", "kv_heads": "fsdp"}
    training, generation = named_shardings(SPECS, mesh), named_shardings(SPECS, mesh, rules)
    params = jax.device_put(tiny.init_params(), training)
    moved = reshard(params, generation)
    assert jax.tree.map(lambda x: x.sharding, moved) == generation
    jax.tree.map(np.testing.assert_array_equal, reshard(moved, training), tiny.init_params())


def test_fsdp_changes_no_forward_and_no_update():
    """Parameters, gradients and moments in halves on two devices; loss and next parameters are those of one."""
    optimizer = optax.adam(1e-2)
    step = jax.jit(make_train_step(sft(tiny.MODEL), optimizer))
    params = tiny.init_params()
    alone, metrics = step(init_train_state(params, optimizer), batch())
    mesh = make_mesh(fsdp=2)
    spread = jax.device_put(params, named_shardings(SPECS, mesh))
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
    spread = jax.device_put(params, named_shardings(SPECS, make_mesh(data=1, tensor=2), rules))
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


def test_batches_are_split_by_columns_or_refused():
    """Those that have most of them: ranks of three responses stay whole."""
    mesh = make_mesh(data=1, sequence=2)
    rankings = {"tokens": np.arange(4 * 3 * 6).reshape(4, 3, 6), "ranks": np.zeros((4, 3)), "mask": np.ones(4)}
    placed = shard_batch(rankings, mesh)
    parts = {name: x.addressable_shards[0].data.shape for name, x in placed.items()}
    assert parts == {"tokens": (4, 3, 3), "ranks": (4, 3), "mask": (4,)}
    np.testing.assert_array_equal(placed["tokens"], rankings["tokens"])
    with pytest.raises(
        ValueError, match=r"batch\['x'\] has 5 columns, which 2 devices cannot share evenly: use 4 or 6"
    ):
        shard_batch({"x": np.zeros((4, 5))}, mesh)
