"""From one score per completion to one reward per token."""

import math

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from rlhf_jax.functional.checks import check_between, check_positive
from rlhf_jax.functional.kl import k1
from rlhf_jax.functional.masking import last_true_index


def shape_rewards(
    scores: Float[Array, "B"],
    logprobs: Float[Array, "B T"],
    ref_logprobs: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    kl_coef: ScalarLike,
) -> Float[Array, "B T"]:
    """The score on the last completion token, and the KL leash on every one (Ziegler et al. 2019, eq. 2).

        r_t = -kl_coef · (log π - log ref)_t  +  [t is the last kept token] · score

    so that the rewards of a completion add up to `score - kl_coef · log(π/ref)`. The leash is k1, the one
    estimator whose policy gradient is ∇KL(π‖ref) (see `kl.py`).

    Args:
      scores: `[B]`, one per completion.
      logprobs: `[B, T]` under the policy that sampled.
      ref_logprobs: `[B, T]` under the reference.
      mask: `[B, T]`, True on completion tokens, the end of sequence included: the score lands on it, not
        after it.
      kl_coef: reward units per nat, >= 0; 0 leaves the bare score. Ziegler et al. 2019 start an adaptive
        one at 0.15, Huang et al. 2024 (TL;DR) keep 0.05.

    Returns:
      float32 `[B, T]`, 0 outside the mask. A row with an empty mask gets nothing, not even its score.

    Raises:
      ValueError: `kl_coef` is a Python number and negative or NaN.
    """
    chex.assert_equal_shape([logprobs, ref_logprobs, mask])
    chex.assert_shape(scores, (mask.shape[0],))
    check_between(0.0, math.inf, kl_coef=kl_coef)
    columns = jax.lax.broadcasted_iota(jnp.int32, mask.shape, 1)
    is_last = mask & (columns == last_true_index(mask)[:, None])
    leash = -kl_coef * jnp.where(mask, k1(logprobs, ref_logprobs), 0.0)
    return leash + jnp.where(is_last, scores.astype(jnp.float32)[:, None], 0.0)


def subtract_missing_eos(
    scores: Float[Array, "B"], ended: Bool[Array, "B"], *, penalty: ScalarLike = 1.0
) -> Float[Array, "B"]:
    """Lower the score of completions that never ended: `score - penalty`, which keeps their order.

    Args:
      scores: `[B]`.
      ended: `[B]`, True where the end of sequence was emitted.
      penalty: score units, >= 0; 1 in TRL, meant for scores of standard deviation 1.

    Returns:
      float32 `[B]`; completions that ended keep their score.

    Raises:
      ValueError: `penalty` is a Python number and negative.
    """
    chex.assert_equal_shape([scores, ended])
    check_between(0.0, math.inf, penalty=penalty)
    scores = scores.astype(jnp.float32)
    return jnp.where(ended, scores, scores - penalty)


def replace_missing_eos(
    scores: Float[Array, "B"], ended: Bool[Array, "B"], *, value: ScalarLike = -1.0
) -> Float[Array, "B"]:
    """Give completions that never ended a fixed score (Ziegler et al. 2019).

    Only for scores of mean 0 and standard deviation 1 (`normalize_scores`): where scores sit around -5, a
    fixed -1 is a prize.

    Args:
      scores: `[B]`.
      ended: `[B]`, True where the end of sequence was emitted.
      value: score units; -1 in lm-human-preferences.

    Returns:
      float32 `[B]`; completions that ended keep their score.
    """
    chex.assert_equal_shape([scores, ended])
    return jnp.where(ended, scores.astype(jnp.float32), value)


def subtract_overlong(
    scores: Float[Array, "B"],
    lengths: Int[Array, "B"],
    *,
    max_length: ScalarLike,
    buffer: ScalarLike,
    penalty: ScalarLike = 1.0,
) -> Float[Array, "B"]:
    """DAPO's soft punishment of completions that come near the limit (Yu et al. 2025, eq. 13).

        score - penalty · clip((length - (max_length - buffer)) / buffer, 0, 1)

    Nothing is taken off below `max_length - buffer`, all of `penalty` at `max_length`: the loss of score does not
    depend on which side of a single token the completion ended. It replaces a penalty for a missing end of sequence;
    with both on, a cut completion pays twice.

    Args:
      scores: `[B]`.
      lengths: `[B]`, tokens of each completion.
      max_length: tokens, > 0; 20,480 in Yu et al. 2025.
      buffer: tokens, > 0, over which the penalty grows; 4,096 there.
      penalty: score units, >= 0; 1 there, for scores of +1 and -1.

    Returns:
      float32 `[B]`.

    Raises:
      ValueError: a Python number is out of its range.
    """
    chex.assert_equal_shape([scores, lengths])
    check_positive(max_length=max_length, buffer=buffer)
    check_between(0.0, math.inf, penalty=penalty)
    excess = (lengths.astype(jnp.float32) - (max_length - buffer)) / buffer
    return scores.astype(jnp.float32) - penalty * jnp.clip(excess, 0.0, 1.0)


def normalize_scores(scores: Float[Array, "B"], *, mean: ScalarLike, std: ScalarLike) -> Float[Array, "B"]:
    """Express scores in standard deviations of a reference: `(score - mean) / std`.

    Ziegler et al. 2019 measure both moments on samples of the reference policy, so that a KL coefficient
    means the same for every reward model. `std=1` is the shift-only form of Huang et al. 2024, where
    demonstrations score 0 on average.

    Args:
      scores: `[B]` raw scores.
      mean: score units.
      std: score units, > 0.

    Returns:
      float32 `[B]`.

    Raises:
      ValueError: `std` is a Python number and not positive.
    """
    check_positive(std=std)
    return (scores.astype(jnp.float32) - mean) / std
