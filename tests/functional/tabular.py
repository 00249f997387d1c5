"""An autoregressive policy small enough to enumerate: one row of logits for every prefix.

Tokens 0..V-1, completions of exactly `length` tokens after one start token, so every sum over completions
is a finite sum of V^length terms and nothing needs to be sampled to be known. Column 0 of every `[B, length
+ 1]` array is the start token and stands outside the mask.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.functional import sequence_logprobs, token_logprobs


class Completions(NamedTuple):
    """Some completions, as rows."""

    tokens: jax.Array
    """[B, T] with the start token first."""
    prefixes: jax.Array
    """[B, T]: row of the tables that holds the logits read at each position (the last one predicts
    nothing)."""
    mask: jax.Array
    """[B, T], False at the start token."""


def num_prefixes(vocab: int, length: int) -> int:
    return sum(vocab**t for t in range(length))


def all_completions(vocab: int, length: int) -> Completions:
    """Every completion once, `[V^length, length + 1]`."""
    completions = np.stack(np.meshgrid(*[np.arange(vocab)] * length, indexing="ij"), axis=-1).reshape(-1, length)
    prefixes = np.zeros((len(completions), length + 1), np.int32)
    code = np.zeros(len(completions), np.int32)
    for t in range(1, length):
        code = code * vocab + completions[:, t - 1]
        prefixes[:, t] = num_prefixes(vocab, t) + code
    tokens = np.concatenate([np.zeros((len(completions), 1), np.int32), completions.astype(np.int32)], axis=1)
    mask = np.ones_like(tokens, bool)
    mask[:, 0] = False
    return Completions(jnp.asarray(tokens), jnp.asarray(prefixes), jnp.asarray(mask))


@jax.jit
def logprobs(table: jax.Array, completions: Completions) -> jax.Array:
    """Token-aligned log-probabilities, `[B, T]`; `table` is `[num_prefixes, V]` logits."""
    return token_logprobs(table[completions.prefixes], completions.tokens)


@jax.jit
def completion_logprobs(table: jax.Array, completions: Completions) -> jax.Array:
    """Log-probabilities of whole completions, `[B]`."""
    return sequence_logprobs(logprobs(table, completions), completions.mask)
