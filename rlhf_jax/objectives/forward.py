"""The one forward that scoring, training and references share."""

from functools import partial

import jax
import jax.numpy as jnp

from rlhf_jax.functional.logprobs import TokenLaws, chunked_token_laws, token_laws
from rlhf_jax.functional.masking import positions_from_segments
from rlhf_jax.models.picking import hidden_at, last_columns
from rlhf_jax.types import CausalModel, Params, PickFn


def completions(columns: int | None) -> PickFn:
    """Of rows that end in completions of up to `columns` tokens (`generate`'s with `max_new_tokens=columns`) these, and the
    column before, whose state speaks of the first of them; None keeps all.

    Raises:
      ValueError: while tracing, fewer than one or not fewer than the row has.
    """

    def pick(x: jax.Array) -> jax.Array:
        if not 1 <= columns < x.shape[1]:
            raise ValueError(
                f"completion_columns must lie in 1..{x.shape[1] - 1}, a column less than the rows, got {columns}"
            )
        return last_columns(columns + 1)(x)

    return (lambda x: x) if columns is None else pick


def whole_rows(x: jax.Array, length: int) -> jax.Array:
    """What `completions` left of `[B, length]`, with zeros before it."""
    return jnp.pad(x, ((0, 0), (length - x.shape[1], 0)))


def policy_hidden(
    model: CausalModel,
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array,
    *,
    completion_columns: int | None = None,
) -> jax.Array:
    """Hidden states of whole rows, positions counted from their segments: `[B, T, D]`, or those that `completions` keeps."""
    positions = positions_from_segments(segment_ids)
    if completion_columns is None:
        return model.hidden(params, tokens, positions, segment_ids)[0]
    return hidden_at(model, params, tokens, positions, segment_ids, completions(completion_columns))[0]


def policy_laws(
    model: CausalModel,
    params: Params,
    hidden: jax.Array,
    tokens: jax.Array,
    mask: jax.Array | None = None,
    *,
    temperature: float | jax.Array = 1.0,
) -> TokenLaws:
    """Log-probs, entropies and hits of the tokens, from `policy_hidden`; `model.logits_chunk` says how many at a time.

    `mask` `[B, T]` says which tokens count. The results of others are not to be read: in chunks they are 0, and where none
    of a chunk counts no logits are made.
    """
    if model.logits_chunk is None:
        return token_laws(model.unembed(params, hidden), tokens, temperature=temperature)
    return chunked_token_laws(
        hidden,
        tokens,
        unembed=partial(model.unembed, params),
        chunk_size=model.logits_chunk,
        mask=mask,
        temperature=temperature,
    )


def sequence_token_logprobs(
    model: CausalModel,
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array,
    mask: jax.Array | None = None,
    *,
    temperature: float = 1.0,
    completion_columns: int | None = None,
) -> jax.Array:
    """`log p(token | tokens before it)`, `[B, T]`: the one forward that scoring, training and references share.

    `mask` as in `policy_laws`. `completion_columns` as in `completions`: of all columns before, the results are 0.
    """
    hidden = policy_hidden(model, params, tokens, segment_ids, completion_columns=completion_columns)
    pick = completions(completion_columns)
    mask = mask if mask is None else pick(mask)
    laws = policy_laws(model, params, hidden, pick(tokens), mask, temperature=temperature)
    return whole_rows(laws.logprobs, tokens.shape[1])
