"""What a reward model's numbers are worth: probabilities of preference, and scores that owe nothing to length."""

import math

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real, ScalarLike

from rlhf_jax.functional.checks import check_between, check_positive

_NUM_HALVINGS = 40


def fit_temperature(
    gaps: Float[Array, "N"], outcomes: Float[Array, "N"], *, low: ScalarLike = 1e-3, high: ScalarLike = 1e3
) -> Float[Array, ""]:
    """The T at which `σ(gap / T)` predicts held-out comparisons best (temperature scaling; Guo et al. 2017, §4.2).

        T = argmin 1/N Σ [ -y log σ(g/T) - (1 - y) log σ(-g/T) ]

    Convex in 1/T, so bisection on log T finds the only root of the slope, `Σ g (σ(g/T) - y) = 0`, to float precision.
    T > 1 means the model was too sure. The order of scores is untouched: accuracy stays what it was.

    Args:
      gaps: `[N]` score of a minus score of b, of pairs that were not trained on.
      outcomes: `[N]` in [0, 1]: 1 where people preferred a, 0 where b, 0.5 for a tie.
      low: smallest T, > 0: the answer where every preference is predicted, which any smaller T would do better.
      high: largest T: the answer where the scores tell nothing, or the opposite.

    Returns:
      float32 scalar in [low, high]. No gradient flows through it.

    Raises:
      ValueError: `low` or `high` is a Python number and not positive.
    """
    chex.assert_equal_shape([gaps, outcomes])
    check_positive(low=low, high=high)
    gaps, outcomes = (jax.lax.stop_gradient(x.astype(jnp.float32)) for x in (gaps, outcomes))

    def halve(_, bounds):
        left, right = bounds
        middle = (left + right) / 2.0
        too_sure = jnp.sum(gaps * (jax.nn.sigmoid(gaps * jnp.exp(-middle)) - outcomes)) > 0
        return jnp.where(too_sure, middle, left), jnp.where(too_sure, right, middle)

    bounds = (jnp.log(jnp.asarray(low, jnp.float32)), jnp.log(jnp.asarray(high, jnp.float32)))
    left, right = jax.lax.fori_loop(0, _NUM_HALVINGS, halve, bounds)
    return jnp.exp((left + right) / 2.0)


def expected_calibration_error(
    probabilities: Float[Array, "N"], outcomes: Float[Array, "N"], *, num_bins: int = 10
) -> Float[Array, ""]:
    """How far predicted probabilities of preference are from how often they come true (ECE; Guo et al. 2017, eq. 3).

        ECE = Σ_bins n_bin / N · | mean confidence - mean hit |,   confidence = max(p, 1 - p)

    in equal bins of [1/2, 1]; a hit is the outcome on the predicted side. Which response of a pair is called the first
    changes nothing, so `outcomes` may be all 1 (chosen against rejected). Few pairs a bin bias it upwards.

    Args:
      probabilities: `[N]` predicted P(a preferred to b), `σ(gap / T)`.
      outcomes: `[N]` in [0, 1]: 1 where people preferred a, 0 where b, 0.5 for a tie.
      num_bins: >= 1.

    Returns:
      float32 scalar in [0, 1].

    Raises:
      ValueError: `num_bins` is below 1.
    """
    chex.assert_equal_shape([probabilities, outcomes])
    chex.assert_rank(probabilities, 1)
    check_between(1.0, math.inf, num_bins=num_bins)
    p, y = probabilities.astype(jnp.float32), outcomes.astype(jnp.float32)
    confidence = jnp.maximum(p, 1.0 - p)
    hits = jnp.where(p > 0.5, y, jnp.where(p < 0.5, 1.0 - y, 0.5))
    bins = jnp.clip((2.0 * num_bins * (confidence - 0.5)).astype(jnp.int32), 0, num_bins - 1)
    surplus = jax.ops.segment_sum(confidence - hits, bins, num_segments=num_bins)
    return jnp.abs(surplus).sum() / p.shape[0]


def fit_log_length(scores: Float[Array, "N"], lengths: Real[Array, "N"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Least squares of scores on log length over a reference set: `score ≈ slope · log(length) + intercept`.

    The slope is what a reward model pays for length alone (Singhal et al. 2023); `remove_length` takes it back.

    Args:
      scores: `[N]` on samples of the reference policy, of many lengths.
      lengths: `[N]` tokens of the completions, >= 1.

    Returns:
      slope, in score units per e-fold of length, and intercept: float32 scalars. Lengths that are all equal have no
      slope: 0 and the mean score.
    """
    chex.assert_equal_shape([scores, lengths])
    chex.assert_rank(scores, 1)
    y, x = scores.astype(jnp.float32), jnp.log(lengths.astype(jnp.float32))
    centred = x - x.mean()
    spread = jnp.square(centred).sum()
    differs = x.max() > x.min()
    slope = jnp.where(differs, (centred * y).sum() / jnp.where(differs, spread, 1.0), 0.0)
    return slope, y.mean() - slope * x.mean()


def remove_length(
    scores: Float[Array, "B"], lengths: Real[Array, "B"], *, slope: ScalarLike, intercept: ScalarLike
) -> Float[Array, "B"]:
    """What length does not explain of a score: `score - (slope · log(length) + intercept)`.

    On the reference set of the fit the result has mean 0 and no correlation with log length.

    Args:
      scores: `[B]`.
      lengths: `[B]` tokens of the completions, >= 1.
      slope: as `fit_log_length` found it.
      intercept: as `fit_log_length` found it.

    Returns:
      float32 `[B]`.
    """
    chex.assert_equal_shape([scores, lengths])
    return scores.astype(jnp.float32) - (slope * jnp.log(lengths.astype(jnp.float32)) + intercept)
