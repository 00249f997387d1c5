"""From losses per token to one number: `(losses, mask) -> (total, weight)`, where the loss is `total / weight`.

Which of them is used is half of what tells GRPO, DAPO and Dr. GRPO apart. Totals and weights add up over micro-batches
and devices and are divided once, so neither can change a gradient. A row without a kept token weighs nothing.
"""

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

from rlhf_jax.functional.checks import check_positive
from rlhf_jax.functional.masking import masked_mean, masked_sum


def token_mean(losses: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Every token of the batch weighs the same (PPO; DAPO, Yu et al. 2025, eq. 8).

        total = Σ_bt m l,    weight = Σ_bt m

    A long completion counts for more than a short one, in proportion to its length.

    Args:
      losses: `[B, T]` per token.
      mask: `[B, T]`, True on the tokens that count.

    Returns:
      `(total, weight)`, float32 scalars.
    """
    chex.assert_rank(losses, 2)
    return masked_sum(losses, mask), mask.sum().astype(jnp.float32)


def sequence_mean(losses: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Every completion weighs the same: the mean over its tokens first (GRPO; Shao et al. 2024, eq. 3).

        total = Σ_b (Σ_t m l / Σ_t m),    weight = number of rows with a kept token

    A token of a long completion counts for less, so a long wrong answer is punished less per token than a short one:
    the length bias that Dr. GRPO removes. With rows of equal length it is `token_mean`.

    Args:
      losses: `[B, T]` per token.
      mask: `[B, T]`, True on the tokens that count.

    Returns:
      `(total, weight)`, float32 scalars.
    """
    chex.assert_rank(losses, 2)
    return masked_mean(losses, mask, axis=1).sum(), _num_rows(mask)


def constant_length_mean(
    losses: Float[Array, "B T"], mask: Bool[Array, "B T"], *, length: ScalarLike
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums over completions, divided by one constant for all (Dr. GRPO; Liu et al. 2025, listing 1).

        total = Σ_bt m l / length,    weight = number of rows with a kept token

    No completion's own length enters, so neither long nor short ones are favoured. With `length=1` it is the mean of
    the sums over sequences, the policy gradient as it is written (REINFORCE, RLOO).

    Args:
      losses: `[B, T]` per token.
      mask: `[B, T]`, True on the tokens that count.
      length: tokens, > 0; the most new tokens of the sampler in Liu et al. 2025. It scales loss and gradient, and
        with them whatever is added to the loss elsewhere.

    Returns:
      `(total, weight)`, float32 scalars.

    Raises:
      ValueError: `length` is a Python number and not positive.
    """
    chex.assert_rank(losses, 2)
    check_positive(length=length)
    return masked_sum(losses, mask) / length, _num_rows(mask)


def _num_rows(mask):
    return mask.any(axis=1).sum().astype(jnp.float32)
