"""One score out of several reward models' scores `[M, B]`, careful where the members disagree.

The rules are homogeneous: a member whose scores are twice as large counts twice. Put all on one scale first
(`normalize_members`).
"""

import math

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from rlhf_jax.functional.checks import check_between


def normalize_members(
    scores: Float[Array, "M B"], means: Float[Array, "M"], stds: Float[Array, "M"]
) -> Float[Array, "M B"]:
    """Every member in standard deviations of a reference of its own: `(score - mean_m) / std_m`.

    Comparisons leave a reward model's origin free and its scale to chance; without this the loudest member decides
    (Christiano et al. 2017, §2.2.3). Measure both moments of every member on the same reference samples.

    Args:
      scores: `[M, B]`, one row a member.
      means: `[M]`, score units of the member.
      stds: `[M]`, score units of the member; a member with 0 tells nothing apart and gets 0 for every response.

    Returns:
      float32 `[M, B]`.
    """
    chex.assert_rank([scores, means, stds], [2, 1, 1])
    chex.assert_equal_shape_prefix([scores, means, stds], 1)
    scores, means, stds = (x.astype(jnp.float32) for x in (scores, means[:, None], stds[:, None]))
    tells = stds > 0
    return jnp.where(tells, (scores - means) / jnp.where(tells, stds, 1.0), 0.0)


def ensemble_mean(scores: Float[Array, "M B"]) -> Float[Array, "B"]:
    """The members' mean, `1/M Σ_m s_m` (Christiano et al. 2017): `uncertainty_weighted` with coefficient 0.

    Args:
      scores: `[M, B]` on one scale.

    Returns:
      float32 `[B]`.
    """
    chex.assert_rank(scores, 2)
    return scores.astype(jnp.float32).mean(axis=0)


def worst_case(scores: Float[Array, "M B"]) -> Float[Array, "B"]:
    """Worst-case optimisation: the lowest member, `min_m s_m` (WCO; Coste et al. 2023, eq. 4).

    Never above the mean. Its gradient is that of the lowest member, shared evenly where several are.

    Args:
      scores: `[M, B]` on one scale.

    Returns:
      float32 `[B]`.
    """
    chex.assert_rank(scores, 2)
    return scores.astype(jnp.float32).min(axis=0)


def uncertainty_weighted(
    scores: Float[Array, "M B"], *, coef: ScalarLike = 0.5, unbiased: bool = False
) -> Float[Array, "B"]:
    """Uncertainty-weighted optimisation: the mean less the members' variance (UWO; Coste et al. 2023, eq. 5).

        score = mean_m s_m - coef · var_m s_m

    The published codes disagree on the variance: divided by M in their best-of-n, by M - 1 in their PPO. One coefficient
    thus means `M / (M - 1)` times more in the second (1.25 at five members).

    Args:
      scores: `[M, B]` on one scale.
      coef: λ >= 0, per score unit; 0.5 for best-of-n and 0.1 for PPO in Coste et al. 2023.
      unbiased: False divides the squares by M, True by M - 1.

    Returns:
      float32 `[B]`.

    Raises:
      ValueError: `coef` is a Python number and negative; one member where the variance is to be unbiased.
    """
    chex.assert_rank(scores, 2)
    check_between(0.0, math.inf, coef=coef)
    check_between(2.0 if unbiased else 1.0, math.inf, num_members=scores.shape[0])
    scores = scores.astype(jnp.float32)
    return scores.mean(axis=0) - coef * scores.var(axis=0, ddof=1 if unbiased else 0)
