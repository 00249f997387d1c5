"""A whole PPO iteration as one pure function: generate, score, shape, estimate advantages, update, adapt the leash."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from rlhf_jax.functional.aggregation import token_mean
from rlhf_jax.functional.kl import adaptive_kl_coef
from rlhf_jax.models.heads import init_value_head
from rlhf_jax.objectives import PolicyBatch
from rlhf_jax.training.train_step import update_epochs
from rlhf_jax.types import (
    Experience,
    Frozen,
    Generation,
    Metrics,
    Params,
    PPOState,
    PromptBatch,
    SequenceBatch,
    TrainState,
)


@struct.dataclass
class PPOBatch:
    """What enters one iteration."""

    prompts: PromptBatch
    demonstrations: SequenceBatch | None = None
    """For PPO-ptx: one row of text to keep likely beside every sampled row."""


PPOIteration = Callable[[Frozen, PPOState, PPOBatch, jax.Array], tuple[PPOState, Metrics]]
LearnFn = Callable[[Frozen, PPOState, Generation, SequenceBatch | None, jax.Array], tuple[PPOState, Metrics]]


def init_ppo_state(
    policy_params: Params,
    critic_params: Params | None,
    optimizer: optax.GradientTransformation,
    *,
    kl_coef: float = 0.15,
) -> PPOState:
    """Start from the SFT policy; 0.15 is the first coefficient of lm-human-preferences' adaptive leash.

    `critic_params` is None for methods without a critic. The arrays are copied: the state may be donated while the
    reference policy lives on.
    """
    params = jax.tree.map(jnp.copy, {"policy": policy_params, "critic": critic_params})
    return PPOState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        kl_coef=jnp.asarray(kl_coef, jnp.float32),
    )


def critic_from_trunk(trunk: Params, model_dim: int) -> Params:
    """A separate critic that starts from `trunk` (the policy's or the reward model's) and predicts 0."""
    return {"trunk": trunk, "head": init_value_head(model_dim)}


def make_ppo_update(
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    *,
    num_epochs: int = 4,
    num_minibatches: int = 1,
    kl_target: float | None = 6.0,
    kl_horizon: float = 10_000.0,
    kl_stop: float | None = None,
    ptx_coef: float = 0.0,
    aggregate: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] = token_mean,
) -> Callable[[PPOState, Experience, SequenceBatch | None, jax.Array, jax.Array], tuple[PPOState, Metrics]]:
    """Build `update(state, experience, demonstrations, kl, key) -> (state, metrics)`, the learning half of an iteration.

    Args:
      train_step: from `make_train_step(actor_critic(...), optimizer)`, or with `policy_gradient(...)`.
      num_epochs, num_minibatches: 4 and 1 in lm-human-preferences.
      kl_target: nats per completion that the leash's coefficient steers to; None keeps the coefficient fixed.
      kl_horizon: the controller's slowness, in completions.
      kl_stop: nats per token; once a minibatch is farther than this from the policy that sampled, the iteration's
        remaining steps are skipped. 0.015 in Spinning Up (1.5 times its target 0.01). None never stops.
      ptx_coef: weight of the demonstrations' mean token loss relative to the policy's mean loss (PPO-ptx; Ouyang et al.
        2022 use 27.8 at their own normalisation).
      aggregate: the objective's, which says what the policy's loss is the mean of; `actor_critic`'s is `token_mean`.
    """

    def update(
        state: PPOState, experience: Experience, demonstrations: SequenceBatch | None, kl: jax.Array, key: jax.Array
    ) -> tuple[PPOState, Metrics]:
        num_rows = experience.tokens.shape[0]
        batch = PolicyBatch(experience=experience)
        if demonstrations is not None:
            weight = aggregate(jnp.zeros_like(experience.advantages), experience.mask)[1]
            per_token = ptx_coef * weight / jnp.maximum(demonstrations.loss_mask.sum(), 1)
            weights = jnp.full((num_rows,), per_token, jnp.float32)
            batch = PolicyBatch(experience, demonstrations, weights)
        inner = TrainState(state.step, state.params, state.opt_state)
        inner, history = update_epochs(
            train_step, inner, batch, key, num_epochs=num_epochs, num_minibatches=num_minibatches, kl_stop=kl_stop
        )
        kl_coef = state.kl_coef
        if kl_target is not None:
            kl_coef = adaptive_kl_coef(kl_coef, kl, target=kl_target, horizon=kl_horizon, num_samples=num_rows)
        metrics = _means(history)
        # How far the first minibatch was from on-policy: ratio 1 and KL 0 unless sampling and training disagree.
        metrics["policy/first_approxkl"] = history["policy/approxkl_avg"][0]
        return PPOState(state.step + 1, inner.params, inner.opt_state, kl_coef), metrics

    return update


def _means(history: Metrics) -> Metrics:
    """Means over the steps, of those that were taken where `update/taken` says that some were skipped."""
    if "update/taken" not in history:
        return {name: values.mean() for name, values in history.items()} | {"grad/finite": history["grad/finite"].min()}
    taken = history["update/taken"]
    metrics = {name: (values * taken).sum() / taken.sum() for name, values in history.items()}
    finite = jnp.where(taken > 0, history["grad/finite"], 1.0).min()
    return {**metrics, "update/taken": taken.sum(), "grad/finite": finite}


def make_batch_update(
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
    *,
    num_epochs: int = 1,
    num_minibatches: int = 1,
) -> Callable[..., tuple[PPOState, Metrics]]:
    """Build an iteration's `update` for a batch of any kind: winners to imitate (RAFT), pairs (online DPO).

    `train_step` is `make_train_step(of_policy(sft(...)), optimizer)` or has `of_policy(preference(...))`. The KL coefficient
    is left alone: these methods have their leash in the loss, or none.
    """

    def update(
        state: PPOState, batch: Any, demonstrations: None, kl: jax.Array, key: jax.Array
    ) -> tuple[PPOState, Metrics]:
        if demonstrations is not None:
            raise ValueError("this update mixes in no demonstrations (PPO-ptx); fix: give none, or use make_ppo_update")
        del kl
        inner = TrainState(state.step, state.params, state.opt_state)
        inner, history = update_epochs(
            train_step, inner, batch, key, num_epochs=num_epochs, num_minibatches=num_minibatches
        )
        return state.replace(step=state.step + 1, params=inner.params, opt_state=inner.opt_state), _means(history)

    return update


def make_ppo_iteration(
    sample_fn: Callable[[Params, PromptBatch, jax.Array], Generation],
    score_fn: Callable[[Frozen, Generation], jax.Array],
    experience_fn: Callable[..., tuple[Experience, Metrics]],
    update_fn: Callable[..., tuple[PPOState, Metrics]],
) -> PPOIteration:
    """Compose one iteration, `iteration(frozen, state, batch, key) -> (state, metrics)`.

    Pure: jit it with `donate_argnames="state"`, vmap it over seeds (`in_axes=(None, 0, None, 0)`) or run its four parts one
    by one with a Python reward in the middle. `functools.partial(jax.jit(iteration), frozen)` is the form
    `(state, batch, key) -> (state, metrics)`; the frozen models are an argument so that they are neither baked into the
    program nor stored with the state. In traces, operations are named after `sample`, `score`, `experience` and `update`.

    Args:
      sample_fn: `(policy_params, prompts, key) -> Generation`.
      score_fn: from `make_score_fn`.
      experience_fn: from `make_experience_fn`, or of another method: what it returns is what `update_fn` is given.
      update_fn: from `make_ppo_update` or `make_batch_update`.
    """

    learn = make_learn(score_fn, experience_fn, update_fn)

    def iteration(frozen: Frozen, state: PPOState, batch: PPOBatch, key: jax.Array) -> tuple[PPOState, Metrics]:
        sample_key, update_key = jax.random.split(key)
        with jax.named_scope("sample"):
            generation = sample_fn(state.params["policy"], batch.prompts, sample_key)
        return learn(frozen, state, generation, batch.demonstrations, update_key)

    return iteration


def make_learn(
    score_fn: Callable[[Frozen, Generation], jax.Array],
    experience_fn: Callable[..., tuple[Experience, Metrics]],
    update_fn: Callable[..., tuple[PPOState, Metrics]],
) -> LearnFn:
    """The part of an iteration after sampling, `learn(frozen, state, generation, demonstrations, key) -> (state, metrics)`.

    Arguments as in `make_ppo_iteration`.
    """

    def learn(
        frozen: Frozen, state: PPOState, generation: Generation, demonstrations: SequenceBatch | None, key: jax.Array
    ) -> tuple[PPOState, Metrics]:
        with jax.named_scope("score"):
            scores = score_fn(frozen, generation)
        with jax.named_scope("experience"):
            experience, metrics = experience_fn(state.params, frozen.ref_params, generation, scores, state.kl_coef)
        with jax.named_scope("update"):
            state, learned = update_fn(state, experience, demonstrations, metrics["objective/kl"], key)
        return state, {**metrics, **learned}

    return learn
