"""Losses of the policy and of its critic, per token and unreduced.

All policy losses are called alike, `loss_fn(logprobs, old_logprobs, advantages, mask=mask)`. Without a mask an element
that does not count must be finite, since it meets arithmetic before `masked_sum` drops it; everything that this package
produces (`gae`, `masked_whiten`, `shape_rewards`, `token_logprobs`) is. The caller aggregates over the mask
(`aggregation.py`) and divides once.
"""

import math

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from rlhf_jax.functional.checks import check_between
from rlhf_jax.functional.masking import masked_mean

MAX_LOG_RATIO = 20.0


def clipped_policy_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    mask: Bool[Array, "B T"] | None = None,
    clip_low: ScalarLike = 0.2,
    clip_high: ScalarLike = 0.2,
    dual_clip: ScalarLike | None = None,
) -> Float[Array, "B T"]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), as a loss.

        ρ = exp(log π - log π_old),    loss = max(-A ρ, -A clip(ρ, 1 - clip_low, 1 + clip_high))

    and, with `dual_clip` c, at most -A c where A < 0 (Ye et al. 2020, eq. 4).

    At π = π_old the loss is -A and its gradient -A ∇ log π, the policy gradient. Once ρ has moved past the
    clip in the direction that A asks for, the gradient is 0. The log-ratio is clamped to ±20 before `exp`,
    where the gradient is 0 as well: a ratio of e^20 is a fault elsewhere, and must not become an infinity
    here.

    Args:
      logprobs: `[B, T]` under the policy in training.
      old_logprobs: `[B, T]` under the policy that sampled, data.
      advantages: `[B, T]`, data.
      mask: `[B, T]`, True on completion tokens; elements elsewhere may be anything. None: all count.
      clip_low: how far ρ may fall below 1, in [0, 1]; 0.2 in Schulman et al. 2017.
      clip_high: how far ρ may rise above 1, >= 0; 0.2 in Schulman et al. 2017, 0.28 in DAPO (Yu et al. 2025).
      dual_clip: c > 1 bounds the loss of bad tokens that have become far likelier, and stops their gradient; 3 in
        Ye et al. 2020. None: no such bound.

    Returns:
      float32 `[B, T]`, 0 outside the mask.

    Raises:
      ValueError: a Python number is out of its range.
    """
    check_between(0.0, 1.0, clip_low=clip_low)
    check_between(0.0, math.inf, clip_high=clip_high)
    logprobs, old_logprobs, advantages = _kept(mask, logprobs, old_logprobs, advantages)
    log_ratio = logprobs - old_logprobs
    losses = _surrogate(log_ratio, advantages, clip_low, clip_high)
    if dual_clip is None:
        return losses
    check_between(1.0, math.inf, dual_clip=dual_clip)
    bound = -advantages * dual_clip
    return jnp.where(advantages < 0, jnp.minimum(losses, bound), losses)


def gspo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: ScalarLike = 3e-4,
    clip_high: ScalarLike = 4e-4,
) -> Float[Array, "B T"]:
    """Group sequence policy optimisation: the ratio of whole completions, per token (Zheng et al. 2025, eq. 5 and 13).

        s = exp( mean_t log(π/π_old) ),    s_t = sg(s) π_t / sg(π_t),    loss = max(-A s_t, -A clip(s_t, ...))

    sg stops the gradient, so every token of a row has the ratio s, and is clipped or not together with the others. With one
    advantage a row, the mean over its tokens has the value and the gradient of the paper's sequence form; with
    an advantage per token it is GSPO-token.

    Args:
      logprobs: `[B, T]` under the policy in training.
      old_logprobs: `[B, T]` under the policy that sampled, data.
      advantages: `[B, T]`, data.
      mask: `[B, T]`, True on completion tokens.
      clip_low: how far s may fall below 1, in [0, 1]; 3e-4 there. s is a geometric mean, hence so small: PPO's 0.2 would
        never clip.
      clip_high: how far s may rise above 1, >= 0; 4e-4 there.

    Returns:
      float32 `[B, T]`, 0 outside the mask.

    Raises:
      ValueError: a Python number is out of its range.
    """
    check_between(0.0, 1.0, clip_low=clip_low)
    check_between(0.0, math.inf, clip_high=clip_high)
    logprobs, old_logprobs, advantages = _kept(mask, logprobs, old_logprobs, advantages)
    of_sequence = masked_mean(logprobs - old_logprobs, mask, axis=1)[:, None]
    log_ratio = jax.lax.stop_gradient(of_sequence - logprobs) + logprobs
    return jnp.where(mask, _surrogate(log_ratio, advantages, clip_low, clip_high), 0.0)


def clipped_sequence_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    clip_low: ScalarLike = 0.2,
    clip_high: ScalarLike = 0.2,
) -> Float[Array, "B T"]:
    """PPO's clipped surrogate with a whole completion as the action (Ahmadian et al. 2024; RLOO in TRL).

        ρ = exp( Σ_t log(π/π_old) ),    loss = max(-A ρ, -A clip(ρ, 1 - clip_low, 1 + clip_high))

    one number a completion, of which each of its n tokens holds the n-th part: `constant_length_mean(length=1)` is its mean
    over completions. ρ is the product of the tokens' ratios, where `gspo_loss` takes their geometric mean; long completions
    leave the clip's range soon. At π = π_old its gradient is that of `reinforce_loss`.

    Args:
      logprobs: `[B, T]` under the policy in training.
      old_logprobs: `[B, T]` under the policy that sampled, data.
      advantages: `[B, T]`, data; a completion's is the mean over its tokens.
      mask: `[B, T]`, True on completion tokens.
      clip_low: how far ρ may fall below 1, in [0, 1]; 0.2 in TRL.
      clip_high: how far ρ may rise above 1, >= 0; 0.2 in TRL.

    Returns:
      float32 `[B, T]`, 0 outside the mask.

    Raises:
      ValueError: a Python number is out of its range.
    """
    check_between(0.0, 1.0, clip_low=clip_low)
    check_between(0.0, math.inf, clip_high=clip_high)
    logprobs, old_logprobs, advantages = _kept(mask, logprobs, old_logprobs, advantages)
    log_ratio = (logprobs - old_logprobs).sum(axis=1)
    losses = _surrogate(log_ratio, masked_mean(advantages, mask, axis=1), clip_low, clip_high)
    return jnp.where(mask, (losses / jnp.maximum(mask.sum(axis=1), 1))[:, None], 0.0)


def cispo_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    mask: Bool[Array, "B T"] | None = None,
    max_ratio: ScalarLike = 5.0,
) -> Float[Array, "B T"]:
    """Policy gradient with a clipped importance weight (CISPO; MiniMax 2025, eq. 4-5).

        loss = -sg( min(π/π_old, max_ratio) ) A log π

    Where PPO's clip drops a token from the gradient, this only bounds its weight, so rare tokens that have become
    likely keep teaching. At π = π_old the gradient is the policy gradient.

    Args:
      logprobs: `[B, T]` under the policy in training.
      old_logprobs: `[B, T]` under the policy that sampled, data.
      advantages: `[B, T]`, data.
      mask: `[B, T]`, True on completion tokens; elements elsewhere may be anything. None: all count.
      max_ratio: at least 1, the paper's 1 + ε_high, for which it gives no number.

    Returns:
      float32 `[B, T]`, 0 outside the mask.

    Raises:
      ValueError: `max_ratio` is a Python number below 1.
    """
    check_between(1.0, math.inf, max_ratio=max_ratio)
    logprobs, old_logprobs, advantages = _kept(mask, logprobs, old_logprobs, advantages)
    log_ratio = jnp.clip(logprobs - old_logprobs, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    weight = jax.lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio), max_ratio))
    return -weight * advantages * logprobs


def reinforce_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    mask: Bool[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """The policy gradient as a loss (Williams 1992; RLOO, Ahmadian et al. 2024; ReMax, Li et al. 2023).

        loss = -A log π

    Right for samples of π itself, that is for one step per rollout: nothing corrects for a policy that has moved, and
    nothing stops it. `clipped_policy_loss` has the same gradient in that first step and is safe in the later ones.

    Args:
      logprobs: `[B, T]` under the policy in training.
      old_logprobs: `[B, T]`, not used: it stands here so that all policy losses are called alike.
      advantages: `[B, T]`, data.
      mask: `[B, T]`, True on completion tokens; elements elsewhere may be anything. None: all count.

    Returns:
      float32 `[B, T]`, 0 outside the mask. The value means nothing, only the gradient does.
    """
    logprobs, _, advantages = _kept(mask, logprobs, old_logprobs, advantages)
    return -advantages * logprobs


def clipped_value_loss(
    values: Float[Array, "B T"],
    old_values: Float[Array, "B T"],
    returns: Float[Array, "B T"],
    *,
    clip: ScalarLike = 0.2,
) -> Float[Array, "B T"]:
    """Squared error of the critic that gains nothing by moving far in one update (lm-human-preferences).

        loss = ½ max((V - R)², (clip(V, V_old - clip, V_old + clip) - R)²)

    With `clip=inf` it is ½ (V - R)². Where V has moved past the clip towards R, the gradient is 0.

    Args:
      values: `[B, T]` from the critic in training.
      old_values: `[B, T]` from the critic at the rollout, data.
      returns: `[B, T]` targets, data.
      clip: reward units, >= 0; 0.2 in Ziegler et al. 2019, meant for rewards of standard deviation about 1.

    Returns:
      float32 `[B, T]`, with the ½; `vf_coef` (0.1 there) is the caller's.

    Raises:
      ValueError: `clip` is a Python number and negative.
    """
    chex.assert_equal_shape([values, old_values, returns])
    check_between(0.0, math.inf, clip=clip)
    values, old_values, returns = (x.astype(jnp.float32) for x in (values, old_values, returns))
    clipped_values = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * jnp.maximum(jnp.square(values - returns), jnp.square(clipped_values - returns))


def _kept(mask, *arrays):
    """In float32, and 0 outside the mask."""
    chex.assert_equal_shape(arrays if mask is None else [*arrays, mask])
    return [x.astype(jnp.float32) if mask is None else jnp.where(mask, x.astype(jnp.float32), 0.0) for x in arrays]


def _surrogate(log_ratio, advantages, clip_low, clip_high):
    """`max(-A ρ, -A clip(ρ))`."""
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped_ratio = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return jnp.maximum(-advantages * ratio, -advantages * clipped_ratio)
