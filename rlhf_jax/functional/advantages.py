"""From per-token rewards to advantages."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from rlhf_jax.functional.checks import check_between


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
