"""The one forward that scoring, training and references share."""

from functools import partial

import jax

from rlhf_jax.functional.logprobs import TokenLaws, chunked_token_laws, token_laws
from rlhf_jax.functional.masking import positions_from_segments
from rlhf_jax.types import CausalModel, Params


def policy_hidden(model: CausalModel, params: Params, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Hidden states `[B, T, D]` of whole rows, positions counted from their segments."""
    return model.hidden(params, tokens, positions_from_segments(segment_ids), segment_ids)[0]


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
) -> jax.Array:
    """`log p(token | tokens before it)`, `[B, T]`: the one forward that scoring, training and references share.

    `mask` as in `policy_laws`.
    """
    hidden = policy_hidden(model, params, tokens, segment_ids)
    return policy_laws(model, params, hidden, tokens, mask, temperature=temperature).logprobs
