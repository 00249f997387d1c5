"""What a direct method is told of a pair: sums or means, with or without the reference. It is part of the method.

Each takes token log-probs of `[B, 2, T]`, where `[:, 0]` is the chosen completion and `[:, 1]` the rejected one, and returns
the arguments of a loss of `preference_losses.py`, in its order.
"""

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax.functional.logprobs import mean_logprobs, sequence_logprobs


def against_reference(
    logprobs: Float[Array, "B 2 T"], ref_logprobs: Float[Array, "B 2 T"] | None, mask: Bool[Array, "B 2 T"]
) -> tuple[Float[Array, "B"], ...]:
    """Sums over the completion: for `dpo_loss`, `robust_dpo_loss`, and `ipo_loss` as it was published (Azar et al. 2023).

    Args:
      logprobs: `[B, 2, T]` under the policy.
      ref_logprobs: `[B, 2, T]` under the reference, data.
      mask: `[B, 2, T]`, True on completion tokens.

    Returns:
      `(chosen, rejected, ref_chosen, ref_rejected)`, nats per completion, float32 `[B]`.

    Raises:
      ValueError: `ref_logprobs` is None.
    """
    ref_logprobs = check_reference(ref_logprobs)
    return *_both(sequence_logprobs, logprobs, mask), *_both(sequence_logprobs, ref_logprobs, mask)


def mean_against_reference(
    logprobs: Float[Array, "B 2 T"], ref_logprobs: Float[Array, "B 2 T"] | None, mask: Bool[Array, "B 2 T"]
) -> tuple[Float[Array, "B"], ...]:
    """Means per token: for `ipo_loss` in the normalisation that TRL uses, where `beta` means another strength.

    With `dpo_loss` it is length-normalised DPO (TRL's `sigmoid_norm`).

    Args:
      logprobs: `[B, 2, T]` under the policy.
      ref_logprobs: `[B, 2, T]` under the reference, data.
      mask: `[B, 2, T]`, True on completion tokens.

    Returns:
      `(chosen, rejected, ref_chosen, ref_rejected)`, nats per token, float32 `[B]`.

    Raises:
      ValueError: `ref_logprobs` is None.
    """
    ref_logprobs = check_reference(ref_logprobs)
    return *_both(mean_logprobs, logprobs, mask), *_both(mean_logprobs, ref_logprobs, mask)


def mean_per_token(
    logprobs: Float[Array, "B 2 T"], ref_logprobs: Float[Array, "B 2 T"] | None, mask: Bool[Array, "B 2 T"]
) -> tuple[Float[Array, "B"], ...]:
    """Means per token of the policy alone: for `simpo_loss`, and `orpo_loss`, which holds its own likelihood term.

    Args:
      logprobs: `[B, 2, T]` under the policy.
      ref_logprobs: not used.
      mask: `[B, 2, T]`, True on completion tokens.

    Returns:
      `(chosen, rejected)`, nats per token, float32 `[B]`.
    """
    del ref_logprobs
    return _both(mean_logprobs, logprobs, mask)


def sums_and_nll(
    logprobs: Float[Array, "B 2 T"], ref_logprobs: Float[Array, "B 2 T"] | None, mask: Bool[Array, "B 2 T"]
) -> tuple[Float[Array, "B"], ...]:
    """Sums of the policy alone, and the chosen completion's loss per token: for `cpo_loss`.

    Args:
      logprobs: `[B, 2, T]` under the policy.
      ref_logprobs: not used.
      mask: `[B, 2, T]`, True on completion tokens.

    Returns:
      `(chosen, rejected, chosen_nll)`, nats per completion, the last per token, float32 `[B]`.
    """
    del ref_logprobs
    return *_both(sequence_logprobs, logprobs, mask), -mean_logprobs(logprobs[:, 0], mask[:, 0])


def check_reference(ref_logprobs: Array | None) -> Array:
    """Raise ValueError where a method needs the reference and the batch lacks it."""
    if ref_logprobs is None:
        raise ValueError("the batch has no ref_logprobs; fix: pair_token_logprobs of the reference's parameters, once")
    return ref_logprobs


def _both(reduce_fn, logprobs, mask):
    chex.assert_equal_shape([logprobs, mask])
    chex.assert_axis_dimension(logprobs, 1, 2)
    logprobs = jnp.where(mask, logprobs, 0.0)
    return reduce_fn(logprobs[:, 0], mask[:, 0]), reduce_fn(logprobs[:, 1], mask[:, 1])
