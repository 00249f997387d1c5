"""The one forward that scoring, training and references share."""

import jax

from rlhf_jax.functional.logprobs import token_logprobs
from rlhf_jax.functional.masking import positions_from_segments
from rlhf_jax.types import CausalModel, Params


def policy_hidden(model: CausalModel, params: Params, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Hidden states `[B, T, D]` of whole rows, positions counted from their segments."""
    return model.hidden(params, tokens, positions_from_segments(segment_ids), segment_ids)[0]


def sequence_token_logprobs(
    model: CausalModel, params: Params, tokens: jax.Array, segment_ids: jax.Array, *, temperature: float = 1.0
) -> jax.Array:
    """`log p(token | tokens before it)`, `[B, T]`: the one forward that scoring, training and references share."""
    logits = model.unembed(params, policy_hidden(model, params, tokens, segment_ids))
    return token_logprobs(logits, tokens, temperature=temperature)
