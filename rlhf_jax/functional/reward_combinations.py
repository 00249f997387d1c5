"""One score out of several named rewards of the same completions: help and harm, a right answer and its form.

Rewards are rows of `scores [N, B]`, N of them for B completions. A completion of which one reward is missing has no
combined score: it takes no part in any mean or spread, and gets 0. To go on, `fill_missing` gives it a score that moves no
baseline, and the update leaves the row out.

| combination | |
|---|---|
| by weights | `weighted_sum(scores, weights, mask)` |
| normalise, then sum | `weighted_sum(normalize_rewards(scores, mask), weights, mask)` |
| the worst of them | `worst_of(normalize_rewards(scores, mask), mask)` |
| one under a limit | `lagrangian_reward(rewards, costs, mask, multiplier=...)` with `dual_ascent` |
"""

import math

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from rlhf_jax.functional.checks import check_between, check_positive
from rlhf_jax.functional.ensembles import worst_case


def weighted_sum(
    scores: Float[Array, "N B"], weights: Float[Array, "N"], mask: Bool[Array, "N B"]
) -> Float[Array, "B"]:
    """`Σ_n w_n s_n`: what one more point of each reward is worth is said by the weights, in its own units.

    Args:
      scores: `[N, B]`, one row a reward.
      weights: `[N]`, combined units per unit of the reward; negative for a cost.
      mask: `[N, B]`, False where a reward is missing.

    Returns:
      float32 `[B]`, 0 where one is missing.
    """
    chex.assert_equal_shape([scores, mask])
    chex.assert_equal_shape_prefix([scores, weights], 1)
    kept = jnp.where(mask, scores.astype(jnp.float32), 0.0)
    return jnp.where(mask.all(axis=0), (weights.astype(jnp.float32)[:, None] * kept).sum(axis=0), 0.0)


def normalize_rewards(
    scores: Float[Array, "N B"],
    mask: Bool[Array, "N B"],
    *,
    group_size: int | None = None,
    eps: ScalarLike = 1e-4,
) -> Float[Array, "N B"]:
    """Every reward on a scale of its own: z-scores over the batch, or over the samples of each prompt.

        z_n = (s_n - mean_n) / (std_n + eps)        std with Bessel's correction

    Summed first, a reward that varies ten times as much decides alone, and two that cancel out teach nothing; normalised
    first (GDPO; TRL's `multi_objective_aggregation="normalize_then_sum"`), each has its weight. What it costs: a reward
    that hardly varies is blown up. GDPO normalises within the group, and whitens the sum over the batch (`standardize`).

    Args:
      scores: `[N, B]`, one row a reward.
      mask: `[N, B]`, False where a reward is missing; that completion is in no row's statistics.
      group_size: rows `g * group_size` to `(g + 1) * group_size - 1` answer the same prompt; None takes the batch as one.
      eps: > 0; 1e-4 in TRL.

    Returns:
      float32 `[N, B]`; exactly 0 where all kept values are equal, and for completions of which one reward is missing.

    Raises:
      ValueError: `group_size` is no divisor of B or below 1, or `eps` is not positive.
    """
    chex.assert_rank(scores, 2)
    chex.assert_equal_shape([scores, mask])
    check_positive(eps=eps)
    num_rows = scores.shape[1]
    size = num_rows if group_size is None else group_size
    check_between(1.0, math.inf, group_size=size)
    _check_divides(size, num_rows)
    shape = (scores.shape[0], num_rows // size, size)
    rows = jnp.broadcast_to(mask.all(axis=0), scores.shape).reshape(shape)
    values = scores.astype(jnp.float32).reshape(shape)
    kept = jnp.where(rows, values, 0.0)
    count = rows.sum(axis=2, keepdims=True).astype(jnp.float32)
    centred = jnp.where(rows, kept - kept.sum(axis=2, keepdims=True) / jnp.maximum(count, 1.0), 0.0)
    variance = jnp.square(centred).sum(axis=2, keepdims=True) / jnp.maximum(count - 1.0, 1.0)
    highest = jnp.where(rows, values, -jnp.inf).max(axis=2, keepdims=True)
    lowest = jnp.where(rows, values, jnp.inf).min(axis=2, keepdims=True)
    varies = (highest > lowest) & (variance > 0)  # the root's slope at 0 is infinite
    normal = centred / (jnp.sqrt(jnp.where(varies, variance, 1.0)) + eps)
    return jnp.where(varies, normal, 0.0).reshape(scores.shape)


def worst_of(scores: Float[Array, "N B"], mask: Bool[Array, "N B"]) -> Float[Array, "B"]:
    """The lowest reward, `min_n s_n`: what counts is what is missing most.

    `worst_case` of an ensemble, for rewards that mean different things: put them on one scale first
    (`normalize_rewards`), and costs in with a minus sign.

    Args:
      scores: `[N, B]`, one row a reward.
      mask: `[N, B]`, False where a reward is missing.

    Returns:
      float32 `[B]`, 0 where one is missing. The gradient is that of the lowest, shared evenly where several are.
    """
    chex.assert_equal_shape([scores, mask])
    return jnp.where(mask.all(axis=0), worst_case(jnp.where(mask, scores.astype(jnp.float32), 0.0)), 0.0)


def lagrangian_reward(
    rewards: Float[Array, "B"], costs: Float[Array, "B"], mask: Bool[Array, "B"], *, multiplier: ScalarLike
) -> Float[Array, "B"]:
    """Reward under a limit on a cost, at the multiplier λ of the moment (Safe RLHF; Dai et al. 2023).

        maximise E[r] subject to E[c] <= d:        score = (r - λ c) / (1 + λ)

    Dividing by `1 + λ` keeps the scale of the score, and with it the step, while λ grows. `dual_ascent` moves λ. Beside
    the KL leash of `shape_rewards`, which is not divided, what is solved at the end is

        maximise E[r] - kl_coef KL subject to E[c + kl_coef KL] <= d

    where the mean cost given to `dual_ascent` counts the leash in, and `maximise E[r] - kl_coef (1 + λ) KL subject to
    E[c] <= d` where it does not, as in the paper's code.

    Args:
      rewards: `[B]`, to be high (helpfulness).
      costs: `[B]`, to be low on average (harm); a cost model's zero is "just safe".
      mask: `[B]`, False where one of the two is missing.
      multiplier: λ >= 0; `exp` of `dual_ascent`'s.

    Returns:
      float32 `[B]`, 0 outside the mask. λ = 0 gives the rewards, λ → ∞ minus the costs.

    Raises:
      ValueError: `multiplier` is a Python number and negative or NaN.
    """
    chex.assert_equal_shape([rewards, costs, mask])
    check_between(0.0, math.inf, multiplier=multiplier)
    rewards, costs = (jnp.where(mask, x.astype(jnp.float32), 0.0) for x in (rewards, costs))
    return (rewards - multiplier * costs) / (1.0 + multiplier)


def dual_ascent(
    log_multiplier: ScalarLike,
    mean_cost: ScalarLike,
    *,
    limit: ScalarLike = 0.0,
    learning_rate: ScalarLike = 0.1,
    max_multiplier: ScalarLike = 5.0,
) -> Float[Array, ""]:
    """Next log of the multiplier: a step of gradient ascent on the dual, in log space (Dai et al. 2023).

        ln λ ← min(ln λ + η λ (mean cost - d), ln λ_max)

    A mean cost above the limit raises the price of cost, below it lowers it; where the constraint binds, λ comes to rest
    at its Karush-Kuhn-Tucker value, and goes to 0 where it does not. The state is this one number. Let the policy move
    faster than the multiplier, or both circle.

    Args:
      log_multiplier: ln λ of this rollout; 0 (λ = 1) at the start in the paper's code.
      mean_cost: over the completions of this rollout, or a mean over the last ones (of 128 there).
      limit: d, cost units; 0 in Dai et al. 2023, whose cost model says 0 for "just safe".
      learning_rate: η > 0; 0.1 there.
      max_multiplier: λ_max > 0; 5 there.

    Returns:
      float32 scalar.

    Raises:
      ValueError: `learning_rate` or `max_multiplier` is a Python number and not positive.
    """
    check_positive(learning_rate=learning_rate, max_multiplier=max_multiplier)
    log_multiplier, mean_cost = jnp.asarray(log_multiplier, jnp.float32), jnp.asarray(mean_cost, jnp.float32)
    step = learning_rate * jnp.exp(log_multiplier) * (mean_cost - limit)
    return jnp.minimum(log_multiplier + step, jnp.log(jnp.asarray(max_multiplier, jnp.float32)))


def fill_missing(scores: Float[Array, "B"], mask: Bool[Array, "B"], *, group_size: int = 1) -> Float[Array, "B"]:
    """Completions without a score get the mean of their group's, or of the batch's where the group has none.

    So they move no baseline: the mean of a group, or of the batch, is that of its scored completions. The spread of a group
    of G with F filled ones comes out smaller by √((G - F - 1)/(G - 1)) than that of the others alone. The rows themselves
    are for the update to leave out: take them out of the experience's mask.

    Args:
      scores: `[B]`, grouped as in `group_relative`.
      mask: `[B]`, False where there is no score.
      group_size: G >= 1, a divisor of B.

    Returns:
      float32 `[B]`; 0 where the whole batch has no score. A group of equal scores stays exactly equal.

    Raises:
      ValueError: `group_size` is no divisor of B, or below 1.
    """
    chex.assert_equal_shape([scores, mask])
    check_between(1.0, math.inf, group_size=group_size)
    _check_divides(group_size, scores.shape[0])
    kept = jnp.where(mask, scores.astype(jnp.float32), 0.0)
    groups, there = kept.reshape(-1, group_size), mask.reshape(-1, group_size)
    count = there.sum(axis=1, keepdims=True).astype(jnp.float32)
    highest = jnp.where(there, groups, -jnp.inf).max(axis=1, keepdims=True)
    lowest = jnp.where(there, groups, jnp.inf).min(axis=1, keepdims=True)
    mean = jnp.clip(groups.sum(axis=1, keepdims=True) / jnp.maximum(count, 1.0), lowest, highest)  # rounding
    overall = kept.sum() / jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    filled = jnp.where(there, groups, jnp.where(count > 0, mean, overall))
    return filled.reshape(scores.shape)


def _check_divides(group_size, num_rows):
    if num_rows % group_size:
        raise ValueError(f"group_size must be a divisor of the number of completions, {num_rows}: got {group_size}")
