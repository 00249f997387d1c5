"""Sampling one batch ahead of learning: the next rollout is made while this one is learned from, on devices of its own.

    rollout_mesh, training_mesh = make_mesh(devices=jax.devices()[:2]), make_mesh(devices=jax.devices()[2:])
    learn = jax.jit(make_learn(score_fn, experience_fn, update_fn), donate_argnums=1)
    iteration = make_ahead_iteration(
        jax.jit(sample_fn),
        learn,
        to_rollout=partial(jax.device_put, device=replicated(rollout_mesh)),
        to_training=partial(jax.device_put, device=batch_sharding(training_mesh)),
    )
    ahead = AheadState(state, sampled)                        # `sampled` by the policy that starts
    for step, batch in ...:                                   # the prompts of the next step
        ahead, metrics = iteration(frozen, ahead, batch, jax.random.fold_in(root, step))

JAX returns before a program ends, so the two programs of an iteration run at the same time where their devices differ. Each
rollout is one update old when it is learned from (Noukhovitch et al. 2024, arXiv:2410.18252). That stays right because every
method here takes its ratio against the log-probs of the policy that sampled, `Generation.logprobs`, and clips it;
`policy/first_approxkl` says how far the two are apart. The plain iteration, `make_ppo_iteration`, stays the default.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from flax import struct

from rlhf_jax.training.ppo import LearnFn
from rlhf_jax.types import Frozen, Generation, Metrics, Params, PPOState, PromptBatch, SequenceBatch


@struct.dataclass
class AheadState:
    """What goes on from one iteration to the next, and into a checkpoint: nothing is in flight outside it."""

    state: PPOState
    sampled: Generation
    """What the next iteration learns from, sampled by the policy before the last update."""
    demonstrations: SequenceBatch | None = None
    """For PPO-ptx, beside `sampled`."""


AheadIteration: TypeAlias = Callable[[Frozen, AheadState, Any, jax.Array], tuple[AheadState, Metrics]]


def make_ahead_iteration(
    sample_fn: Callable[[Params, PromptBatch, jax.Array], Generation],
    learn_fn: LearnFn,
    *,
    to_rollout: Callable[[Params], Params] = lambda params: params,
    to_training: Callable[[Generation], Generation] = lambda generation: generation,
) -> AheadIteration:
    """Build `iteration(frozen, ahead, batch, key) -> (ahead, metrics)`: learn from `ahead.sampled`, sample `batch.prompts`.

    Neither half waits for the other. It is a function of Python around two programs where they run on devices of their own;
    with the two defaults it may as well be jitted whole.

    Args:
      sample_fn: as `make_ppo_iteration` takes it; jitted, the program of the rollout devices.
      learn_fn: from `make_learn`; jitted, the program of the training devices. It may be given the state to keep (donated).
      to_rollout: moves the policy's parameters to where they sample.
      to_training: moves a rollout to where it is learned from.
    """

    def iteration(frozen: Frozen, ahead: AheadState, batch: Any, key: jax.Array) -> tuple[AheadState, Metrics]:
        sample_key, learn_key = jax.random.split(key)
        policy = to_rollout(ahead.state.params["policy"])
        sampled = sample_fn(policy, batch.prompts, sample_key)
        state, metrics = learn_fn(frozen, ahead.state, ahead.sampled, ahead.demonstrations, learn_key)
        return AheadState(state, to_training(sampled), batch.demonstrations), metrics

    return iteration
