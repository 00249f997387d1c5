"""Act 3: learn from scored samples, with a critic or without."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.functional.aggregation import token_mean
from rlhf_jax.functional.kl import k1, k2
from rlhf_jax.functional.masking import masked_sum, shift_right
from rlhf_jax.functional.policy_losses import clipped_policy_loss, clipped_value_loss
from rlhf_jax.models.heads import scalar_head
from rlhf_jax.objectives.forward import completions, policy_hidden, policy_laws, sequence_token_logprobs
from rlhf_jax.objectives.gradient_first import gradient_first
from rlhf_jax.types import CausalModel, Experience, Objective, Params, SequenceBatch

CriticFn: TypeAlias = Callable[[Params, jax.Array | None, jax.Array, jax.Array], jax.Array]
"""`critic(critic_params, policy_hidden [B, T, D], tokens, segment_ids) -> values [B, T]`, token-aligned. Where its caller has
`completion_columns` N, hidden states and values may be those of the last N + 1 columns; with `critic_first` there are none."""


def separate_critic(model: CausalModel, *, completion_columns: int | None = None) -> CriticFn:
    """A critic with its own trunk: `critic_params = {"trunk": ..., "head": ...}` (Stiennon et al. 2020).

    `completion_columns` as its caller's, `actor_critic` and `make_experience_fn`.
    """

    def critic(params: Params, hidden: jax.Array | None, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        del hidden
        options = {"completion_columns": completion_columns}
        hidden = policy_hidden(model, params["trunk"], tokens, segment_ids, **options)
        return shift_right(scalar_head(params["head"], hidden))

    return critic


def shared_critic(params: Params, hidden: jax.Array | None, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """A head on the policy's own hidden states: `critic_params = {"head": ...}` (Ziegler et al. 2019)."""
    del tokens, segment_ids
    if hidden is None:
        raise ValueError(
            "critic_first: shared_critic reads the policy's states, which come later; fix: separate_critic"
        )
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
    dual_clip: float | None = None,
    value_clip: float = 0.2,
    vf_coef: float = 0.1,
    entropy_coef: float | jax.Array = 0.0,
    completion_columns: int | None = None,
    critic_first: bool = False,
) -> Objective:
    """PPO's loss per completion token (Schulman et al. 2017; defaults of Ziegler et al. 2019, lm-human-preferences).

    `policy + vf_coef * value - entropy_coef * entropy`, plus the weighted negative log-likelihood of the
    demonstrations when the batch brings some (PPO-ptx, Ouyang et al. 2022, eq. 2). `params` is
    `{"policy": ..., "critic": ...}`; `temperature` is the sampler's.

    `completion_columns`, the sampler's `max_new_tokens`: completions lie in so many last columns, and only there, and in the
    column before, are states wanted and logits made. None asks nothing of the rows and computes all.

    `critic_first`, for a critic that does not read the policy's hidden states: its gradient is there before the policy runs
    (`gradient_first`), so that the activations of one network are in memory, not of two, where layers are unrolled. The same
    to rounding.

    Raises:
      ValueError: `critic_first` with `shared_critic`, while tracing.
    """

    pick = completions(completion_columns)
    no_bonus = isinstance(entropy_coef, int | float) and entropy_coef == 0  # then no gradient of entropies is computed

    def of_values(
        critic_params: Params, experience: Experience, hidden: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """Losses `[B, T]`, and where values are further from the old ones than the clip."""
        values = pick(critic(critic_params, hidden, experience.tokens, experience.segment_ids))
        data = jax.tree.map(pick, experience)
        losses = clipped_value_loss(values, data.old_values, data.returns, clip=value_clip)
        return losses, jnp.abs(values - data.old_values) > value_clip

    def of_all_values(critic_params: Params, experience: Experience) -> tuple[jax.Array, jax.Array]:
        losses, clipped = of_values(critic_params, experience, None)
        return masked_sum(losses, pick(experience.mask)), masked_sum(clipped, pick(experience.mask))

    def objective(params: Params, batch: PolicyBatch):
        rows = (batch.experience.tokens, batch.experience.segment_ids)
        if critic_first:
            value, value_clipped, rows = gradient_first(of_all_values, params["critic"], batch.experience, rows)
        hidden = policy_hidden(model, params["policy"], *rows, completion_columns=completion_columns)
        data = jax.tree.map(pick, batch.experience)
        mask = data.mask
        laws = policy_laws(model, params["policy"], hidden, data.tokens, mask, temperature=temperature)
        logprobs, entropies = laws.logprobs, laws.entropies
        policy_losses = clipped_policy_loss(
            logprobs,
            data.old_logprobs,
            data.advantages,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
        )
        weight = mask.sum().astype(jnp.float32)
        losses = policy_losses
        if not critic_first:
            value_losses, clipped = of_values(params["critic"], batch.experience, hidden)
            value, value_clipped = masked_sum(value_losses, mask), masked_sum(clipped, mask)
            losses = losses + vf_coef * value_losses
        if not no_bonus:
            losses = losses - entropy_coef * entropies
        total = masked_sum(losses, mask)
        if critic_first:
            total = total + vf_coef * value
        ratio = jnp.exp(jnp.where(mask, logprobs - data.old_logprobs, 0.0))
        clipped = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
        metrics = {
            "loss/policy_avg": (masked_sum(policy_losses, mask), weight),
            "loss/value_avg": (value, weight),
            "policy/entropy_avg": (masked_sum(entropies, mask), weight),
            "policy/approxkl_avg": (masked_sum(k2(logprobs, data.old_logprobs), mask), weight),
            "policy/clipfrac_avg": (masked_sum(clipped, mask), weight),
            "val/ratio": (masked_sum(ratio, mask), weight),
            "val/clipfrac_avg": (value_clipped, weight),
        }
        if batch.demonstrations is not None:
            nll, metrics["loss/ptx_avg"] = _weighted_nll(model, params["policy"], batch)
            total = total + nll
        return total, weight, metrics

    return objective


def policy_gradient(
    model: CausalModel,
    loss_fn: Callable[..., jax.Array],
    *,
    aggregate: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] = token_mean,
    temperature: float = 1.0,
    kl_coef: float = 0.0,
    kl_fn: Callable[[jax.Array, jax.Array], jax.Array] = k2,
    entropy_coef: float = 0.0,
    completion_columns: int | None = None,
) -> Objective:
    """A policy without a critic: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE++, ReMax, as the functions passed.

    `aggregate(loss + kl_coef * kl - entropy_coef * entropy)`, where `params` is `{"policy": ...}` and the batch a
    `PolicyBatch`; plus, as in `actor_critic`, the weighted negative log-likelihood of demonstrations that it brings
    (PPO-ptx, Ouyang et al. 2022).

    Args:
      model: the policy's functions.
      loss_fn: `(logprobs, old_logprobs, advantages, mask=mask) -> losses [B, T]`; hyper-parameters by `functools.partial`.
      aggregate: `(losses, mask) -> (total, weight)`, from `functional.aggregation`.
      temperature: the sampler's.
      kl_coef: weight of the KL in the loss, per token. For a KL in the reward leave it 0.
      kl_fn: `k2`, whose gradient is that of KL(policy, reference); `k3_straight_through` logs k3 and has the gradient of
        k2; `k3` is what GRPO was published with (Shao et al. 2024, eq. 4), and pulls at the reverse KL.
      entropy_coef: weight of an entropy bonus.
      completion_columns: as in `actor_critic`.

    Raises:
      ValueError: `kl_fn` is k1, whose expected gradient is 0; or, while tracing, a batch lacks `ref_logprobs` though
        `kl_coef` is not 0.
    """
    if kl_coef and kl_fn is k1:
        raise ValueError("k1 in a loss restrains nothing (its expected gradient is 0); fix: kl_fn=k2")

    pick = completions(completion_columns)

    def objective(params: Params, batch: PolicyBatch):
        rows = (batch.experience.tokens, batch.experience.segment_ids)
        hidden = policy_hidden(model, params["policy"], *rows, completion_columns=completion_columns)
        data = jax.tree.map(pick, batch.experience)
        mask = data.mask
        laws = policy_laws(model, params["policy"], hidden, data.tokens, mask, temperature=temperature)
        logprobs, entropies = laws.logprobs, laws.entropies

        def losses_of(logprobs: jax.Array) -> jax.Array:
            return loss_fn(logprobs, data.old_logprobs, data.advantages, mask=mask)

        losses = policy_losses = losses_of(logprobs)
        metrics = {}
        if kl_coef:
            if data.ref_logprobs is None:
                raise ValueError("kl_coef is not 0 and the experience has no ref_logprobs; fix: compute them with it")
            kl = kl_fn(logprobs, data.ref_logprobs)
            losses = losses + kl_coef * jnp.where(mask, kl, 0.0)
            metrics["loss/kl_avg"] = aggregate(kl, mask)
        if entropy_coef:
            losses = losses - entropy_coef * entropies
        total, weight = aggregate(losses, mask)
        tokens = mask.sum().astype(jnp.float32)
        ratio = jnp.exp(jnp.where(mask, logprobs - data.old_logprobs, 0.0))
        # A clipped token is one that has an advantage and no gradient, whatever the loss.
        slopes = jax.grad(lambda x: losses_of(x).sum())(jax.lax.stop_gradient(logprobs))
        metrics |= {
            "loss/policy_avg": aggregate(policy_losses, mask),
            "policy/entropy_avg": (masked_sum(entropies, mask), tokens),
            "policy/approxkl_avg": (masked_sum(k2(logprobs, data.old_logprobs), mask), tokens),
            "clip_ratio/region_mean": (masked_sum((slopes == 0) & (data.advantages != 0), mask), tokens),
            "val/ratio": (masked_sum(ratio, mask), tokens),
        }
        if batch.demonstrations is not None:
            nll, metrics["loss/ptx_avg"] = _weighted_nll(model, params["policy"], batch)
            total = total + nll
        return total, weight, metrics

    return objective


def of_policy(objective: Objective) -> Objective:
    """An objective of a model's own parameters, applied to those of `{"policy": ...}` (RAFT, online DPO)."""
    return lambda params, batch: objective(params["policy"], batch)


def _weighted_nll(model: CausalModel, params: Params, batch: PolicyBatch):
    """Weighted sum of the demonstrations' token losses, and their plain (total, weight)."""
    data = batch.demonstrations
    logprobs = sequence_token_logprobs(model, params, data.tokens, data.segment_ids, data.loss_mask)
    nll = -masked_sum(logprobs, data.loss_mask, axis=1)
    return (nll * batch.demonstration_weight).sum(), (nll.sum(), data.loss_mask.sum().astype(jnp.float32))
