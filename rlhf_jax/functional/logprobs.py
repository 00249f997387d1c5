"""From logits to log-probabilities of tokens and sequences, and to the entropy of the law behind them.

Everything is token-aligned: logits at position t-1 predict token t, and the result stands at t. Computed in
float32 whatever the model's dtype, because ratios of bfloat16 probabilities are noise.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from rlhf_jax.functional.checks import check_positive
from rlhf_jax.functional.masking import masked_mean, masked_sum, shift_right


def token_logprobs(
    logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], *, temperature: ScalarLike = 1.0
) -> Float[Array, "B T"]:
    """Log-probability of every token given the tokens before it.

        out[b, t] = log softmax(logits[b, t-1] / temperature)[tokens[b, t]],   out[b, 0] = 0

    Sampler, old policy, policy and reference must share one temperature, else the first ratio is not 1 and
    KL(π‖π) is not 0. Ziegler et al. 2019 sample at 0.7 (style) and 0.5 (CNN/DM).

    Args:
      logits: `[B, T, V]`, any float dtype; `logits[:, t]` is the model's output at position t. The last
        position predicts a token that is not there and is not read.
      tokens: `[B, T]`. Ids must lie in [0, V): inside a compiled program an id out of range cannot raise,
        and indexing would return a number all the same. Batches are checked where they enter, on the host.
      temperature: > 0.

    Returns:
      Nats, float32 `[B, T]`, at most 0. A token whose logit is -inf has log-probability -inf.

    Raises:
      ValueError: `temperature` is a Python number and not positive.
    """
    chex.assert_equal_shape_prefix([logits, tokens], 2)
    check_positive(temperature=temperature)
    predicted = jnp.roll(tokens, -1, axis=1)  # the token that each position predicts
    chosen = jnp.take_along_axis(logits, predicted[:, :, None], axis=2)[:, :, 0]
    normaliser = jax.nn.logsumexp(logits.astype(jnp.float32) / temperature, axis=2)
    return shift_right(chosen.astype(jnp.float32) / temperature - normaliser)


def entropy(logits: Float[Array, "B T V"], *, temperature: ScalarLike = 1.0) -> Float[Array, "B T"]:
    """Entropy of the law from which each token was drawn.

        out[b, t] = -Σ_v p_v log p_v  with  p = softmax(logits[b, t-1] / temperature),   out[b, 0] = 0

    Args:
      logits: `[B, T, V]`, any float dtype; -inf marks an impossible token, which contributes 0.
      temperature: > 0, the sampler's.

    Returns:
      Nats, float32 `[B, T]`, between 0 and log V. Uniform logits give log V.

    Raises:
      ValueError: `temperature` is a Python number and not positive.
    """
    chex.assert_rank(logits, 3)
    check_positive(temperature=temperature)
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=2)
    impossible = jnp.isneginf(logprobs)
    logprobs = jnp.where(impossible, 0.0, logprobs)  # 0 · -inf would be NaN, in the value and in the gradient
    return shift_right(jnp.where(impossible, 0.0, -jnp.exp(logprobs) * logprobs).sum(axis=2))


def sequence_logprobs(logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """Log-probability of whole completions, `Σ_t m_t log p_t`, in nats per completion.

    Args:
      logprobs: `[B, T]` token log-probabilities.
      mask: `[B, T]`, True on the tokens of the completion, its end of sequence included.

    Returns:
      float32 `[B]`; 0 for an empty completion.
    """
    chex.assert_rank(logprobs, 2)
    return masked_sum(logprobs, mask, axis=1)


def mean_logprobs(logprobs: Float[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B"]:
    """Mean log-probability of a completion's tokens, `Σ_t m_t log p_t / Σ_t m_t`, in nats per token.

    Args:
      logprobs: `[B, T]` token log-probabilities.
      mask: `[B, T]`, True on the tokens of the completion, its end of sequence included.

    Returns:
      float32 `[B]`; 0 for an empty completion.
    """
    chex.assert_rank(logprobs, 2)
    return masked_mean(logprobs, mask, axis=1)
