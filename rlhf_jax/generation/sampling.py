"""Drawing one token from logits: temperature, top-k and top-p (nucleus) filters."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.generation.noise import gumbel


def _largest_threshold(holds: Callable[[jax.Array], jax.Array], num_rows: int) -> jax.Array:
    """The largest float32 `t [B, 1]` for which `holds(t)`: of every row true up to some number, then false; -inf if never.

    A number's 32 bits are found one by one, the highest first, which takes 32 passes over the row and no sort.
    """

    def value(code: jax.Array) -> jax.Array:
        """Codes are in the order of the floats: of the bits of one below zero all are flipped, else the sign's alone."""
        bits = jnp.where(code >> 31 == 1, code ^ jnp.uint32(1 << 31), ~code)
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    def add_bit(i: jax.Array, code: jax.Array) -> jax.Array:
        larger = code | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(value(larger)), larger, code)

    code = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros((num_rows, 1), jnp.uint32))
    return value(jnp.maximum(code, jnp.uint32(0x007FFFFF)))  # the code of -inf; below it there are NaNs


def filter_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Keep the `k` largest of `logits [B, V]` (all that tie with the k-th), the rest becomes -inf."""
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"top_k must lie in 1..{logits.shape[-1]} (the vocabulary), got {k}")
    exact = logits.astype(jnp.float32)
    smallest_kept = _largest_threshold(lambda t: jnp.sum(exact >= t, axis=-1, keepdims=True) >= k, logits.shape[0])
    return jnp.where(exact >= smallest_kept, logits, -jnp.inf)


def filter_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keep the smallest set of most likely tokens whose probability reaches `p` (Holtzman et al. 2020).

    The most likely token always stays; tokens that tie with the last one kept stay too. So a token stays if all that are
    more likely than it have less than `p` together.
    """
    if not 0.0 < p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1], got {p}")
    exact = logits.astype(jnp.float32)
    probabilities = jax.nn.softmax(exact, axis=-1)

    def reached_above(t: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(exact > t, probabilities, 0.0), axis=-1, keepdims=True) >= p

    return jnp.where(exact > _largest_threshold(reached_above, logits.shape[0]), logits, -jnp.inf)


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
        scaled = scaled + gumbel(key, scaled.shape)
    tokens = _first_largest(scaled)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
