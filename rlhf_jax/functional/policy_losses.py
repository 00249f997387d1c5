"""Losses of the policy and of its critic, per token and unreduced.

An element outside the loss mask must be finite, since it meets arithmetic before `masked_sum` drops it;
everything that this package produces (`gae`, `masked_whiten`, `shape_rewards`, `token_logprobs`) is. The
caller sums over the mask and divides once.
"""

import math

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from rlhf_jax.functional.checks import check_between

MAX_LOG_RATIO = 20.0


def clipped_policy_loss(
    logprobs: Float[Array, "B T"],
    old_logprobs: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    clip_low: ScalarLike = 0.2,
    clip_high: ScalarLike = 0.2,
) -> Float[Array, "B T"]:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), as a loss.

        ρ = exp(log π - log π_old),    loss = max(-A ρ, -A clip(ρ, 1 - clip_low, 1 + clip_high))

    At π = π_old the loss is -A and its gradient -A ∇ log π, the policy gradient. Once ρ has moved past the
    clip in the direction that A asks for, the gradient is 0. The log-ratio is clamped to ±20 before `exp`,
    where the gradient is 0 as well: a ratio of e^20 is a fault elsewhere, and must not become an infinity
    here.

    Args:
      logprobs: `[B, T]` under the policy in training.
      old_logprobs: `[B, T]` under the policy that sampled, data.
      advantages: `[B, T]`, data.
      clip_low: how far ρ may fall below 1, in [0, 1]; 0.2 in Schulman et al. 2017.
      clip_high: how far ρ may rise above 1, >= 0; 0.2 in Schulman et al. 2017, 0.28 in DAPO (Yu et al. 2025).

    Returns:
      float32 `[B, T]`.

    Raises:
      ValueError: a Python number is out of its range.
    """
    chex.assert_equal_shape([logprobs, old_logprobs, advantages])
    check_between(0.0, 1.0, clip_low=clip_low)
    check_between(0.0, math.inf, clip_high=clip_high)
    log_ratio = logprobs.astype(jnp.float32) - old_logprobs.astype(jnp.float32)
    ratio = jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped_ratio = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    advantages = advantages.astype(jnp.float32)
    return jnp.maximum(-advantages * ratio, -advantages * clipped_ratio)


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
