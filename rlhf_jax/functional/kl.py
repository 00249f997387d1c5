"""KL(π‖ref), exact and estimated from samples of π, and the controller of the leash's coefficient.

Where an estimator may stand matters more than which one it is (y ~ π throughout):

| d = log π - log ref     | mean | in the reward                   | in the loss                    |
|-------------------------|------|---------------------------------|--------------------------------|
| k1 = d                  | KL   | **∇KL(π‖ref)**                  | 0: no leash at all             |
| k2 = d² / 2             | ≠ KL | of another objective            | **∇KL(π‖ref)**                 |
| k3 = exp(-d) - 1 + d    | KL   | ∇[KL(π‖ref) - KL(ref‖π)]: never | ∇KL(ref‖π), another divergence |

The last two columns hold the expected gradient for whole sequences, d = Σ_t d_t. Put token by token into a
loss, k2 and k3 give the gradient of every token's own KL and miss that a token also changes which prefixes
come after it; k1 in the reward misses nothing, since advantages reach back. So: **k1 in the reward, or k2
in the loss.** The k3-in-reward gradient vanishes to first order near the reference, so that leash lets the
policy go.

The estimators are Schulman's ("Approximating KL divergence", 2020). Beware of d's sign: with d = log ref -
log π, k1 changes sign and k3 becomes an estimator of something else.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, ScalarLike

from rlhf_jax.functional.checks import check_between, check_positive

MAX_RELATIVE_ERROR = 0.2


def exact_kl(logprobs: Float[Array, "*shape V"], ref_logprobs: Float[Array, "*shape V"]) -> Float[Array, "*shape"]:
    """`KL(π‖ref) = Σ_v π(v) (log π(v) - log ref(v))`, the sum over all outcomes that the estimators below sample.

    Of whole completions where they can be enumerated. Of one token, given what came before it, everywhere: summed over the
    tokens of samples of π its mean is the KL of completions, as k1's is, without the noise of which token was drawn next
    (Rao-Blackwell, token by token).

    Args:
      logprobs: log-probabilities of all V outcomes under π; -inf is an impossible outcome and adds nothing.
      ref_logprobs: of the same outcomes under the reference; -inf where π is possible gives inf.

    Returns:
      Nats, float32, without the last axis; never negative but for rounding.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    logprobs, ref_logprobs = logprobs.astype(jnp.float32), ref_logprobs.astype(jnp.float32)
    possible = logprobs > -jnp.inf
    ratios = jnp.where(possible, logprobs, 0.0) - jnp.where(possible, ref_logprobs, 0.0)
    return jnp.sum(jnp.exp(logprobs) * ratios, axis=-1)


def k1(logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`log π - log ref`: unbiased, of either sign, of large variance.

    Place it in the reward, with `shape_rewards`. Never in a loss: E_π[∇ log π] = 0, so it would restrain
    nothing.

    Args:
      logprobs: log-probabilities under π of samples of π, per token or per sequence.
      ref_logprobs: of the same samples under the reference, same shape and temperature.

    Returns:
      Nats, float32, same shape. Summed over a completion's tokens, its mean is KL(π‖ref) per completion.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs])
    return logprobs.astype(jnp.float32) - ref_logprobs.astype(jnp.float32)


def k2(logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`(log π - log ref)² / 2`: never negative, of small variance, biased by O(KL^1.5) near the reference.

    Place it in a loss: ∇k2 = (log π - log ref) ∇ log π, whose mean is ∇KL(π‖ref), exactly for whole
    sequences. As a value it serves `policy/approxkl_avg`. Not in the reward, where its bias would be
    optimised.

    Args:
      logprobs: log-probabilities under π of samples of π, per token or per sequence.
      ref_logprobs: of the same samples under the reference, same shape and temperature.

    Returns:
      Nats, float32, same shape.
    """
    return 0.5 * jnp.square(k1(logprobs, ref_logprobs))


def k3(logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`ref/π - 1 - log(ref/π)`: unbiased, never negative, of small variance while π is near the reference.

    A fine number to report. In a loss (GRPO, Shao et al. 2024) its gradient is that of KL(ref‖π). **Never
    in a reward**: the policy gradient becomes ∇[KL(π‖ref) - KL(ref‖π)], and the policy runs away. No clamp
    is hidden here: a sample that the reference finds e^88 times likelier than π overflows to inf.

    Args:
      logprobs: log-probabilities under π of samples of π, per token or per sequence.
      ref_logprobs: of the same samples under the reference, same shape and temperature.

    Returns:
      Nats, float32, same shape.
    """
    log_ratio = k1(logprobs, ref_logprobs)
    return jnp.expm1(-log_ratio) + log_ratio


def k3_straight_through(
    logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The value of k3 with the gradient of k2: `k2 + sg(k3 - k2)`, where sg stops the gradient (verl's "k3+").

    For a loss: the number that is logged is an unbiased KL, never negative, and what is minimised is KL(π‖ref), not
    k3's KL(ref‖π). Not in the reward, where only the value would count, which is k3's.

    Args:
      logprobs: log-probabilities under π of samples of π, per token or per sequence.
      ref_logprobs: of the same samples under the reference, same shape and temperature.

    Returns:
      Nats, float32, same shape.
    """
    quadratic = k2(logprobs, ref_logprobs)
    return quadratic + jax.lax.stop_gradient(k3(logprobs, ref_logprobs) - quadratic)


def adaptive_kl_coef(
    kl_coef: ScalarLike,
    kl: ScalarLike,
    *,
    target: ScalarLike = 6.0,
    horizon: ScalarLike = 10_000.0,
    num_samples: ScalarLike,
) -> Float[Array, ""]:
    """Next coefficient of the leash: a proportional controller in log space (Ziegler et al. 2019, §2.2).

        e = clip(kl / target - 1, ±0.2),    kl_coef ← kl_coef · (1 + e · num_samples / horizon)

    A KL above the target tightens the leash, below it loosens it. With 512 completions and the default
    horizon the coefficient moves by at most 0.2 · 512 / 10,000 ≈ 1 % per update; a run of few updates needs
    a shorter horizon.

    Args:
      kl_coef: coefficient used in this rollout (Ziegler et al. start at 0.15 in the style tasks).
      kl: nats per completion: the mean over completions of the SUM over tokens, not a mean over tokens.
      target: wanted KL in nats per completion, > 0.
      horizon: completions over which the coefficient adapts, > 0.
      num_samples: completions behind `kl`, > 0 (episodes, not tokens).

    Returns:
      float32 scalar, positive if `kl_coef` is. `kl == target` leaves it as it is.

    Raises:
      ValueError: a Python number is not positive, or `num_samples / horizon` exceeds 1 so that the clip
        would no longer bound the change by 20 %.
    """
    check_positive(target=target, horizon=horizon, num_samples=num_samples)
    fraction = num_samples / horizon
    check_between(0.0, 1.0, **{"num_samples / horizon": fraction})
    kl_coef, kl = jnp.asarray(kl_coef, jnp.float32), jnp.asarray(kl, jnp.float32)
    error = jnp.clip(kl / target - 1.0, -MAX_RELATIVE_ERROR, MAX_RELATIVE_ERROR)
    return kl_coef * (1.0 + error * fraction)
