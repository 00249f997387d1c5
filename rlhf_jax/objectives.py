"""Objectives: a model's forward bound to the losses of floor 1.

Every objective is `objective(params, batch) -> (total, weight, metrics)`: the loss is `total / weight`, divided once after
all micro-batches and devices have added theirs, so neither can change a gradient. Metrics travel in the same form.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.functional.kl import k2
from rlhf_jax.functional.logprobs import entropy, token_logprobs
from rlhf_jax.functional.masking import masked_sum, positions_from_segments, shift_right
from rlhf_jax.functional.policy_losses import clipped_policy_loss, clipped_value_loss
from rlhf_jax.functional.reward_losses import pairwise_ranking_loss
from rlhf_jax.models.heads import scalar_head, sequence_scores
from rlhf_jax.types import CausalModel, Experience, Objective, Params, RankingBatch, SequenceBatch

CriticFn: TypeAlias = Callable[[Params, jax.Array, jax.Array, jax.Array], jax.Array]
"""`critic(critic_params, policy_hidden [B, T, D], tokens, segment_ids) -> values [B, T]`, token-aligned."""


def policy_hidden(model: CausalModel, params: Params, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Hidden states `[B, T, D]` of whole rows, positions counted from their segments."""
    return model.hidden(params, tokens, positions_from_segments(segment_ids), segment_ids)[0]


def sequence_token_logprobs(
    model: CausalModel, params: Params, tokens: jax.Array, segment_ids: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """`log p(token | tokens before it)`, `[B, T]`: the one forward that scoring, training and references share."""
    logits = model.unembed(params, policy_hidden(model, params, tokens, segment_ids))
    return token_logprobs(logits, tokens, temperature=temperature)


def sft(model: CausalModel) -> Objective:
    """Negative log-likelihood of the demonstrations' completion tokens, in nats per token."""

    def objective(params: Params, batch: SequenceBatch):
        logits = model.unembed(params, policy_hidden(model, params, batch.tokens, batch.segment_ids))
        logprobs = token_logprobs(logits, batch.tokens)
        total = masked_sum(-logprobs, batch.loss_mask)
        weight = batch.loss_mask.sum().astype(jnp.float32)
        hits = shift_right(jnp.argmax(logits, axis=-1)) == batch.tokens
        return total, weight, {"sft/nll": (total, weight), "sft/accuracy": (masked_sum(hits, batch.loss_mask), weight)}

    return objective


def reward_model(
    model: CausalModel, *, label_smoothing: float = 0.0, centering_coef: float = 0.0, mean_over_completion: bool = False
) -> Objective:
    """Bradley-Terry over all ordered pairs of a prompt's K responses, each response scored once (InstructGPT, §3.5).

    The weight is the number of prompts with at least one ordered pair. `rm/accuracy` is over pairs. Scores are read at
    the last token, or averaged over the completion's.
    """

    def objective(params: Params, batch: RankingBatch):
        num_prompts, num_responses, length = batch.tokens.shape
        flat = (num_prompts * num_responses, length)
        tokens, segment_ids, completions = (
            x.reshape(flat) for x in (batch.tokens, batch.segment_ids, batch.completion_mask)
        )
        mean_over = completions if mean_over_completion else None
        scores = sequence_scores(model, params, tokens, segment_ids, mean_over).reshape(num_prompts, num_responses)
        losses = pairwise_ranking_loss(
            scores, batch.ranks, batch.mask, label_smoothing=label_smoothing, centering_coef=centering_coef
        )
        better = (batch.ranks[:, :, None] < batch.ranks[:, None, :]) & batch.mask[:, :, None] & batch.mask[:, None, :]
        gaps = scores[:, :, None] - scores[:, None, :]
        num_pairs = better.sum().astype(jnp.float32)
        total = losses.sum()
        weight = jnp.any(better, axis=(1, 2)).sum().astype(jnp.float32)
        metrics = {
            "rm/loss": (total, weight),
            "rm/accuracy": (masked_sum((gaps > 0) + 0.5 * (gaps == 0), better), num_pairs),
            "rm/margin": (masked_sum(gaps, better), num_pairs),
        }
        return total, weight, metrics

    return objective


def separate_critic(model: CausalModel) -> CriticFn:
    """A critic with its own trunk: `critic_params = {"trunk": ..., "head": ...}` (Stiennon et al. 2020)."""

    def critic(params: Params, hidden: jax.Array, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        del hidden
        return shift_right(scalar_head(params["head"], policy_hidden(model, params["trunk"], tokens, segment_ids)))

    return critic


def shared_critic(params: Params, hidden: jax.Array, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """A head on the policy's own hidden states: `critic_params = {"head": ...}` (Ziegler et al. 2019)."""
    del tokens, segment_ids
    return shift_right(scalar_head(params["head"], hidden))


@struct.dataclass
class PolicyBatch:
    """What one policy update sees: experience and, row by row beside it, text to keep likely (PPO-ptx)."""

    experience: Experience
    demonstrations: SequenceBatch | None = None
    demonstration_weight: jax.Array | None = None  # [B] weight of each demonstration token of the row


def actor_critic(
    model: CausalModel,
    critic: CriticFn,
    *,
    temperature: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    value_clip: float = 0.2,
    vf_coef: float = 0.1,
    entropy_coef: float = 0.0,
) -> Objective:
    """PPO's loss per completion token (Schulman et al. 2017; defaults of Ziegler et al. 2019, lm-human-preferences).

    `policy + vf_coef * value - entropy_coef * entropy`, plus the weighted negative log-likelihood of the
    demonstrations when the batch brings some (PPO-ptx, Ouyang et al. 2022, eq. 2). `params` is
    `{"policy": ..., "critic": ...}`; `temperature` is the sampler's.
    """

    def objective(params: Params, batch: PolicyBatch):
        data, mask = batch.experience, batch.experience.mask
        hidden = policy_hidden(model, params["policy"], data.tokens, data.segment_ids)
        logits = model.unembed(params["policy"], hidden)
        logprobs = token_logprobs(logits, data.tokens, temperature=temperature)
        values = critic(params["critic"], hidden, data.tokens, data.segment_ids)
        entropies = entropy(logits, temperature=temperature)
        policy_losses = clipped_policy_loss(
            logprobs, data.old_logprobs, data.advantages, clip_low=clip_low, clip_high=clip_high
        )
        value_losses = clipped_value_loss(values, data.old_values, data.returns, clip=value_clip)
        weight = mask.sum().astype(jnp.float32)
        total = masked_sum(policy_losses + vf_coef * value_losses - entropy_coef * entropies, mask)
        ratio = jnp.exp(jnp.where(mask, logprobs - data.old_logprobs, 0.0))
        clipped = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
        value_clipped = jnp.abs(values - data.old_values) > value_clip
        metrics = {
            "loss/policy_avg": (masked_sum(policy_losses, mask), weight),
            "loss/value_avg": (masked_sum(value_losses, mask), weight),
            "policy/entropy_avg": (masked_sum(entropies, mask), weight),
            "policy/approxkl_avg": (masked_sum(k2(logprobs, data.old_logprobs), mask), weight),
            "policy/clipfrac_avg": (masked_sum(clipped, mask), weight),
            "val/ratio": (masked_sum(ratio, mask), weight),
            "val/clipfrac_avg": (masked_sum(value_clipped, mask), weight),
        }
        if batch.demonstrations is not None:
            nll, metrics["loss/ptx_avg"] = _weighted_nll(model, params["policy"], batch)
            total = total + nll
        return total, weight, metrics

    return objective


def _weighted_nll(model: CausalModel, params: Params, batch: PolicyBatch):
    """Weighted sum of the demonstrations' token losses, and their plain (total, weight)."""
    data = batch.demonstrations
    logprobs = sequence_token_logprobs(model, params, data.tokens, data.segment_ids)
    nll = -masked_sum(logprobs, data.loss_mask, axis=1)
    return (nll * batch.demonstration_weight).sum(), (nll.sum(), data.loss_mask.sum().astype(jnp.float32))
