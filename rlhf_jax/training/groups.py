"""Experience without a critic: the baseline is the group, the batch or a greedy answer.

Each function here takes the place of `make_experience_fn` in `make_ppo_iteration`; the state's critic is None and the
objective `policy_gradient`. Rows `g * group_size` to `(g + 1) * group_size - 1` answer one prompt, as `generate` with
`samples_per_prompt=group_size` returns them.

| method | advantages_fn | kl_in_reward | loss, aggregate |
|---|---|---|---|
| GRPO | `per_completion(group_relative)` | no | `clipped_policy_loss`, `sequence_mean` |
| Dr. GRPO | `per_completion(group_relative, scale=False)` | no | `clipped_policy_loss`, `constant_length_mean` |
| Lite PPO | `per_completion(batch_relative)` | no | `clipped_policy_loss`, `token_mean` |
| DAPO | as GRPO, `drop_zero_spread`, `with_overlong_penalty` | no | `clipped_policy_loss(clip_high=0.28)`, `token_mean` |
| GSPO, CISPO | as GRPO | no | `gspo_loss`, `sequence_mean`; `cispo_loss`, `token_mean` |
| RLOO | `per_completion(leave_one_out)` | yes | `reinforce_loss`, `constant_length_mean(length=1)` |
| RLOO, clipped by the completion | the same | yes | `clipped_sequence_loss`, `constant_length_mean(length=1)` |
| REINFORCE++ | `reinforce_plus_plus` | yes | `clipped_policy_loss`, `token_mean` |
| -baseline | `reinforce_plus_plus_baseline` | no, k2 in the loss | `clipped_policy_loss`, `token_mean` |
| ReMax | `make_remax_experience_fn` | yes | `reinforce_loss`, `constant_length_mean(length=1)` |
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.functional.advantages import rewards_to_go, zero_spread
from rlhf_jax.functional.masking import masked_sum
from rlhf_jax.functional.rewards import shape_rewards, subtract_overlong
from rlhf_jax.objectives import sequence_token_logprobs
from rlhf_jax.training.rollout import rollout_metrics
from rlhf_jax.types import CausalModel, Experience, Frozen, Generation, Metrics, Params, PromptBatch

AdvantagesFn: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""`advantages(rewards [B, T], mask [B, T]) -> [B, T]`, 0 outside the mask."""

ExperienceFn: TypeAlias = Callable[[Params, Params, Generation, jax.Array, jax.Array], tuple[Experience, Metrics]]
"""`experience(params, ref_params, generation, scores [B], kl_coef) -> (Experience, metrics)`."""


def per_completion(advantages_fn: Callable[..., jax.Array], **options: int | bool | float) -> AdvantagesFn:
    """A function of completions' summed rewards, `[B] -> [B]`, as one of tokens: every token of a row gets the row's.

    With the KL in the rewards it is thereby in what the baseline is taken of, as RLOO must have it.
    """

    def advantages(rewards: jax.Array, mask: jax.Array) -> jax.Array:
        of_rows = advantages_fn(masked_sum(rewards, mask, axis=1), **options)
        return jnp.where(mask, of_rows[:, None], 0.0)

    return advantages


def make_policy_experience_fn(
    model: CausalModel,
    advantages_fn: AdvantagesFn,
    *,
    kl_in_reward: bool,
    group_size: int = 1,
    drop_zero_spread: bool = False,
    temperature: float = 1.0,
    completion_columns: int | None = None,
) -> ExperienceFn:
    """Build `experience(params, ref_params, generation, scores [B], kl_coef) -> (Experience, metrics)`.

    It takes `ref_logprobs=` `[B, T]`, too, where they are known already: a loop whose scores are made on the host has the
    device compute them meanwhile. `ref_params` then plays no part.

    Args:
      model: the policy's functions.
      advantages_fn: see the table above.
      kl_in_reward: whether the rewards hold the leash, `-kl_coef * k1` per token. If not, `kl_coef` is not used and a KL
        term is the objective's.
      group_size: samples per prompt; with 2 or more, `frac_reward_zero_std` is among the metrics.
      drop_zero_spread: take the groups whose scores are all equal out of the mask (DAPO's dynamic sampling without the
        resampling: `sample_until_full`). Metrics stay those of all rows.
      temperature: the sampler's.
      completion_columns: as in `policy_gradient`; elsewhere the reference's log-probs, which nothing reads there, are 0.
    """

    def experience(
        params: Params,
        ref_params: Params,
        generation: Generation,
        scores: jax.Array,
        kl_coef: jax.Array,
        ref_logprobs: jax.Array | None = None,
    ) -> tuple[Experience, Metrics]:
        del params
        mask = generation.completion_mask
        if ref_logprobs is None:
            rows = (generation.tokens, generation.segment_ids, mask)
            options = {"temperature": temperature, "completion_columns": completion_columns}
            ref_logprobs = sequence_token_logprobs(model, ref_params, *rows, **options)
        kl_coef = kl_coef if kl_in_reward else jnp.zeros(())
        rewards = shape_rewards(scores, generation.logprobs, ref_logprobs, mask, kl_coef=kl_coef)
        metrics = rollout_metrics(generation, scores, ref_logprobs, kl_coef)
        advantages = advantages_fn(rewards, mask)
        if group_size > 1:
            useless = zero_spread(scores, group_size=group_size)
            metrics["frac_reward_zero_std"] = useless.astype(jnp.float32).mean()
            if drop_zero_spread:
                mask = mask & ~useless[:, None]
        batch = Experience(
            tokens=generation.tokens,
            segment_ids=generation.segment_ids,
            mask=mask,
            old_logprobs=generation.logprobs,
            advantages=advantages,
            ref_logprobs=ref_logprobs,
        )
        return batch, metrics

    return experience


def with_greedy(
    sample_fn: Callable[[Params, PromptBatch, jax.Array], Generation],
    greedy_fn: Callable[[Params, PromptBatch, jax.Array], Generation],
) -> Callable[[Params, PromptBatch, jax.Array], Generation]:
    """A sampler of twice the rows: the samples, then in the same order the greedy answers (temperature 0) for ReMax."""

    def sample(params: Params, prompts: PromptBatch, key: jax.Array) -> Generation:
        sampled, greedy = sample_fn(params, prompts, key), greedy_fn(params, prompts, key)
        return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), sampled, greedy)

    return sample


def make_remax_experience_fn(model: CausalModel, *, temperature: float = 1.0) -> ExperienceFn:
    """Build ReMax's experience from the rows of `with_greedy`: rewards-to-go minus the greedy answer's score.

    The baseline costs one more rollout and no second network (Li et al. 2023, alg. 1); it does not depend on the sample, so
    the gradient stays unbiased. Only the sampled rows are learned from. The KL stands in the reward.
    """
    inner = make_policy_experience_fn(model, rewards_to_go, kl_in_reward=True, temperature=temperature)

    def experience(
        params: Params, ref_params: Params, generation: Generation, scores: jax.Array, kl_coef: jax.Array
    ) -> tuple[Experience, Metrics]:
        half = scores.shape[0] // 2
        sampled = jax.tree.map(lambda x: x[:half], generation)
        greedy = scores[half:]
        batch, metrics = inner(params, ref_params, sampled, scores[:half] - greedy, kl_coef)
        for name in ("objective/scores", "objective/rlhf_reward"):
            metrics[name] = metrics[name] + greedy.mean()
        metrics["objective/scores_std"] = scores[:half].std()
        return batch, {**metrics, "objective/greedy_scores": greedy.mean()}

    return experience


def with_overlong_penalty(
    score_fn: Callable[[Frozen, Generation], jax.Array], *, max_length: int, buffer: int, penalty: float = 1.0
) -> Callable[[Frozen, Generation], jax.Array]:
    """A score that falls over the last `buffer` tokens before `max_length` (DAPO; see `subtract_overlong`)."""
    take_off = partial(subtract_overlong, max_length=max_length, buffer=buffer, penalty=penalty)

    def score(frozen: Frozen, generation: Generation) -> jax.Array:
        return take_off(score_fn(frozen, generation), generation.completion_mask.sum(axis=1))

    return score


def sample_until_full(
    rollout_fn: Callable[[int], tuple[Generation, jax.Array]], *, num_groups: int, group_size: int, max_rounds: int
) -> tuple[Generation, np.ndarray, int]:
    """DAPO's dynamic sampling: roll out until `num_groups` groups have scores that differ (Yu et al. 2025, §3.2).

    A loop of Python, for an iteration in pieces; inside one program use `drop_zero_spread`.

    Args:
      rollout_fn: `round -> (generation, scores)`, round = 0, 1, ...; each with fresh prompts and keys.
      num_groups: wanted; of the last round, what is too much is left out.
      group_size: samples per prompt.
      max_rounds: give up after so many.

    Returns:
      `(generation, scores, rounds)` of `num_groups * group_size` rows, on the host.

    Raises:
      RuntimeError: too few groups with spread after `max_rounds`.
    """
    kept, found = [], 0
    for i in range(max_rounds):
        generation, scores = jax.device_get(rollout_fn(i))
        rows = np.flatnonzero(~np.asarray(zero_spread(jnp.asarray(scores), group_size=group_size)))
        kept.append(jax.tree.map(lambda x, rows=rows: np.asarray(x)[rows], (generation, scores)))
        found += len(rows) // group_size
        if found >= num_groups:
            generation, scores = jax.tree.map(lambda *parts: np.concatenate(parts)[: num_groups * group_size], *kept)
            return generation, scores, i + 1
    raise RuntimeError(
        f"{found} of {num_groups} groups have scores that differ after {max_rounds} rounds; nothing was updated. "
        "Fix: prompts that are neither always nor never solved, larger groups, or a higher max_rounds"
    )
