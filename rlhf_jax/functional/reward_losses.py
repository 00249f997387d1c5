"""Losses that learn a reward: from comparisons and rankings, one number per prompt, and from ratings and steps."""

import math

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from rlhf_jax.functional.checks import check_between
from rlhf_jax.functional.masking import masked_mean


def bradley_terry_loss(
    chosen_scores: Float[Array, "B"],
    rejected_scores: Float[Array, "B"],
    *,
    margin: Float[Array, "B"] | ScalarLike = 0.0,
    label_smoothing: ScalarLike = 0.0,
    centering_coef: ScalarLike = 0.0,
) -> Float[Array, "B"]:
    """Negative log-likelihood of a comparison (Bradley & Terry 1952; Christiano et al. 2017, eq. 1).

        BT(a, b) = -log σ(a - b - margin)
        loss = (1 - e) BT(r_c, r_r) + e BT(r_r, r_c) + centering_coef · (r_c + r_r)²

    Equal scores and no extras give ln 2. Without extras ∂loss/∂r_c = -σ(r_r - r_c) = -∂loss/∂r_r.

    Args:
      chosen_scores: `[B]` r_c.
      rejected_scores: `[B]` r_r.
      margin: score units, one number or `[B]`, 0 by default; larger for clearer preferences (Llama 2,
        Touvron et al. 2023). A flipped label asks for the same margin the other way.
      label_smoothing: e in [0, 0.5], the chance that a label is flipped; 0.05 in Christiano et al. 2017
        (one answer in ten at random).
      centering_coef: >= 0; pulls scores to mean 0, which comparisons leave free; 0.01 in Eisenstein et al.
        2023.

    Returns:
      Nats (plus the centering term), float32 `[B]`.

    Raises:
      ValueError: a Python number is out of its range.
    """
    chex.assert_equal_shape([chosen_scores, rejected_scores])
    _check_options(label_smoothing, centering_coef)
    chosen, rejected = (x.astype(jnp.float32) for x in (chosen_scores, rejected_scores))
    margin = jnp.broadcast_to(jnp.asarray(margin, jnp.float32), chosen.shape)
    return _comparison_loss(chosen, rejected, margin, label_smoothing, centering_coef)


def ordered_pairs(ranks: Int[Array, "B K"], mask: Bool[Array, "B K"]) -> Bool[Array, "B K K"]:
    """The comparisons that a ranking implies: `[b, i, j]` is True where i and j are kept and i ranks before j.

    Ties imply none. The K(K-1)/2 pairs of a ranking without ties are what Ouyang et al. 2022, §3.5, train on.

    Args:
      ranks: `[B, K]`, 0 = best, equal = tie; only their order counts.
      mask: `[B, K]`, False for places that hold no response.

    Returns:
      bool `[B, K, K]`.
    """
    chex.assert_equal_shape([ranks, mask])
    chex.assert_rank(ranks, 2)
    return (ranks[:, :, None] < ranks[:, None, :]) & mask[:, :, None] & mask[:, None, :]


def pairwise_ranking_loss(
    scores: Float[Array, "B K"],
    ranks: Int[Array, "B K"],
    mask: Bool[Array, "B K"],
    *,
    margin: ScalarLike = 0.0,
    label_smoothing: ScalarLike = 0.0,
    centering_coef: ScalarLike = 0.0,
) -> Float[Array, "B"]:
    """Mean Bradley-Terry loss over all ordered pairs of a prompt's K responses (Ouyang et al. 2022, eq. 1).

        loss[b] = 1/|P| Σ_{(i, j) in P} BT(s_i, s_j),    P = {(i, j): both kept, ranks_i < ranks_j}

    Each response is scored once and a prompt weighs the same whatever its K. Ties belong to no pair;
    without ties |P| is K(K-1)/2. K = 2 with ranks (0, 1) is `bradley_terry_loss`.

    Args:
      scores: `[B, K]`; whatever stands outside the mask is never read.
      ranks: `[B, K]`, 0 = best, equal = tie; only their order counts.
      mask: `[B, K]`, False for places that hold no response.
      margin: as in `bradley_terry_loss`, one number for all pairs.
      label_smoothing: as in `bradley_terry_loss`.
      centering_coef: as in `bradley_terry_loss`, once per pair.

    Returns:
      float32 `[B]`; 0, with gradient 0, for a prompt without any ordered pair. To average over prompts,
      divide by the number of those that have one.

    Raises:
      ValueError: a Python number is out of its range.
    """
    chex.assert_equal_shape([scores, ranks, mask])
    chex.assert_rank(scores, 2)
    _check_options(label_smoothing, centering_coef)
    scores = jnp.where(mask, scores.astype(jnp.float32), 0.0)
    in_order = ordered_pairs(ranks, mask)
    losses = _comparison_loss(scores[:, :, None], scores[:, None, :], margin, label_smoothing, centering_coef)
    return masked_mean(losses, in_order, axis=(1, 2))


def plackett_luce_loss(
    scores: Float[Array, "B K"], ranks: Int[Array, "B K"], mask: Bool[Array, "B K"]
) -> Float[Array, "B"]:
    """Negative log-likelihood of a whole ranking, per choice (Plackett 1975; Luce 1959).

        loss[b] = 1/C Σ_i [ logsumexp{s_j : ranks_j >= ranks_i} - s_i ]

    The best response is chosen among all, the next among the rest, and so on; the sum is over kept i that have a kept
    response of the same or a worse rank beside them, and C is their number (K - 1 without ties). Tied responses are
    each chosen before any of them is removed (Breslow's approximation), so a tie draws them together instead of
    being dropped. K = 2 without a tie is Bradley-Terry. Unlike `pairwise_ranking_loss` it assumes that the choice
    between two responses does not depend on which others are there.

    Args:
      scores: `[B, K]`; whatever stands outside the mask is never read.
      ranks: `[B, K]`, 0 = best, equal = tie; only their order counts.
      mask: `[B, K]`, False for places that hold no response.

    Returns:
      Nats per choice, float32 `[B]`; 0, with gradient 0, for a prompt with fewer than two responses.
    """
    chex.assert_equal_shape([scores, ranks, mask])
    chex.assert_rank(scores, 2)
    scores = jnp.where(mask, scores.astype(jnp.float32), 0.0)
    left = (ranks[:, None, :] >= ranks[:, :, None]) & mask[:, None, :] & mask[:, :, None]  # [b, i, j]: j not before i
    choices = left.sum(axis=2) > 1
    among = jnp.where(left, scores[:, None, :], -jnp.inf)
    among = jnp.where(choices[:, :, None], among, 0.0)  # rows that are not counted stay finite
    return masked_mean(jax.nn.logsumexp(among, axis=2) - scores, choices, axis=1)


def best_of_k_loss(scores: Float[Array, "B K"], best: Int[Array, "B"], mask: Bool[Array, "B K"]) -> Float[Array, "B"]:
    """Cross-entropy of the response that people picked among K (Ziegler et al. 2019, eq. 1).

        loss[b] = logsumexp_k s_k - s_best

    Args:
      scores: `[B, K]`; whatever stands outside the mask is never read.
      best: `[B]`, the place of the picked response, inside the mask.
      mask: `[B, K]`, False for places that hold no response; at least one is True.

    Returns:
      Nats, float32 `[B]`. Equal scores give log of the number of responses.
    """
    chex.assert_equal_shape([scores, mask])
    chex.assert_equal_shape_prefix([scores, best], 1)
    chex.assert_rank([scores, best], [2, 1])
    kept = jnp.where(mask, scores.astype(jnp.float32), -jnp.inf)
    picked = jnp.take_along_axis(kept, best[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(kept, axis=1) - picked


def first_choice_loss(
    scores: Float[Array, "B K"], ranks: Int[Array, "B K"], mask: Bool[Array, "B K"]
) -> Float[Array, "B"]:
    """`best_of_k_loss` of a ranking: only the first place counts (Ziegler et al. 2019, eq. 1).

        loss[b] = logsumexp_k s_k - mean{s_i : ranks_i smallest}

    the cross-entropy with a target spread evenly over the responses tied for the best, however the rest is ordered.

    Args:
      scores: `[B, K]`; whatever stands outside the mask is never read.
      ranks: `[B, K]`, 0 = best, equal = tie; only which are smallest counts.
      mask: `[B, K]`, False for places that hold no response.

    Returns:
      Nats, float32 `[B]`; 0, with gradient 0, for a prompt with fewer than two responses.
    """
    chex.assert_equal_shape([scores, ranks, mask])
    chex.assert_rank(scores, 2)
    scores = jnp.where(mask, scores.astype(jnp.float32), 0.0)
    smallest = jnp.where(mask, ranks, jnp.iinfo(ranks.dtype).max).min(axis=1, keepdims=True)
    best = mask & (ranks == smallest)
    chosen_among = mask.sum(axis=1) > 1
    among = jnp.where(chosen_among[:, None], jnp.where(mask, scores, -jnp.inf), 0.0)
    losses = jax.nn.logsumexp(among, axis=1) - masked_mean(scores, best, axis=1)
    return jnp.where(chosen_among, losses, 0.0)


def regression_loss(
    predictions: Float[Array, "*shape"], targets: Float[Array, "*shape"], mask: Bool[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Squared error where there is a label (HelpSteer, Wang et al. 2023; NeMo-Aligner's masked MSE).

        loss = m (prediction - target)²

    `[B, A]` for A rated attributes of which people filled in some, `[B, T]` for rewards of steps. The mean over labels is
    the sum divided by `mask.sum()`, so that an answer with more labels weighs more.

    Args:
      predictions: any shape.
      targets: same shape; whatever stands outside the mask is never read.
      mask: same shape, False where a label is missing.

    Returns:
      float32, same shape; 0, with gradient 0, where a label is missing.
    """
    chex.assert_equal_shape([predictions, targets, mask])
    errors = predictions.astype(jnp.float32) - targets.astype(jnp.float32)
    return jnp.square(jnp.where(mask, errors, 0.0))


def step_reward_loss(
    logits: Float[Array, "B T"], labels: Float[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """Binary cross-entropy of each reasoning step's label (Uesato et al. 2022; Lightman et al. 2023).

        loss_t = -y_t log σ(l_t) - (1 - y_t) log σ(-l_t)

    on the last token of every step, 0 on all others. A label strictly between 0 and 1 is the share of continuations
    that came out right (Math-Shepherd's soft estimate, Wang et al. 2023). Logit 0 costs ln 2 whatever the label.

    Args:
      logits: `[B, T]`, read at the token itself; the step's reward is σ(logit).
      labels: `[B, T]` in [0, 1], 1 = a good step; whatever stands outside the mask is never read.
      mask: `[B, T]`, True on the last token of a labelled step.

    Returns:
      Nats, float32 `[B, T]`; 0, with gradient 0, outside the mask.
    """
    chex.assert_equal_shape([logits, labels, mask])
    chex.assert_rank(logits, 2)
    logits = jnp.where(mask, logits.astype(jnp.float32), 0.0)
    labels = jnp.where(mask, labels.astype(jnp.float32), 0.0)
    losses = -labels * jax.nn.log_sigmoid(logits) - (1.0 - labels) * jax.nn.log_sigmoid(-logits)
    return jnp.where(mask, losses, 0.0)


def signed_cost_loss(
    worse_costs: Float[Array, "B"],
    better_costs: Float[Array, "B"],
    worse_unsafe: Bool[Array, "B"],
    better_unsafe: Bool[Array, "B"],
    *,
    sign_coef: ScalarLike = 1.0,
) -> Float[Array, "B"]:
    """Comparison and classification of costs in one, so that a cost of 0 is just safe (Safe RLHF, Dai et al. 2023).

        loss = -log σ(c_w - c_b) - sign_coef [ log σ(s_w c_w) + log σ(s_b c_b) ],   s = +1 unsafe, -1 safe

    Costs are the other way round than scores: the more harmful response costs more.

    Args:
      worse_costs: `[B]` c_w of the more harmful response.
      better_costs: `[B]` c_b of the less harmful one.
      worse_unsafe: `[B]`, True where the more harmful one was called unsafe.
      better_unsafe: `[B]`, the same for the less harmful one.
      sign_coef: >= 0; 1 in Safe RLHF, 0 is `bradley_terry_loss`.

    Returns:
      Nats, float32 `[B]`.

    Raises:
      ValueError: `sign_coef` is a Python number and negative.
    """
    chex.assert_equal_shape([worse_costs, better_costs, worse_unsafe, better_unsafe])
    check_between(0.0, math.inf, sign_coef=sign_coef)
    worse, better = (x.astype(jnp.float32) for x in (worse_costs, better_costs))
    signs = [jnp.where(unsafe, 1.0, -1.0) for unsafe in (worse_unsafe, better_unsafe)]
    classified = jax.nn.log_sigmoid(signs[0] * worse) + jax.nn.log_sigmoid(signs[1] * better)
    return -jax.nn.log_sigmoid(worse - better) - sign_coef * classified


def _comparison_loss(better, worse, margin, label_smoothing, centering_coef):
    """Negative log-likelihood of "better beats worse", elementwise."""
    gap = better - worse
    as_labelled, flipped = -jax.nn.log_sigmoid(gap - margin), -jax.nn.log_sigmoid(-gap - margin)
    likelihood = (1.0 - label_smoothing) * as_labelled + label_smoothing * flipped
    return likelihood + centering_coef * jnp.square(better + worse)


def _check_options(label_smoothing, centering_coef):
    check_between(0.0, 0.5, label_smoothing=label_smoothing)
    check_between(0.0, math.inf, centering_coef=centering_coef)
