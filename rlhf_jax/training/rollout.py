"""From sampled text to experience: scores, reference log-probs, values, shaped rewards and advantages."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.functional.advantages import gae
from rlhf_jax.functional.kl import k1
from rlhf_jax.functional.masking import masked_mean, masked_sum, masked_var, masked_whiten
from rlhf_jax.functional.rewards import normalize_scores, shape_rewards, subtract_missing_eos
from rlhf_jax.models.heads import sequence_scores
from rlhf_jax.objectives import CriticFn, policy_hidden, sequence_token_logprobs, whole_rows
from rlhf_jax.types import CausalModel, Experience, Frozen, Generation, Metrics, Params


def make_score_fn(
    reward_model: CausalModel, *, missing_eos_penalty: float = 1.0
) -> Callable[[Frozen, Generation], jax.Array]:
    """Build `score(frozen, generation) -> scores [B]`: the reward model's, z-scored on the reference policy's samples.

    `missing_eos_penalty`, in units of that standard deviation, is subtracted from completions that did not end.
    """

    def score(frozen: Frozen, generation: Generation) -> jax.Array:
        raw = sequence_scores(reward_model, frozen.reward_params, generation.tokens, generation.segment_ids)
        scores = normalize_scores(raw, mean=frozen.reward_mean, std=frozen.reward_std)
        return subtract_missing_eos(scores, generation.ended, penalty=missing_eos_penalty)

    return score


def check_scores(scores: Sequence[float] | np.ndarray, *, num_completions: int, name: str = "reward") -> np.ndarray:
    """What a Python reward function returned, as float32 `[num_completions]`, before it enters an experience.

    Raises:
      ValueError: another number of values, something that is no number, or a value that is not finite; with the rows. Inside
        a compiled iteration nothing can raise: there the update is not applied, and `runtime.metrics.check_finite`
        names `objective/scores`.
    """
    values = np.asarray([np.nan if value is None else value for value in scores])
    fix = "Nothing was updated. Fix: return one finite number per completion"
    if values.shape != (num_completions,) or values.dtype.kind not in "biuf":
        raise ValueError(
            f"{name} returned {values.dtype} values of shape {values.shape} for {num_completions} completions. {fix}"
        )
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        first = ", ".join(f"completion {row}: {values[row]}" for row in bad[:5])
        raise ValueError(f"{name}: {bad.size} of {num_completions} scores are not finite ({first}). {fix}")
    return values.astype(np.float32)


def make_experience_fn(
    model: CausalModel,
    critic: CriticFn,
    *,
    temperature: float = 1.0,
    discount: float = 1.0,
    gae_lambda: float = 0.95,
    completion_columns: int | None = None,
) -> Callable[[Params, Params, Generation, jax.Array, jax.Array], tuple[Experience, Metrics]]:
    """Build `experience(params, ref_params, generation, scores [B], kl_coef) -> (Experience, metrics)`.

    The leash is k1 inside the reward: `r_t = -kl_coef (log pi - log ref)_t`, plus the score on the last token; advantages
    by GAE, whitened over the rollout (Ziegler et al. 2019). The sampler's log-probs serve as behaviour log-probs: sampling
    and training run the same forward. Scores may come from `make_score_fn` or from anywhere else, a Python
    function included, whose values `check_scores` checks. `completion_columns` as in `actor_critic`: elsewhere values and
    reference log-probs, which nothing reads there, are 0.
    """
    options = {"completion_columns": completion_columns}

    def experience(
        params: Params, ref_params: Params, generation: Generation, scores: jax.Array, kl_coef: jax.Array
    ) -> tuple[Experience, Metrics]:
        tokens, segment_ids, mask = generation.tokens, generation.segment_ids, generation.completion_mask
        ref_logprobs = sequence_token_logprobs(
            model, ref_params, tokens, segment_ids, mask, temperature=temperature, **options
        )
        # A shared critic reads these states; a separate one ignores them, and the compiler drops the computation.
        hidden = policy_hidden(model, params["policy"], tokens, segment_ids, **options)
        values = whole_rows(critic(params["critic"], hidden, tokens, segment_ids), tokens.shape[1])
        rewards = shape_rewards(scores, generation.logprobs, ref_logprobs, mask, kl_coef=kl_coef)
        advantages, returns = gae(rewards, values, mask, discount=discount, gae_lambda=gae_lambda)
        metrics = {
            **rollout_metrics(generation, scores, ref_logprobs, kl_coef),
            "val/explained_var": 1.0 - masked_var(returns - values, mask) / (masked_var(returns, mask) + 1e-8),
        }
        batch = Experience(
            tokens=tokens,
            segment_ids=segment_ids,
            mask=mask,
            old_logprobs=generation.logprobs,
            old_values=values,
            advantages=masked_whiten(advantages, mask),
            returns=returns,
        )
        return batch, metrics

    return experience


def log_sampling_gap(
    experience_fn: Callable[..., tuple[Experience, Metrics]], model: CausalModel, *, temperature: float = 1.0
) -> Callable[..., tuple[Experience, Metrics]]:
    """The same experience, and in the metrics how far its sampler is from the policy. Costs a forward, if none is shared.

    For a sampler that is not the policy itself: a copy in bfloat16 (`dataclasses.replace(config, dtype="bfloat16")`) or in 8
    bits (`models.quantize.encode`), another engine. Learning stays right as long as `generation.logprobs` are its own, since
    the ratio of every loss is taken against them; its variance grows with what is logged (nats, over completion tokens):

        sampling/sampling_logp_difference/mean, max      |log policy - log sampler|
        sampling/importance_sampling_ratio/mean          policy / sampler, 1 in expectation

    Args:
      experience_fn: from `make_experience_fn`, or of another method.
      model: the policy's functions.
      temperature: the sampler's.
    """

    def experience(params: Params, ref_params: Params, generation: Generation, *rest: jax.Array):
        batch, metrics = experience_fn(params, ref_params, generation, *rest)
        tokens, segment_ids, mask = generation.tokens, generation.segment_ids, generation.completion_mask
        logprobs = sequence_token_logprobs(model, params["policy"], tokens, segment_ids, mask, temperature=temperature)
        gap = jnp.where(mask, logprobs - generation.logprobs, 0.0)
        return batch, {
            **metrics,
            "sampling/sampling_logp_difference/mean": masked_mean(jnp.abs(gap), mask),
            "sampling/sampling_logp_difference/max": jnp.abs(gap).max(),
            "sampling/importance_sampling_ratio/mean": masked_mean(jnp.exp(gap), mask),
        }

    return experience


def rollout_metrics(generation: Generation, scores: jax.Array, ref_logprobs: jax.Array, kl_coef: jax.Array) -> Metrics:
    """Means over completions; KL and entropy in nats per completion, lengths in tokens."""
    mask = generation.completion_mask
    kl = masked_sum(k1(generation.logprobs, ref_logprobs), mask, axis=1)
    return {
        "objective/kl": kl.mean(),
        "objective/kl_coef": kl_coef,
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/non_score_reward": -kl_coef * kl.mean(),
        "objective/rlhf_reward": (scores - kl_coef * kl).mean(),
        "objective/entropy": masked_sum(-generation.logprobs, mask, axis=1).mean(),
        "response/len_mean": mask.sum(axis=1).astype(jnp.float32).mean(),
        "response/eos_frac": generation.ended.astype(jnp.float32).mean(),
    }
