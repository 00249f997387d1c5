"""Several reward models trained side by side: every array of their states has a leading axis of M members.

Members that differ in nothing agree on everything, faults too. What may differ is the network they start from, the order
of their data, and, by bootstrap, the data (Christiano et al. 2017, §2.2.3).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax.data.batching import batch_indices
from rlhf_jax.functional.ensembles import normalize_members
from rlhf_jax.functional.rewards import subtract_missing_eos
from rlhf_jax.models.heads import ensemble_scores
from rlhf_jax.training.train_step import init_train_state
from rlhf_jax.types import CausalModel, Frozen, Generation, Metrics, Params, TrainState


def init_ensemble(
    init_fn: Callable[[jax.Array], Params], key: jax.Array, optimizer: optax.GradientTransformation, *, num_members: int
) -> TrainState:
    """M states at step 0; member m starts from `init_fn(fold_in(key, m))`.

    An `init_fn` that draws only the head from its key gives members that share a pretrained trunk (Coste et al. 2023);
    one that ignores it gives members whose weights may be averaged, see `average_members`.
    """

    def init(member: jax.Array) -> TrainState:
        return init_train_state(init_fn(jax.random.fold_in(key, member)), optimizer)

    return jax.vmap(init)(jnp.arange(num_members))


def make_ensemble_step(
    train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
) -> Callable[[TrainState, Any, jax.Array], tuple[TrainState, Metrics]]:
    """Build `step(states, data, rows [M, B]) -> (states, metrics [M])`: every member's step on rows of its own.

    `data` is the whole training set, shared by all members; `rows` are `member_indices`. Jit it as `train_step`.
    """

    def step(states: TrainState, data: Any, rows: jax.Array) -> tuple[TrainState, Metrics]:
        def member_step(state: TrainState, chosen: jax.Array) -> tuple[TrainState, Metrics]:
            return train_step(state, jax.tree.map(lambda x: x[chosen], data))

        return jax.vmap(member_step)(states, rows)

    return step


def member_indices(
    seed: int, step: int, *, num_members: int, num_examples: int, batch_size: int, bootstrap: bool = False
) -> np.ndarray:
    """The examples of one step for every member: int64 `[M, batch_size]`, a pure function of its arguments.

    Each member passes over the examples in an order of its own, as `batch_indices` says; with `bootstrap` over a sample
    of `num_examples` drawn from them with replacement, in which about 63 % occur (Efron 1979).
    """

    def member_rows(member: int) -> np.ndarray:
        own_seed = int(np.random.SeedSequence([seed, member]).generate_state(1)[0])
        rows = batch_indices(own_seed, step, num_examples=num_examples, batch_size=batch_size)
        if not bootstrap:
            return rows
        drawn = np.random.default_rng([own_seed, num_examples, 1]).integers(num_examples, size=num_examples)
        return drawn[rows]

    return np.stack([member_rows(member) for member in range(num_members)])


def make_ensemble_score_fn(
    reward_model: CausalModel, rule: Callable[[jax.Array], jax.Array], *, missing_eos_penalty: float = 1.0
) -> Callable[[Frozen, Generation], jax.Array]:
    """Build `score(frozen, generation) -> scores [B]` of an ensemble, in the place of `make_score_fn`.

    Every member is put into standard deviations of its own on the reference policy's samples first, or the loudest would
    decide: `frozen.reward_params` are stacked, `reward_mean` and `reward_std` are `[M]`.

    Args:
      reward_model: the members' functions.
      rule: `scores [M, B] -> [B]`: `ensemble_mean`, `worst_case` (WCO), or `uncertainty_weighted` (UWO), perhaps in a
        `functools.partial` with its coefficient.
      missing_eos_penalty: subtracted from completions that did not end, after the rule.
    """

    def score(frozen: Frozen, generation: Generation) -> jax.Array:
        raw = ensemble_scores(reward_model, frozen.reward_params, generation.tokens, generation.segment_ids)
        scores = rule(normalize_members(raw, frozen.reward_mean, frozen.reward_std))
        return subtract_missing_eos(scores, generation.ended, penalty=missing_eos_penalty)

    return score


def average_members(params: Params) -> Params:
    """One network whose weights are the members' mean (WARM, Ramé et al. 2024): an ensemble at the price of one model.

    Only for members fine-tuned from one and the same network, the head included: between networks that started apart
    there is no path of low loss, and their mean computes nothing.
    """
    return jax.tree.map(lambda x: x.mean(axis=0), params)
