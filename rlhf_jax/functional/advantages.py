"""From rewards to advantages: per token with a critic, per completion against its group."""

import math

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from rlhf_jax.functional.checks import check_between, check_positive
from rlhf_jax.functional.masking import masked_sum, masked_whiten


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


def rewards_to_go(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"], *, discount: ScalarLike = 1.0
) -> Float[Array, "B T"]:
    """What a token still earns: REINFORCE's signal without a critic (Williams 1992).

        G_t = r_t + γ G_{t+1}

    over the kept tokens, i.e. `gae` with λ = 1 and a critic that says 0. With γ = 1 and a score on the last token it
    is the same for every token but for the KL penalties behind it.

    Args:
      rewards: `[B, T]`, from `shape_rewards`.
      mask: `[B, T]`, True on completion tokens.
      discount: γ in [0, 1]; 1 in Hu 2025.

    Returns:
      float32 `[B, T]`, in reward units, 0 outside the mask.

    Raises:
      ValueError: `discount` is a Python number outside [0, 1].
    """
    check_between(0.0, 1.0, discount=discount)
    return gae(rewards, jnp.zeros_like(rewards), mask, discount=discount, gae_lambda=1.0)[0]


def reinforce_plus_plus(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"], *, discount: ScalarLike = 1.0
) -> Float[Array, "B T"]:
    """REINFORCE++: rewards-to-go whitened over all tokens of the batch (Hu 2025, eq. 4-7).

        A = (G - mean) / std        mean and standard deviation over the kept tokens of all rows

    The batch's mean is the baseline, so prompts need no second sample; but an easy prompt then has positive
    advantages whatever is answered. The KL penalty belongs into the rewards. The statistics are the whole batch's:
    compute advantages before it is split.

    Args:
      rewards: `[B, T]`, from `shape_rewards` with the KL penalty.
      mask: `[B, T]`, True on completion tokens.
      discount: γ in [0, 1]; 1 in Hu 2025.

    Returns:
      float32 `[B, T]`, 0 outside the mask.

    Raises:
      ValueError: `discount` is a Python number outside [0, 1].
    """
    check_between(0.0, 1.0, discount=discount)
    return masked_whiten(rewards_to_go(rewards, mask, discount=discount), mask)


def reinforce_plus_plus_baseline(
    rewards: Float[Array, "B T"], mask: Bool[Array, "B T"], *, group_size: int
) -> Float[Array, "B T"]:
    """REINFORCE++-baseline: minus the group's mean first, then whitened over the batch (Hu 2025, §3.2).

        A_bt = whiten( Σ_t r_bt - mean_G )

    Dividing by the batch's spread and not by the group's own leaves a group of nearly equal scores its small weight,
    where `group_relative` blows it up. The KL penalty stands in the loss (k2) there. As in verl the whitening is over
    tokens, so a long completion weighs more in the mean, which is then not exactly 0 over completions.

    Args:
      rewards: `[B, T]`; only their sum over a completion counts. Rows are grouped as in `group_relative`.
      mask: `[B, T]`, True on completion tokens.
      group_size: G >= 2, a divisor of B.

    Returns:
      float32 `[B, T]`, the same for all tokens of a row, 0 outside the mask.

    Raises:
      ValueError: B is not a multiple of `group_size`, or `group_size` is below 2.
    """
    chex.assert_equal_shape([rewards, mask])
    check_between(2.0, math.inf, group_size=group_size)
    centred = group_relative(masked_sum(rewards, mask, axis=1), group_size=group_size, scale=False)
    return masked_whiten(jnp.broadcast_to(centred[:, None], mask.shape), mask)


def zero_spread(scores: Float[Array, "B"], *, group_size: int) -> Bool[Array, "B"]:
    """Where all samples of a prompt scored the same: such a group teaches nothing.

    DAPO (Yu et al. 2025, eq. 11) leaves these groups out and samples others. The mean of the result is the metric
    `frac_reward_zero_std`; near 1, the prompts are all too easy or all too hard.

    Args:
      scores: `[B]`, grouped as in `group_relative`.
      group_size: G >= 2, a divisor of B.

    Returns:
      bool `[B]`, the same for all rows of a group. Equality is exact.

    Raises:
      ValueError: B is not a multiple of `group_size`, or `group_size` is below 2.
    """
    check_between(2.0, math.inf, group_size=group_size)
    groups = _groups(scores, group_size)
    equal = groups.max(axis=1, keepdims=True) == groups.min(axis=1, keepdims=True)
    return jnp.broadcast_to(equal, groups.shape).reshape(scores.shape)


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


def batch_relative(scores: Float[Array, "B"], *, group_size: int, eps: ScalarLike = 1e-4) -> Float[Array, "B"]:
    """Scores minus their group's mean, over the standard deviation of the whole batch's scores (Liu et al. 2025, Lite PPO).

        A_i = (s_i - mean_G) / (std_B + eps)        std with Bessel's correction, over all B scores as they are

    TRL's `scale_rewards="batch"`. A group of nearly equal scores keeps its small weight, where `group_relative` blows it up.
    `reinforce_plus_plus_baseline` divides by the spread of the centred scores over tokens instead. The statistic is the
    whole batch's: compute advantages before it is split.

    Args:
      scores: `[B]`, grouped as in `group_relative`.
      group_size: G >= 2, a divisor of B.
      eps: > 0; 1e-4 in TRL.

    Returns:
      float32 `[B]`; each group sums to 0.

    Raises:
      ValueError: B is not a multiple of `group_size`, `group_size` is below 2, or `eps` is not positive.
    """
    check_positive(eps=eps)
    centred = group_relative(scores, group_size=group_size, scale=False)
    return centred / (_spread(scores) + eps)


def standardize(advantages: Float[Array, "B"], *, eps: ScalarLike = 1e-4) -> Float[Array, "B"]:
    """Advantages of completions with mean 0 and standard deviation 1 over the batch.

        (A - mean) / (std + eps)        std with Bessel's correction

    RLOO with TRL's `normalize_advantages` is `standardize(leave_one_out(...))`. Every completion counts the same;
    `masked_whiten` over tokens counts long ones more. The statistics are the whole batch's: use it before it is split.

    Args:
      advantages: `[B]`, one a completion.
      eps: > 0; 1e-4 in TRL.

    Returns:
      float32 `[B]`; 0 where all are equal.

    Raises:
      ValueError: `eps` is not positive.
    """
    chex.assert_rank(advantages, 1)
    check_positive(eps=eps)
    centred = advantages.astype(jnp.float32) - advantages.astype(jnp.float32).mean()
    return centred / (_spread(advantages) + eps)


def _spread(x):
    """Standard deviation with Bessel's correction, whose slope is 0 where all are equal."""
    variance = jnp.square(x.astype(jnp.float32) - x.astype(jnp.float32).mean()).sum() / max(x.shape[0] - 1, 1)
    return jnp.where(variance > 0, jnp.sqrt(jnp.where(variance > 0, variance, 1.0)), 0.0)


def _groups(scores, group_size):
    """`[B / G, G]`, float32."""
    chex.assert_rank(scores, 1)
    if scores.shape[0] % group_size:
        raise ValueError(f"group_size must be a divisor of the number of scores, {scores.shape[0]}: got {group_size}")
    return scores.astype(jnp.float32).reshape(-1, group_size)
