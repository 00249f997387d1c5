"""Losses one after the other against their plain sum: numbers, gradients, and the memory that is the reason for them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from rlhf_jax.models import transformer
from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.objectives import PolicyBatch, actor_critic, gradient_first, separate_critic, shared_critic
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import Experience

RANDOM = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RANDOM.normal(size=5), jnp.float32), "v": jnp.asarray(RANDOM.normal(size=5), jnp.float32)}
DATA, X = (jnp.asarray(RANDOM.normal(size=shape), jnp.float32) for shape in ((2, 5), 5))


def first_loss(params, data):
    loss = ((params["w"] * data[0] - data[1]) ** 2).sum()
    return loss, {"loss": loss}


def summed(params, x, scale):
    total, aux = first_loss(params, DATA)
    return scale * total + (jnp.sin(x) * params["v"]).sum(), aux


def in_turn(params, x, scale):
    total, aux, x = gradient_first(first_loss, params, DATA, x)
    return scale * total + (jnp.sin(x) * params["v"]).sum(), aux


@pytest.mark.parametrize("lift", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"])
def test_same_value_and_gradients(lift):
    scale = jnp.asarray([0.3, -2.0]) if lift is jax.vmap else 0.3

    def found(fn):
        of_scale = lift(lambda scale: jax.value_and_grad(fn, argnums=(0, 1, 2), has_aux=True)(PARAMS, X, scale))
        return of_scale(scale), fn(PARAMS, X, 0.3)

    for a, b in zip(jax.tree.leaves(found(in_turn)), jax.tree.leaves(found(summed)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_no_gradient_of_data_and_of_what_is_reported():
    def reported(params, data):
        total, aux, _ = gradient_first(first_loss, params, data, X)
        return aux["loss"], total

    assert not np.any(jax.grad(lambda params: reported(params, DATA)[0])(PARAMS)["w"])
    assert not np.any(jax.grad(lambda data: reported(PARAMS, data)[1])(DATA))


def experience(rows, length, vocab):
    """Prompts of half the length, with padding on both sides."""
    rng = np.random.default_rng(0)
    columns = np.arange(length)
    real = (columns >= rng.integers(0, 2, (rows, 1))) & (columns < length - rng.integers(0, 3, (rows, 1)))
    names = ("old_logprobs", "advantages", "old_values", "returns")
    return Experience(
        tokens=jnp.asarray(rng.integers(2, vocab, (rows, length)), jnp.int32),
        segment_ids=jnp.asarray(real, jnp.int32),
        mask=jnp.asarray(real & (columns >= length // 2)),
        **{name: jnp.asarray(rng.normal(size=(rows, length)), jnp.float32) for name in names},
    )


def networks(config):
    policy, trunk = (transformer.init(jax.random.key(seed), config) for seed in (0, 1))
    return {"policy": policy, "critic": {"trunk": trunk, "head": init_reward_head(jax.random.key(2), config.model_dim)}}


def step_of(model, first, columns=None, num_micro_batches=1, vf_coef=0.7, value_clip=0.2):
    """A step of plain gradient descent of size 1: what it changes is the gradient."""
    critic = separate_critic(model, completion_columns=columns)
    options = {"entropy_coef": 0.1, "vf_coef": vf_coef, "value_clip": value_clip, "completion_columns": columns}
    objective = actor_critic(model, critic, **options, critic_first=first)
    return make_train_step(objective, optax.sgd(1.0), num_micro_batches=num_micro_batches)


@pytest.mark.parametrize("columns", [None, 4])
def test_critic_first_is_the_same_step(columns):
    """Parameters and metrics, of micro-batches in which different numbers of tokens count, for several coefficients at once."""
    state, batch = init_train_state(networks(tiny.CONFIG), optax.sgd(1.0)), PolicyBatch(experience(4, 8, tiny.VOCAB))

    def stepped(first):
        def of(coefficient):
            options = {"vf_coef": coefficient, "value_clip": 0.5 * coefficient}
            return step_of(tiny.MODEL, first, columns, num_micro_batches=2, **options)(state, batch)

        return jax.jit(jax.vmap(of))(jnp.asarray([0.7, 0.1]))

    found, expected = (jax.tree.leaves_with_path(stepped(first)) for first in (True, False))
    for (path, a), (_, b) in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=jax.tree_util.keystr(path))


def test_activations_of_one_network_at_a_time():
    """Temporaries of a step in which activations weigh more than parameters: near half of both networks'."""
    config = dataclasses.replace(tiny.CONFIG, model_dim=32, mlp_dim=64, num_layers=4, unroll=4)
    batch = PolicyBatch(jax.eval_shape(lambda: experience(16, 64, tiny.VOCAB)))
    state = jax.eval_shape(lambda: init_train_state(networks(config), optax.sgd(1.0)))

    def temporaries(first):
        step = jax.jit(step_of(transformer.causal_model(config), first))
        return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(True) < 0.65 * temporaries(False)


def test_a_critic_on_the_policys_states_comes_after_them():
    objective = actor_critic(tiny.MODEL, shared_critic, critic_first=True)
    with pytest.raises(ValueError, match="fix: separate_critic"):
        objective(networks(tiny.CONFIG), PolicyBatch(experience(2, 8, tiny.VOCAB)))
