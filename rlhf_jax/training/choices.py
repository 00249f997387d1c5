"""Choosing between completions: winners to imitate (RAFT), pairs for direct methods, made on line or from rankings."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.functional.reward_losses import ordered_pairs
from rlhf_jax.generation.best_of_n import best_rows
from rlhf_jax.objectives import policy_hidden, policy_laws, sequence_token_logprobs
from rlhf_jax.training.rollout import rollout_metrics
from rlhf_jax.types import (
    CausalModel,
    Generation,
    LabelledBatch,
    Metrics,
    Params,
    PreferenceBatch,
    RankingBatch,
    SequenceBatch,
)


def best_of_group(generation: Generation, scores: jax.Array, *, group_size: int) -> SequenceBatch:
    """The best completion of every prompt, as demonstrations; of equal ones the first (RAFT, Dong et al. 2023).

    Diversity falls with every round: watch `objective/entropy`.

    Args:
      generation: B rows in groups, as `generate` returns them with `samples_per_prompt`.
      scores: `[B]`.
      group_size: samples per prompt; 4 to 16 are usual.
    """
    rows = best_rows(scores, group_size=group_size)
    return SequenceBatch(generation.tokens[rows], generation.segment_ids[rows], generation.completion_mask[rows])


def best_and_worst(
    generation: Generation, scores: jax.Array, ref_logprobs: jax.Array | None = None, *, group_size: int = 2
) -> PreferenceBatch:
    """The best completion of every prompt against the worst; a group of equal scores is a tie and masked.

    Scores are to hold the penalty for a missing end of sequence before they label (`make_score_fn` takes it off), or
    unfinished completions win. `group_size=2` is online DPO (Guo et al. 2024).

    Args:
      generation: B rows in groups, as `generate` returns them with `samples_per_prompt`.
      scores: `[B]`.
      ref_logprobs: `[B, T]` of the same rows under the reference, at temperature 1, or None; they go with their rows.
      group_size: samples per prompt.
    """
    groups = scores.reshape(-1, group_size)
    starts = jnp.arange(0, scores.shape[0], group_size)
    rows = jnp.stack([starts + jnp.argmax(groups, axis=1), starts + jnp.argmin(groups, axis=1)], axis=1)
    pairs = (x[rows] for x in (generation.tokens, generation.segment_ids, generation.completion_mask))
    chosen_refs = None if ref_logprobs is None else ref_logprobs[rows]
    return PreferenceBatch(*pairs, mask=groups.max(axis=1) > groups.min(axis=1), ref_logprobs=chosen_refs)


def make_best_of_experience_fn(
    model: CausalModel, *, group_size: int, temperature: float = 1.0
) -> Callable[..., tuple[SequenceBatch, Metrics]]:
    """Build RAFT's `experience(params, ref_params, generation, scores, kl_coef) -> (SequenceBatch, metrics)`.

    For `make_batch_update` with the objective `of_policy(sft(model))`. The reference serves the metric `objective/kl`
    alone: nothing holds the policy near it but the number of rounds.
    """

    def experience(params: Params, ref_params: Params, generation: Generation, scores: jax.Array, kl_coef: jax.Array):
        del params, kl_coef
        rows = (generation.tokens, generation.segment_ids, generation.completion_mask)
        ref_logprobs = sequence_token_logprobs(model, ref_params, *rows, temperature=temperature)
        metrics = rollout_metrics(generation, scores, ref_logprobs, jnp.zeros(()))
        metrics["objective/best_scores"] = scores.reshape(-1, group_size).max(axis=1).mean()
        return best_of_group(generation, scores, group_size=group_size), metrics

    return experience


def make_pair_experience_fn(
    model: CausalModel, *, group_size: int = 2, temperature: float = 1.0
) -> Callable[..., tuple[PreferenceBatch, Metrics]]:
    """Build online DPO's `experience(params, ref_params, generation, scores, kl_coef) -> (PreferenceBatch, metrics)`.

    For `make_batch_update` with the objective `of_policy(preference(model, dpo_loss, beta=...))`, whose log-probs are at
    temperature 1; `temperature` is the sampler's, for the metrics. `frac_ties` is the share of prompts that teach nothing.
    """

    def experience(params: Params, ref_params: Params, generation: Generation, scores: jax.Array, kl_coef: jax.Array):
        del params, kl_coef
        tokens, mask = generation.tokens, generation.completion_mask
        hidden = policy_hidden(model, ref_params, tokens, generation.segment_ids)
        at_sampling, ref_logprobs = (
            policy_laws(model, ref_params, hidden, tokens, mask, temperature=t).logprobs for t in (temperature, 1.0)
        )
        metrics = rollout_metrics(generation, scores, at_sampling, jnp.zeros(()))
        pairs = best_and_worst(generation, scores, ref_logprobs, group_size=group_size)
        metrics["frac_ties"] = 1.0 - pairs.mask.astype(jnp.float32).mean()
        return pairs, metrics

    return experience


def ranked_pairs(rankings: RankingBatch) -> PreferenceBatch:
    """Every ordered pair of every prompt, better first; ties give none. On the host, without `ref_logprobs`.

    Raises:
      ValueError: no two responses of one prompt differ in rank.
    """
    better = ordered_pairs(jnp.asarray(rankings.ranks), jnp.asarray(rankings.mask))
    row, first, second = np.nonzero(np.asarray(better))
    if not row.size:
        raise ValueError(f"{len(better)} rankings hold no ordered pair; fix: rankings that are not ties throughout")
    arrays = (rankings.tokens, rankings.segment_ids, rankings.completion_mask)
    pairs = (np.stack([np.asarray(x)[row, first], np.asarray(x)[row, second]], axis=1) for x in arrays)
    return PreferenceBatch(*pairs, mask=np.ones(row.size, bool))


def labelled_rows(pairs: PreferenceBatch, *, pad_id: int) -> LabelledBatch:
    """KTO's rows from pairs: the chosen is good, the rejected bad, each beside its prompt with another's completion.

    That completion is of the next row with another prompt. Rows are padded on the right to what the longest needs. On the
    host, without `ref_logprobs`.

    Raises:
      ValueError: all pairs have one prompt, so that nothing can be mismatched.
    """
    tokens, segments, completions = (np.asarray(x) for x in (pairs.tokens, pairs.segment_ids, pairs.completion_mask))
    rows = list(itertools.product(np.flatnonzero(np.asarray(pairs.mask)), (0, 1)))
    prompts = [tuple(tokens[at][(segments[at] > 0) & ~completions[at]].tolist()) for at in rows]
    answers = [tuple(tokens[at][completions[at]].tolist()) for at in rows]
    if len(set(prompts)) < 2:
        raise ValueError(
            f"{len(rows)} completions of one prompt cannot be mismatched; fix: pairs of two or more prompts"
        )
    num, others = len(rows), []
    for i in range(num):
        others.append(next(j % num for j in range(i + 1, i + num) if prompts[j % num] != prompts[i]))
    length = max(len(prompt) + max(len(answers[i]), len(answers[others[i]])) for i, prompt in enumerate(prompts))
    shape = (num, 2, length)
    out = (np.full(shape, pad_id, np.int32), np.zeros(shape, np.int32), np.zeros(shape, bool))
    for i, prompt in enumerate(prompts):
        for k, answer in enumerate((answers[i], answers[others[i]])):
            end = len(prompt) + len(answer)
            out[0][i, k, :end] = prompt + answer
            out[1][i, k, :end] = 1
            out[2][i, k, len(prompt) : end] = True
    return LabelledBatch(*out, desirable=np.array([side == 0 for _, side in rows]))
