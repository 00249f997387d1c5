"""A sampler that reads a coarser copy of the policy: the gradient stays the policy's, and the distance is logged."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from tabular import Tabular
from training.pieces import SIZES, fresh_state, parts

from rlhf_jax.functional.policy_losses import clipped_policy_loss
from rlhf_jax.models.quantize import dequantize, encode, quantize
from rlhf_jax.objectives import PolicyBatch, policy_gradient, sequence_token_logprobs
from rlhf_jax.training.ppo import PPOBatch, make_ppo_iteration
from rlhf_jax.training.rollout import log_sampling_gap
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import Experience


def test_encode_is_quantize():
    params = tiny.init_params()
    jax.tree.map(np.testing.assert_array_equal, jax.jit(encode)(params), quantize(params))


def test_an_iteration_with_a_sampler_in_8_bits():
    sample, score, experience, update = parts(num_epochs=1, num_minibatches=1)
    coarse = lambda params, prompts, key: sample(encode(params), prompts, key)  # noqa: E731
    iteration = make_ppo_iteration(coarse, score, log_sampling_gap(experience, tiny.MODEL), update)
    state, prompts, key = fresh_state(), tiny.prompts(SIZES), jax.random.key(0)
    policy = state.params["policy"]
    _, metrics = jax.jit(iteration)(tiny.init_frozen(), state, PPOBatch(prompts), key)

    @jax.jit
    def again(policy, copy):
        drawn = coarse(policy, prompts, jax.random.split(key)[0])
        of = [sequence_token_logprobs(tiny.MODEL, p, drawn.tokens, drawn.segment_ids) for p in (policy, copy)]
        return drawn, *of

    drawn, of_policy, of_copy = jax.device_get(again(policy, dequantize(quantize(policy))))
    mask = drawn.completion_mask
    np.testing.assert_allclose(drawn.logprobs[mask], of_copy[mask], atol=1e-5)
    gap = of_policy[mask].astype(np.float64) - of_copy[mask]
    assert gap.size > 20
    assert np.abs(gap).max() > 1e-3, "the copy is not the policy"
    found = {name.removeprefix("sampling/"): float(x) for name, x in metrics.items() if name.startswith("sampling/")}
    assert found == {
        "sampling_logp_difference/mean": pytest.approx(np.abs(gap).mean(), rel=1e-3),
        "sampling_logp_difference/max": pytest.approx(np.abs(gap).max(), rel=1e-3),
        "importance_sampling_ratio/mean": pytest.approx(np.exp(gap).mean(), rel=1e-5),
    }
    # The only step of the update sees the ratios to the copy, whose mean is 1 but for 4 standard errors.
    assert float(metrics["val/ratio"]) == pytest.approx(np.exp(gap).mean(), rel=1e-5)
    assert abs(np.exp(gap).mean() - 1) < 4 * np.exp(gap).std() / gap.size**0.5
    assert float(metrics["policy/first_approxkl"]) == pytest.approx((gap**2).mean() / 2, rel=1e-3)


def test_the_gradient_is_the_policys_whoever_sampled():
    """One token of four, drawn by a sampler whose law is exactly 4, 2, 1 and 1 in 8: rows in these numbers are its mean."""
    counts, advantages, logits = (
        np.array([4, 2, 1, 1]),
        np.array([1.0, -0.5, 2.0, 0.3]),
        np.array([0.9, 0.4, -0.3, 0.1]),
    )
    task = Tabular(vocab=4, length=1)
    drawn = np.repeat(np.arange(4), counts)
    tokens = np.stack([np.zeros_like(drawn), drawn], axis=1).astype(np.int32)
    mask = np.tile([False, True], (8, 1))
    experience = Experience(
        tokens=jnp.asarray(tokens),
        segment_ids=jnp.ones((8, 2), jnp.int32),
        mask=jnp.asarray(mask),
        old_logprobs=jnp.asarray(np.where(mask, np.log(counts / 8)[tokens], 0), jnp.float32),
        advantages=jnp.asarray(np.where(mask, advantages[tokens], 0), jnp.float32),
    )
    optimizer = optax.sgd(1.0)
    loss = partial(clipped_policy_loss, clip_low=0.9, clip_high=9.0)
    step = make_train_step(policy_gradient(task.model(), loss), optimizer)
    table = jnp.asarray(logits[None], jnp.float32)
    after, metrics = jax.jit(step)(init_train_state({"policy": table}, optimizer), PolicyBatch(experience))
    policy = np.exp(logits) / np.exp(logits).sum()
    expected = policy * (advantages - policy @ advantages)  # of E_policy[advantage], by the softmax's logits
    np.testing.assert_allclose(after.params["policy"][0] - table[0], expected, atol=1e-6)
    on_policy = (counts / 8) * advantages - policy * ((counts / 8) @ advantages)  # with a ratio of 1
    assert np.abs(on_policy - expected).max() > 0.05
    np.testing.assert_allclose(metrics["val/ratio"], 1.0, atol=1e-6)
