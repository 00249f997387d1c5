"""From rewards to advantages: per token with a critic, per completion against its group."""

import math

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from rlhf_jax.functional.checks import check_between, check_positive


def gae(
    rewards: Float[Array, "B T"],
    values: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    discount: ScalarLike = 1.0,
    gae_lambda: ScalarLike = 0.95,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimation (Schulman et al. 2016) over the kept tokens of each row.

        δ_t = r_t + γ V_{t+1} - V_t,    A_t = δ_t + γ λ A_{t+1},    R_t = A_t + V_t

    where t+1 is the next kept token, and V = A = 0 after the last one. A masked position is skipped, as if
    it were not in the row: padding on either side, or a hole in the middle (a tool's reply, a prompt of a
    second turn), gives exactly what the compacted row gives.

    λ = 1: A_t = Σ_{s≥t} γ^{s-t} r_s - V_t, returns-to-go minus values. λ = 0: A_t = δ_t, the TD residual.

    Args:
      rewards: `[B, T]`, `rewards[:, t]` is earned by emitting token t.
      values: `[B, T]`, read before token t is emitted.
      mask: `[B, T]`, True on completion tokens.
      discount: γ in [0, 1]; 1 in Ziegler et al. 2019 and after, since a completion is one short episode.
      gae_lambda: λ in [0, 1]; 0.95 in Ziegler et al. 2019.

    Returns:
      `(advantages, returns)`, float32 `[B, T]`, in reward units, not whitened, 0 outside the mask.
      Gradients are not stopped: an update takes both as data.

    Raises:
      ValueError: a Python number is outside [0, 1].
    """
    chex.assert_equal_shape([rewards, values, mask])
    chex.assert_rank(rewards, 2)
    check_between(0.0, 1.0, discount=discount, gae_lambda=gae_lambda)
    rewards, values = (jnp.where(mask, x.astype(jnp.float32), 0.0) for x in (rewards, values))

    def step(later, now):
        later_advantage, later_value = later
        reward, value, keep = now
        delta = reward + discount * later_value - value
        advantage = delta + discount * gae_lambda * later_advantage
        carry = (jnp.where(keep, advantage, later_advantage), jnp.where(keep, value, later_value))
        return carry, jnp.where(keep, advantage, 0.0)

    after_the_end = jnp.zeros_like(rewards[:, 0])
    _, advantages = jax.lax.scan(step, (after_the_end, after_the_end), (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T, advantages.T + values


def group_relative(
    scores: Float[Array, "B"], *, group_size: int, scale: bool = True, eps: ScalarLike = 1e-4
) -> Float[Array, "B"]:
    """Scores relative to the other samples of the same prompt (GRPO; Shao et al. 2024, §4.1.2).

        A_i = (s_i - mean_G) / (std_G + eps)        std with Bessel's correction, as in TRL

    With `scale=False` it is `s_i - mean_G` (Dr. GRPO; Liu et al. 2025), which is `leave_one_out` times (G - 1)/G: dividing
    by the spread weighs prompts that are nearly always or nearly never solved most. A group of equal scores has
    advantage 0: log the share of such groups (DAPO drops them).

    Args:
      scores: `[B]`; rows `g * group_size` to `(g + 1) * group_size - 1` answer the same prompt, as `generate` with
        `samples_per_prompt` returns them.
      group_size: G >= 2, a divisor of B.
      scale: whether to divide by the group's standard deviation.
      eps: > 0; 1e-4 in TRL, 1e-6 in verl.

    Returns:
      float32 `[B]`, without gradient trouble where all scores of a group are equal.

    Raises:
      ValueError: B is not a multiple of `group_size`, `group_size` is below 2, or `eps` is not positive.
    """
    check_between(2.0, math.inf, group_size=group_size)
    check_positive(eps=eps)
    groups = _groups(scores, group_size)
    centred = groups - groups.mean(axis=1, keepdims=True)
    if scale:
        variance = jnp.square(centred).sum(axis=1, keepdims=True) / (group_size - 1)
        spread = jnp.where(variance > 0, variance, 1.0)  # the root's slope at 0 is infinite
        centred = centred / (jnp.where(variance > 0, jnp.sqrt(spread), 0.0) + eps)
    return centred.reshape(scores.shape)


def leave_one_out(scores: Float[Array, "B"], *, group_size: int) -> Float[Array, "B"]:
    """Scores minus the mean of the other samples of the same prompt (RLOO; Kool et al. 2019; Ahmadian et al. 2024, eq. 7).

        A_i = s_i - 1/(G - 1) Σ_{j ≠ i} s_j

    The baseline does not depend on sample i, so the policy gradient stays unbiased. A KL penalty belongs into the
    scores before the baseline is taken.

    Args:
      scores: `[B]`, grouped as in `group_relative`.
      group_size: G >= 2, a divisor of B.

    Returns:
      float32 `[B]`; each group sums to 0.

    Raises:
      ValueError: B is not a multiple of `group_size`, or `group_size` is below 2.
    """
    check_between(2.0, math.inf, group_size=group_size)
    groups = _groups(scores, group_size)
    others = (groups.sum(axis=1, keepdims=True) - groups) / (group_size - 1)
    return (groups - others).reshape(scores.shape)


def _groups(scores, group_size):
    """`[B / G, G]`, float32."""
    chex.assert_rank(scores, 1)
    if scores.shape[0] % group_size:
        raise ValueError(f"group_size must be a divisor of the number of scores, {scores.shape[0]}: got {group_size}")
    return scores.astype(jnp.float32).reshape(-1, group_size)
