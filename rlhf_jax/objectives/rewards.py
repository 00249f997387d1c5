"""Act 2: learn scores from rankings, from ratings of attributes, from judgements of steps."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.functional.masking import masked_sum
from rlhf_jax.functional.reward_losses import (
    ordered_pairs,
    pairwise_ranking_loss,
    regression_loss,
    step_reward_loss,
)
from rlhf_jax.models.heads import scalar_head, sequence_attributes, sequence_scores
from rlhf_jax.objectives.forward import policy_hidden
from rlhf_jax.objectives.shared_prompts import SharedPrompts, shared_scores
from rlhf_jax.types import CausalModel, Objective, Params, RankingBatch

RankingLossFn: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""`loss(scores [B, K], ranks [B, K], mask [B, K]) -> losses [B]`, as `plackett_luce_loss` or `first_choice_loss`."""


def reward_model(
    model: CausalModel,
    *,
    ranking_loss: RankingLossFn | None = None,
    label_smoothing: float = 0.0,
    centering_coef: float = 0.0,
    mean_over_completion: bool = False,
    shared: SharedPrompts | None = None,
) -> Objective:
    """A loss over the scores of a prompt's K responses, each response scored once (InstructGPT, §3.5).

    By default Bradley-Terry over all ordered pairs with these coefficients; `ranking_loss` takes the place of it and of
    them. Prompts may have any number of responses up to K, and ties. A prompt without an ordered pair prefers nothing and
    is left out, whatever the loss: the weight is the number of the others. `rm/accuracy` is over pairs. Scores are read at
    the last token, or averaged over the completion's. With `shared` the K responses run their prompt once.
    """
    if ranking_loss is None:
        ranking_loss = partial(pairwise_ranking_loss, label_smoothing=label_smoothing, centering_coef=centering_coef)
    elif label_smoothing or centering_coef:
        raise ValueError(
            "label_smoothing and centering_coef belong to the default loss and ranking_loss replaces it; "
            "fix: give one or the other (functools.partial binds a loss to its coefficients)"
        )

    def scores_of(params: Params, batch: RankingBatch) -> jax.Array:
        if shared is not None:
            return shared_scores(model, params, batch, shared, mean_over_completion=mean_over_completion)
        num_prompts, num_responses, length = batch.tokens.shape
        flat = (num_prompts * num_responses, length)
        tokens, segment_ids, completions = (
            x.reshape(flat) for x in (batch.tokens, batch.segment_ids, batch.completion_mask)
        )
        mean_over = completions if mean_over_completion else None
        return sequence_scores(model, params, tokens, segment_ids, mean_over).reshape(num_prompts, num_responses)

    def objective(params: Params, batch: RankingBatch):
        scores = scores_of(params, batch)
        better = ordered_pairs(batch.ranks, batch.mask)
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
