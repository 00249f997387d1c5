"""From logits (or, in chunks, hidden states) to log-probs of tokens and sequences, and to the entropy of the law behind them.

Everything is token-aligned: logits at position t-1 predict token t, and the result stands at t. Computed in
float32 whatever the model's dtype, because ratios of bfloat16 probabilities are noise.
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from rlhf_jax.functional.checks import check_positive
from rlhf_jax.functional.columns import map_columns
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
    return shift_right(_logprobs(logits, predicted, temperature))


def _logprobs(logits: jax.Array, predicted: jax.Array, temperature: ScalarLike) -> jax.Array:
    """Log-probability of the token of the same entry, `[B, T]`."""
    chosen = jnp.take_along_axis(logits, predicted[:, :, None], axis=2)[:, :, 0]
    normaliser = jax.nn.logsumexp(logits.astype(jnp.float32) / temperature, axis=2)
    return chosen.astype(jnp.float32) / temperature - normaliser


def _hits(logits: jax.Array, predicted: jax.Array) -> jax.Array:
    """`argmax(logits) == predicted` of the same entry, `[B, T]`; two plain reductions are faster on a CPU than argmax."""
    best = logits == jnp.max(logits, axis=2, keepdims=True)
    place = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    first = jnp.min(jnp.where(best, place, logits.shape[2]), axis=2)
    return first == predicted


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
    return shift_right(_entropies(logits, temperature))


def _entropies(logits: jax.Array, temperature: ScalarLike) -> jax.Array:
    """Entropy of the law of the same entry, `[B, T]`."""
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=2)
    impossible = jnp.isneginf(logprobs)
    logprobs = jnp.where(impossible, 0.0, logprobs)  # 0 · -inf would be NaN, in the value and in the gradient
    return jnp.where(impossible, 0.0, -jnp.exp(logprobs) * logprobs).sum(axis=2)


class TokenLaws(NamedTuple):
    """Of every token and the law from which it was drawn; entry 0 is 0. What is not used is not computed under `jit`."""

    logprobs: Float[Array, "B T"]
    """As `token_logprobs`."""
    entropies: Float[Array, "B T"]
    """As `entropy`."""
    hits: Float[Array, "B T"]
    """1 where the token is the likeliest one (of equal ones the first), else 0."""


def token_laws(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"], *, temperature: ScalarLike = 1.0) -> TokenLaws:
    """`token_logprobs`, `entropy`, and whether the token is the one that greedy decoding takes.

    Args:
      logits: `[B, T, V]`, any float dtype; `logits[:, t]` is the model's output at position t.
      tokens: `[B, T]`, ids in [0, V).
      temperature: > 0, the sampler's.

    Returns:
      float32, token-aligned, nats.

    Raises:
      ValueError: `temperature` is a Python number and not positive.
    """
    check_positive(temperature=temperature)
    logprobs = token_logprobs(logits, tokens, temperature=temperature)
    hits = shift_right(_hits(logits, jnp.roll(tokens, -1, axis=1)))
    return TokenLaws(logprobs, entropy(logits, temperature=temperature), _after_first(hits))


def chunked_token_laws(
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    *,
    unembed: Callable[[Float[Array, "B C D"]], Float[Array, "B C V"]],
    chunk_size: int,
    mask: Bool[Array, "B T"] | None = None,
    temperature: ScalarLike = 1.0,
) -> TokenLaws:
    """`token_laws(unembed(hidden), tokens)` without `[B, T, V]` in memory, forward or backward.

    Logits of some columns at a time, computed again in the backward pass: memory for about three `[chunk_size, V]` of
    float32 in place of as many `[B * T, V]`, for one more product with the output matrix. Same arithmetic, an entry at a
    time: values differ in the last bits that a product of another shape may have, gradients by the order of a sum.

    Args:
      hidden: `[B, T, D]`, the model's final states; `hidden[:, t]` speaks of token t + 1.
      tokens: `[B, T]`, ids in [0, V).
      unembed: hidden states to logits, entry by entry; it may close over parameters, through which gradients flow.
      chunk_size: most tokens whose logits exist at a time, over all rows; one column is made even where it has more.
      mask: `[B, T]`, the tokens that count; None = all. The others' results are 0, and where none of a chunk counts (prompts
        that all end in one column) no logits are made.
      temperature: > 0, the sampler's; may be traced.

    Returns:
      float32, token-aligned, nats.

    Raises:
      ValueError: `chunk_size` or `temperature` is not positive.
    """
    chex.assert_equal_shape_prefix([hidden, tokens, *([] if mask is None else [mask])], 2)
    check_positive(chunk_size=chunk_size, temperature=temperature)

    def laws(states: jax.Array, predicted: jax.Array) -> TokenLaws:
        logits = unembed(states)
        hits = _hits(logits, predicted).astype(jnp.float32)
        return TokenLaws(_logprobs(logits, predicted, temperature), _entropies(logits, temperature), hits)

    # The states come to their tokens, so that all is token-aligned; nothing comes to the first, which keeps its own.
    first = jax.lax.broadcasted_iota(jnp.int32, (1, hidden.shape[1], 1), 1) == 0
    before = jnp.where(first, hidden, shift_right(hidden))
    num_columns = max(1, chunk_size // tokens.shape[0])
    found = map_columns(before, tokens, fn=laws, num_columns=num_columns, mask=mask)
    return TokenLaws(*(_after_first(x if mask is None else jnp.where(mask, x, 0)) for x in found))


def _after_first(x: jax.Array) -> jax.Array:
    """In float32, with 0 for the first token of a row, of which nothing speaks."""
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) == 0, 0.0, x.astype(jnp.float32))


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
