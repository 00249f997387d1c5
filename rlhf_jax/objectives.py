"""Objectives: a model's forward bound to the losses of floor 1.

Every objective is `objective(params, batch) -> (total, weight, metrics)`: the loss is `total / weight`, divided once after
all micro-batches and devices have added theirs, so neither can change a gradient. Metrics travel in the same form.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.functional.aggregation import token_mean
from rlhf_jax.functional.kl import k1, k2
from rlhf_jax.functional.logprobs import entropy, mean_logprobs, token_logprobs
from rlhf_jax.functional.masking import masked_sum, positions_from_segments, shift_right
from rlhf_jax.functional.policy_losses import clipped_policy_loss, clipped_value_loss
from rlhf_jax.functional.preference_inputs import against_reference, sums_and_nll
from rlhf_jax.functional.preference_losses import kto_baseline
from rlhf_jax.functional.reward_losses import pairwise_ranking_loss, regression_loss, step_reward_loss
from rlhf_jax.models.heads import scalar_head, sequence_attributes, sequence_scores
from rlhf_jax.types import (
    CausalModel,
    Experience,
    LabelledBatch,
    Objective,
    Params,
    PreferenceBatch,
    RankingBatch,
    SequenceBatch,
)

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


RankingLossFn: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`loss(scores [B, K], ranks [B, K], mask [B, K]) -> losses [B]`, as `plackett_luce_loss` or `first_choice_loss`."""


def reward_model(
    model: CausalModel,
    *,
    ranking_loss: RankingLossFn | None = None,
    label_smoothing: float = 0.0,
    centering_coef: float = 0.0,
    mean_over_completion: bool = False,
) -> Objective:
    """A loss over the scores of a prompt's K responses, each response scored once (InstructGPT, §3.5).

    By default Bradley-Terry over all ordered pairs with these coefficients; `ranking_loss` takes the place of it and of
    them. Prompts may have any number of responses up to K, and ties. A prompt without an ordered pair prefers nothing and
    is left out, whatever the loss: the weight is the number of the others. `rm/accuracy` is over pairs. Scores are read at
    the last token, or averaged over the completion's.
    """
    if ranking_loss is None:
        ranking_loss = partial(pairwise_ranking_loss, label_smoothing=label_smoothing, centering_coef=centering_coef)
    elif label_smoothing or centering_coef:
        raise ValueError(
            "label_smoothing and centering_coef belong to the default loss and ranking_loss replaces it; "
            "fix: give one or the other (functools.partial binds a loss to its coefficients)"
        )

    def objective(params: Params, batch: RankingBatch):
        num_prompts, num_responses, length = batch.tokens.shape
        flat = (num_prompts * num_responses, length)
        tokens, segment_ids, completions = (
            x.reshape(flat) for x in (batch.tokens, batch.segment_ids, batch.completion_mask)
        )
        mean_over = completions if mean_over_completion else None
        scores = sequence_scores(model, params, tokens, segment_ids, mean_over).reshape(num_prompts, num_responses)
        better = (batch.ranks[:, :, None] < batch.ranks[:, None, :]) & batch.mask[:, :, None] & batch.mask[:, None, :]
        gaps = scores[:, :, None] - scores[:, None, :]
        num_pairs = better.sum().astype(jnp.float32)
        prefers = jnp.any(better, axis=(1, 2))
        total = masked_sum(ranking_loss(scores, batch.ranks, batch.mask), prefers)
        weight = prefers.sum().astype(jnp.float32)
        metrics = {
            "rm/loss": (total, weight),
            "rm/accuracy": (masked_sum((gaps > 0) + 0.5 * (gaps == 0), better), num_pairs),
            "rm/margin": (masked_sum(gaps, better), num_pairs),
        }
        return total, weight, metrics

    return objective


@struct.dataclass
class AttributeBatch:
    """Answers with ratings of A attributes; a label that nobody gave is masked."""

    tokens: jax.Array  # [B, T] prompt and answer
    segment_ids: jax.Array  # [B, T], 0 = padding
    targets: jax.Array  # [B, A]
    mask: jax.Array  # [B, A], False = no label


def attribute_regression(model: CausalModel) -> Objective:
    """Squared error of an attribute head, mean over the labels there are (HelpSteer, Wang et al. 2023).

    `params` is `{"trunk": ..., "head": init_attribute_head(...)}`; A = 1 regresses one score. See `combine_attributes`.
    """

    def objective(params: Params, batch: AttributeBatch):
        predictions = sequence_attributes(model, params, batch.tokens, batch.segment_ids)
        total = regression_loss(predictions, batch.targets, batch.mask).sum()
        weight = batch.mask.sum().astype(jnp.float32)
        errors = masked_sum(jnp.abs(predictions - batch.targets), batch.mask)
        return total, weight, {"rm/loss": (total, weight), "rm/abs_error": (errors, weight)}

    return objective


@struct.dataclass
class StepBatch:
    """Answers in steps, each step judged on its last token."""

    tokens: jax.Array  # [B, T]
    segment_ids: jax.Array  # [B, T], 0 = padding
    labels: jax.Array  # [B, T] in [0, 1], 1 = a good step
    step_mask: jax.Array  # [B, T], True on the last token of every labelled step


def process_reward(
    model: CausalModel, *, step_loss: Callable[..., jax.Array] = step_reward_loss, threshold: float = 0.0
) -> Objective:
    """A loss on the scalar head at the last token of every step, mean over steps (Lightman et al. 2023).

    The head at a step's last token has read the whole step. `step_loss(predictions, labels, mask) -> [B, T]`; with
    `regression_loss` predictions are on the labels' scale and the `threshold` above which `rm/accuracy` takes a step for
    good is 0.5, the labels' own.
    """

    def objective(params: Params, batch: StepBatch):
        hidden = policy_hidden(model, params["trunk"], batch.tokens, batch.segment_ids)
        predictions = scalar_head(params["head"], hidden)
        total = step_loss(predictions, batch.labels, batch.step_mask).sum()
        weight = batch.step_mask.sum().astype(jnp.float32)
        hits = masked_sum((predictions > threshold) == (batch.labels > 0.5), batch.step_mask)
        return total, weight, {"rm/loss": (total, weight), "rm/accuracy": (hits, weight)}

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
    dual_clip: float | None = None,
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
            logprobs,
            data.old_logprobs,
            data.advantages,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
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


def policy_gradient(
    model: CausalModel,
    loss_fn: Callable[..., jax.Array],
    *,
    aggregate: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] = token_mean,
    temperature: float = 1.0,
    kl_coef: float = 0.0,
    kl_fn: Callable[[jax.Array, jax.Array], jax.Array] = k2,
    entropy_coef: float = 0.0,
) -> Objective:
    """A policy without a critic: GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE++, ReMax, as the functions passed.

    `aggregate(loss + kl_coef * kl - entropy_coef * entropy)`, where `params` is `{"policy": ...}` and the batch a
    `PolicyBatch`.

    Args:
      model: the policy's functions.
      loss_fn: `(logprobs, old_logprobs, advantages, mask=mask) -> losses [B, T]`; hyper-parameters by `functools.partial`.
      aggregate: `(losses, mask) -> (total, weight)`, from `functional.aggregation`.
      temperature: the sampler's.
      kl_coef: weight of the KL in the loss, per token. For a KL in the reward leave it 0.
      kl_fn: `k2`, whose gradient is that of KL(policy, reference); `k3_straight_through` logs k3 and has the gradient of
        k2; `k3` is what GRPO was published with (Shao et al. 2024, eq. 4), and pulls at the reverse KL.
      entropy_coef: weight of an entropy bonus.

    Raises:
      ValueError: `kl_fn` is k1, whose expected gradient is 0; or, while tracing, a batch lacks `ref_logprobs` though
        `kl_coef` is not 0, or brings demonstrations, which only `actor_critic` mixes in.
    """
    if kl_coef and kl_fn is k1:
        raise ValueError("k1 in a loss restrains nothing (its expected gradient is 0); fix: kl_fn=k2")

    def objective(params: Params, batch: PolicyBatch):
        data, mask = batch.experience, batch.experience.mask
        if batch.demonstrations is not None:
            raise ValueError(
                "policy_gradient mixes in no demonstrations (PPO-ptx); fix: use actor_critic, or give none"
            )
        hidden = policy_hidden(model, params["policy"], data.tokens, data.segment_ids)
        logits = model.unembed(params["policy"], hidden)
        logprobs = token_logprobs(logits, data.tokens, temperature=temperature)
        entropies = entropy(logits, temperature=temperature)

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
        return total, weight, metrics

    return objective


def of_policy(objective: Objective) -> Objective:
    """An objective of a model's own parameters, applied to those of `{"policy": ...}` (RAFT, online DPO)."""
    return lambda params, batch: objective(params["policy"], batch)


PairInputsFn: TypeAlias = Callable[[jax.Array, jax.Array | None, jax.Array], tuple[jax.Array, ...]]
"""`inputs(logprobs [B, 2, T], ref_logprobs [B, 2, T] | None, completion_mask) -> the loss's arguments, each [B]`."""


def preference(
    model: CausalModel,
    loss_fn: Callable[..., jax.Array],
    *,
    beta: float,
    inputs_fn: PairInputsFn = against_reference,
    nll_coef: float = 0.0,
) -> Objective:
    """Direct methods on pairs: DPO, cDPO, robust DPO, IPO, SimPO, ORPO, CPO, as the functions passed.

    The weight is the number of pairs that are not masked. `rewards/*` are `beta` times the log-ratios to the reference
    (times the log-probs, without one) in the loss's own normalisation; `logps/*` are sums, in nats per completion. Both
    falling while the margin grows is common; `nll_coef` holds the chosen one up.

    Args:
      model: the policy's functions.
      loss_fn: `(*inputs, beta=beta) -> losses [B]`, from `functional.preference_losses`.
      beta: passed on; the methods' own defaults differ and mean different things.
      inputs_fn: what `loss_fn` is told, from `functional.preference_inputs`. Sums or means is part of the method.
      nll_coef: weight of the chosen completion's loss per token, beside what `loss_fn` has (Pang et al. 2024 use 1).
    """

    def objective(params: Params, batch: PreferenceBatch):
        logprobs = pair_token_logprobs(model, params, batch)
        completions, mask = batch.completion_mask, batch.mask
        inputs = inputs_fn(logprobs, batch.ref_logprobs, completions)
        losses = loss_fn(*inputs, beta=beta)
        if nll_coef:
            losses = losses - nll_coef * mean_logprobs(logprobs[:, 0], completions[:, 0])
        total, weight = masked_sum(losses, mask), mask.sum().astype(jnp.float32)
        references = inputs[2:] if len(inputs) == 4 else (0.0, 0.0)
        chosen, rejected = (beta * (x - ref) for x, ref in zip(inputs[:2], references, strict=True))
        sums = sums_and_nll(logprobs, None, completions)
        columns = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected) + 0.5 * (chosen == rejected),
            "rewards/margins": chosen - rejected,
            "logps/chosen": sums[0],
            "logps/rejected": sums[1],
        }
        return total, weight, {name: (masked_sum(column, mask), weight) for name, column in columns.items()}

    return objective


def labelled_preference(model: CausalModel, loss_fn: Callable[..., jax.Array], *, beta: float = 0.1) -> Objective:
    """KTO: completions labelled good or bad, `loss_fn(logprobs, ref_logprobs, desirable, kl=z, beta=beta)`.

    Its reference point z is a mean over the batch at hand (`kto_baseline`), so this objective alone depends on how a
    batch is split: micro-batches each estimate their own z. Devices share one, since they hold one batch. Keep batches of
    a few dozen rows or more; the paper uses 32.
    """

    def objective(params: Params, batch: LabelledBatch):
        logprobs = pair_token_logprobs(model, params, batch)
        own, mismatched, ref_own, ref_mismatched = against_reference(
            logprobs, batch.ref_logprobs, batch.completion_mask
        )
        kl = kto_baseline(mismatched, ref_mismatched)
        losses = loss_fn(own, ref_own, batch.desirable, kl=kl, beta=beta)
        total, weight = losses.sum(), jnp.asarray(losses.shape[0], jnp.float32)
        metrics = {"kto/kl": (weight * kl, weight)}
        for name, rows in (("chosen", batch.desirable), ("rejected", ~batch.desirable)):
            count = rows.sum().astype(jnp.float32)
            metrics[f"rewards/{name}"] = (beta * masked_sum(own - ref_own, rows), count)
            metrics[f"logps/{name}"] = (masked_sum(own, rows), count)
        return total, weight, metrics

    return objective


def pair_token_logprobs(model: CausalModel, params: Params, batch: PreferenceBatch | LabelledBatch) -> jax.Array:
    """Token log-probs `[B, 2, T]` of both rows of every pair; under the reference's `params` they are `ref_logprobs`."""
    flat = (-1, batch.tokens.shape[-1])
    tokens, segment_ids = batch.tokens.reshape(flat), batch.segment_ids.reshape(flat)
    return sequence_token_logprobs(model, params, tokens, segment_ids).reshape(batch.tokens.shape)


def _weighted_nll(model: CausalModel, params: Params, batch: PolicyBatch):
    """Weighted sum of the demonstrations' token losses, and their plain (total, weight)."""
    data = batch.demonstrations
    logprobs = sequence_token_logprobs(model, params, data.tokens, data.segment_ids)
    nll = -masked_sum(logprobs, data.loss_mask, axis=1)
    return (nll * batch.demonstration_weight).sum(), (nll.sum(), data.loss_mask.sum().astype(jnp.float32))
