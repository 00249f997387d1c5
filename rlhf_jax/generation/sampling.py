"""Drawing one token from logits: temperature, top-k and top-p (nucleus) filters."""

import jax
import jax.numpy as jnp


def filter_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Keep the `k` largest of `logits [B, V]` (all that tie with the k-th), the rest becomes -inf."""
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"top_k must lie in 1..{logits.shape[-1]} (the vocabulary), got {k}")
    smallest_kept = jax.lax.top_k(logits, k)[0][:, -1:]
    return jnp.where(logits >= smallest_kept, logits, -jnp.inf)


def filter_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keep the smallest set of most likely tokens whose probability reaches `p` (Holtzman et al. 2020).

    The most likely token always stays; tokens that tie with the last one kept stay too.
    """
    if not 0.0 < p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1], got {p}")
    descending = -jnp.sort(-logits.astype(jnp.float32), axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    smallest_kept = jnp.min(jnp.where(mass_before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest_kept, logits, -jnp.inf)


def _first_largest(x: jax.Array) -> jax.Array:
    """`argmax` over the last axis of what is no NaN, as two plain reductions: XLA's CPU vectorises these."""
    columns = jnp.arange(x.shape[-1], dtype=jnp.int32)
    largest = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(largest, columns, x.shape[-1] - 1), axis=-1)


def sample_token(
    key: jax.Array, logits: jax.Array, *, temperature: float | jax.Array = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Draw a token for every row.

    Args:
      key: consumed.
      logits: `[B, V]`.
      temperature: logits are divided by it; the Python number 0 takes the most likely token.
      top_k: 0 keeps all. Applied after the temperature and before `top_p`.
      top_p: 1 keeps all.

    Returns:
      tokens `[B]`, and their log-probs `[B]` float32 under `softmax(logits / temperature)`, *before* the filters, which
      is what the training forward computes (greedy: at temperature 1). With a filter on, they are therefore not the
      sampling law; rollouts for policy gradients keep both filters off.
    """
    greedy = isinstance(temperature, int | float) and temperature == 0
    scaled = logits.astype(jnp.float32) / (1.0 if greedy else temperature)
    logprobs = jax.nn.log_softmax(scaled, axis=-1)
    if top_k:
        scaled = filter_top_k(scaled, top_k)
    if top_p < 1.0:
        scaled = filter_top_p(scaled, top_p)
    if not greedy:  # the largest of logits + Gumbel noise has the law softmax(logits), as in `jax.random.categorical`
        scaled = scaled + jax.random.gumbel(key, scaled.shape, scaled.dtype)
    tokens = _first_largest(scaled)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
