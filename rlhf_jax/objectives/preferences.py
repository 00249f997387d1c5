"""Direct methods: learn a policy from comparisons, without a reward model."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from rlhf_jax.functional.logprobs import mean_logprobs
from rlhf_jax.functional.masking import masked_sum
from rlhf_jax.functional.preference_inputs import against_reference, sums_and_nll
from rlhf_jax.functional.preference_losses import kto_baseline
from rlhf_jax.objectives.forward import sequence_token_logprobs
from rlhf_jax.objectives.shared_prompts import SharedPrompts, shared_token_logprobs
from rlhf_jax.types import CausalModel, LabelledBatch, Objective, Params, PreferenceBatch

PairInputsFn: TypeAlias = Callable[[jax.Array, jax.Array | None, jax.Array], tuple[jax.Array, ...]]
"""`inputs(logprobs [B, 2, T], ref_logprobs [B, 2, T] | None, completion_mask) -> the loss's arguments, each [B]`."""


def preference(
    model: CausalModel,
    loss_fn: Callable[..., jax.Array],
    *,
    beta: float,
    inputs_fn: PairInputsFn = against_reference,
    nll_coef: float = 0.0,
    shared: SharedPrompts | None = None,
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
      shared: run the prompt of a pair once; None runs it twice.
    """

    def objective(params: Params, batch: PreferenceBatch):
        logprobs = pair_token_logprobs(model, params, batch, shared)
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


def labelled_preference(
    model: CausalModel, loss_fn: Callable[..., jax.Array], *, beta: float = 0.1, shared: SharedPrompts | None = None
) -> Objective:
    """KTO: completions labelled good or bad, `loss_fn(logprobs, ref_logprobs, desirable, kl=z, beta=beta)`.

    Its reference point z is a mean over the batch at hand (`kto_baseline`), so this objective alone depends on how a
    batch is split: micro-batches each estimate their own z. Devices share one, since they hold one batch. Keep batches of
    a few dozen rows or more; the paper uses 32. With `shared` both completions of a row run their prompt once.
    """

    def objective(params: Params, batch: LabelledBatch):
        logprobs = pair_token_logprobs(model, params, batch, shared)
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


def pair_token_logprobs(
    model: CausalModel, params: Params, batch: PreferenceBatch | LabelledBatch, shared: SharedPrompts | None = None
) -> jax.Array:
    """Token log-probs `[B, 2, T]` of both rows of every pair; under the reference's `params` they are `ref_logprobs`.

    With `shared` a pair's prompt is run once; see `shared_prompts`.
    """
    if shared is not None:
        return shared_token_logprobs(model, params, batch, shared)
    flat = (-1, batch.tokens.shape[-1])
    rows = (x.reshape(flat) for x in (batch.tokens, batch.segment_ids, batch.completion_mask))
    return sequence_token_logprobs(model, params, *rows).reshape(batch.tokens.shape)
