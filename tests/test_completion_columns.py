"""Learning that looks at the last columns only, against learning from whole rows: experience, losses, metrics, gradients."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.functional.advantages import group_relative
from rlhf_jax.functional.kl import k2
from rlhf_jax.functional.policy_losses import clipped_policy_loss
from rlhf_jax.generation.generate import generate
from rlhf_jax.models import transformer
from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.objectives import (
    PolicyBatch,
    actor_critic,
    policy_gradient,
    separate_critic,
    sequence_token_logprobs,
    shared_critic,
)
from rlhf_jax.runtime.flops import matmul_flops
from rlhf_jax.training.groups import make_policy_experience_fn, per_completion
from rlhf_jax.training.rollout import make_experience_fn

NEW = 4
NETWORKS = {
    "plain": tiny.CONFIG,
    "chunks": dataclasses.replace(tiny.CONFIG, logits_chunk=8),
    "last layer": dataclasses.replace(tiny.CONFIG, unroll=2, last_layer_where_read=True),
}
SCORES = jnp.asarray([1.0, -0.5, 0.3, 2.0])


def critic_params():
    """That do not predict 0."""
    return {"trunk": tiny.init_params(3), "head": init_reward_head(jax.random.key(4), tiny.CONFIG.model_dim)}


def of_critic(model, columns, shared):
    """Experience and objective of PPO."""
    critic = shared_critic if shared else separate_critic(model, completion_columns=columns)
    experience = make_experience_fn(model, critic, completion_columns=columns)
    return experience, actor_critic(model, critic, entropy_coef=0.01, completion_columns=columns)


def of_group(model, columns):
    """Experience and objective of GRPO."""
    advantages = per_completion(group_relative, group_size=2)
    experience = make_policy_experience_fn(
        model, advantages, kl_in_reward=False, group_size=2, completion_columns=columns
    )

    def loss(*args, mask):
        return clipped_policy_loss(*args, clip_low=0.2, clip_high=0.2)

    return experience, policy_gradient(model, loss, kl_coef=0.1, kl_fn=k2, completion_columns=columns)


def learned(model, columns, kind):
    """Left-padded prompts, completions of different lengths: the experience with its metrics, the loss with its gradient."""
    make_experience, objective = kind(model, columns)
    params = {"policy": tiny.init_params(0), "critic": critic_params()}
    options = {"max_new_tokens": NEW, "eos_id": tiny.EOS, "pad_id": tiny.PAD}
    limits = jnp.asarray([4, 1, 2, 3])
    sampled = generate(tiny.MODEL, params["policy"], tiny.prompts(), jax.random.key(1), **options, row_limits=limits)
    experience, metrics = make_experience(params, tiny.init_params(5), sampled, SCORES, jnp.asarray(0.1))

    def total_of(params):
        # The policy has moved since it sampled.
        moved = {**params, "policy": jax.tree.map(lambda x: 1.1 * x, params["policy"])}
        total, weight, found = objective(moved, PolicyBatch(experience))
        return total, (total, weight, found)

    gradient, found = jax.grad(total_of, has_aux=True)(params)
    return experience, metrics, found, gradient


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("plain", partial(of_critic, shared=True)),
        ("chunks", partial(of_critic, shared=False)),
        ("last layer", partial(of_critic, shared=False)),
        ("last layer", of_group),
        ("chunks", of_group),
    ],
    ids=["shared critic", "separate critic, chunks", "separate critic, last layer", "group", "group, chunks"],
)
def test_same_experience_and_gradient(name, kind):
    model = transformer.causal_model(NETWORKS[name])
    (whole, *plain), (cut, *found) = jax.jit(lambda: [learned(model, columns, kind) for columns in (None, NEW)])()
    for field in dataclasses.fields(whole):
        a, b = getattr(cut, field.name), getattr(whole, field.name)
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_allclose(np.where(whole.mask, a, 0), np.where(whole.mask, b, 0), atol=2e-6)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("columns", [0, 6])
def test_what_rows_do_not_have(columns):
    with pytest.raises(ValueError, match=r"completion_columns must lie in 1\.\.5"):
        sequence_token_logprobs(
            tiny.MODEL,
            tiny.init_params(),
            jnp.ones((2, 6), jnp.int32),
            jnp.ones((2, 6), jnp.int32),
            completion_columns=columns,
        )


def test_logits_of_completions_only():
    """One column more than the completion has, and of the others none; the last layer as `test_picking` counts it."""
    rows, length = 2, 16
    tokens = jnp.ones((rows, length), jnp.int32)

    def flops(columns):
        params = jax.eval_shape(lambda: tiny.init_params(0))
        run = partial(sequence_token_logprobs, tiny.MODEL, completion_columns=columns)
        return matmul_flops(lambda params: run(params, tokens, tokens), params)

    assert flops(None) - flops(NEW) == 2 * rows * (length - NEW - 1) * tiny.CONFIG.model_dim * tiny.VOCAB
